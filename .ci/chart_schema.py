"""Prints chart/values.schema.json:  .venv/bin/python .ci/chart_schema.py  (`make schema` writes the file).

The chart's own keys are typed in chart/values.yaml, above each key, in this order:

    # @schema {minimum: 1}
    # -- Nodes of the gang, one pod each.
    nodes: 3

- `# -- …` is the description, for helm-docs and for the schema. Every key that is no group needs one.
- Without `# @schema` the default says the type: text, integer, boolean, number, or a group (a mapping with keys, which
  is closed: it has no other keys). A default that says too little ([], {}, null) needs an annotation.
- `# @schema {…}` is a piece of JSON Schema, laid over what the default says: `{enum: [a, b]}`, `{type: number}`.
- `# @schema NAME` is one of TYPES below: `# @schema duration`, `# @schema labels`. With `?` behind it the value may be
  empty ("") too: `# @schema quantity?`. Inside a piece a name stands for its type: `{items: quantity}`. The annotation
  is above the description, which helm-docs takes to go on until the key.
- A default of null may be null; everything else is required, so that `key: null`, Helm's way to delete a default, is
  refused here and not by a template that finds nothing.

`training` is not typed there: it is `python -m entrypoint.schema`, closed at every level, but for text with characters
that do not survive Helm's YAML. Draft 7, which every Helm 3 and Helm 4 enforces.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from entrypoint.schema import schema as run_schema  # noqa: E402

VALUES = ROOT / "chart" / "values.yaml"
TRAINING = "training"
SAME_TYPE = {str: "string", bool: "boolean", int: "integer", float: "number"}

NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
LABEL_KEY = rf"^({NAME}(\.{NAME})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$"
REPOSITORY = "[a-z0-9]+([._-]+[a-z0-9]+)*"  # of an image: a part of its path
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
# Helm's toYaml writes nothing at all for some of these (errors are swallowed), and U+0085 comes back as a blank.
UNWRITABLE = r"\x00-\x1f\x7f-\x9f" + "\u2028\u2029\ufffe\uffff"
TYPES: dict[str, dict[str, Any]] = {
    "text": {"type": "string", "minLength": 1},
    "texts": {"type": "array", "items": {"type": "string", "minLength": 1}, "uniqueItems": True},
    "name": {"type": "string", "pattern": f"^{NAME}$", "maxLength": 63},  # DNS-1123 label
    "duration": {"type": "string", "pattern": "^([0-9]+(s|m|h))+$"},  # Go's, as far as Kubernetes' APIs take it
    "quantity": {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$", "minimum": 0},
    "money": {"type": "number", "minimum": 0},
    "registry": {"type": "string", "pattern": rf"^[a-z0-9.-]+(:[0-9]+)?(/{REPOSITORY})*$"},
    "repository": {"type": "string", "pattern": rf"^([a-z0-9.-]+(:[0-9]+)?/)?{REPOSITORY}(/{REPOSITORY})*$"},
    "tag": {"type": "string", "pattern": "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"},
    "digest": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
    "port": {"type": "integer", "minimum": 1, "maximum": 65535},
    "labelKey": {"type": "string", "pattern": LABEL_KEY},
    "labels": {
        "type": "object",
        "propertyNames": {"pattern": LABEL_KEY},
        "additionalProperties": {"type": "string", "pattern": LABEL_VALUE},
    },
    "selector": {  # null, Helm's way to delete a default, stays there at an upgrade with --reuse-values
        "type": "object",
        "propertyNames": {"pattern": LABEL_KEY},
        "additionalProperties": {"type": ["string", "null"], "pattern": LABEL_VALUE},
    },
    "annotations": {
        "type": "object",
        "propertyNames": {"pattern": LABEL_KEY},
        "additionalProperties": {"type": "string"},
    },
    "quantities": {
        "type": "object",
        "additionalProperties": {
            "type": ["string", "integer"],
            "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$",
            "minimum": 0,
        },
    },
    "object": {"type": "object"},  # Kubernetes' own, such as affinity: what it holds is checked when it is rendered
    "objects": {"type": "array", "items": {"type": "object"}},
}


class Mistyped(Exception):
    """A key of values.yaml that can't be typed: where, and what to write."""


def schema(text: str) -> dict[str, Any]:
    """The schema of the chart's values.

    Args:
        text: of values.yaml.

    Raises:
        Mistyped: a key without a description, a default that doesn't say its type, an unknown type.
    """
    lines = text.splitlines()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise Mistyped("values.yaml: expected keys")
    found = _group(root, lines, ())
    training = {name: _writable(part) for name, part in run_schema().items() if name not in ("$schema", "title")}
    found["properties"][TRAINING] = {"description": "The run, as the trainer's own schema has it.", **training}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the chart", **found}


def _group(node: yaml.MappingNode, lines: list[str], path: tuple[str, ...]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required: list[str] = []
    for key, value in node.value:
        here = (*path, key.value)
        if here == (TRAINING,):
            properties[key.value] = {}
        else:
            properties[key.value] = _value(value, *_comments(lines, key.start_mark.line), lines, here)
        if yaml.safe_load(yaml.serialize(value)) is not None:
            required.append(key.value)
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def _writable(node: Any) -> Any:
    """A part of the run's schema, its free text without characters that Helm can't write."""
    if isinstance(node, list):
        return [_writable(child) for child in node]
    if not isinstance(node, dict):
        return node
    found = {name: _writable(child) for name, child in node.items()}
    if "string" in (found.get("type") or []) and not {"enum", "pattern"} & set(found):
        found["pattern"] = f"^[^{UNWRITABLE}]*$"
    return found


def _comments(lines: list[str], line: int) -> tuple[str, str, int]:
    """The description and the annotation above a key, and the key's own line, counted from 1."""
    above: list[str] = []
    for before in reversed(lines[:line]):
        if not before.strip().startswith("#"):
            break
        above.insert(0, before.strip().removeprefix("#").strip())
    starts = [number for number, comment in enumerate(above) if comment.startswith("-- ")]
    prose = above[starts[-1] :] if starts else []
    if any(comment.startswith("@schema") for comment in prose):
        raise Mistyped(
            f"chart/values.yaml line {line + 1}: @schema goes above the description; helm-docs prints it else"
        )
    annotations = [comment.removeprefix("@schema").strip() for comment in above if comment.startswith("@schema")]
    prose = [comment for comment in prose if not comment.startswith("@")]
    return " ".join(prose).removeprefix("-- "), " ".join(annotations), line + 1


def _value(
    node: yaml.Node, doc: str, annotation: str, line: int, lines: list[str], path: tuple[str, ...]
) -> dict[str, Any]:
    where = f"chart/values.yaml line {line}: {'.'.join(path)}"
    default = yaml.safe_load(yaml.serialize(node))
    if isinstance(node, yaml.MappingNode) and node.value and not annotation:
        return ({"description": doc} if doc else {}) | _group(node, lines, path)
    if not doc:
        raise Mistyped(f"{where}: no description; write `# -- …` above it")
    found = _typed(default, annotation, where)
    return {"description": doc, **(_or_null(found) if default is None else found), "default": default}


def _typed(default: Any, annotation: str, where: str) -> dict[str, Any]:
    if re.fullmatch(r"[A-Za-z]+\??", annotation):
        found = _named(annotation.removesuffix("?"), where)
        return _or_empty(found) if annotation.endswith("?") else found
    piece = yaml.safe_load(annotation) if annotation else {}
    if not isinstance(piece, dict):
        raise Mistyped(f"{where}: @schema: expected a type's name or {{…}}, got {annotation}")
    says_type = {"type", "enum"} & set(piece)
    if not says_type and type(default) in SAME_TYPE:
        piece = {"type": SAME_TYPE[type(default)], **piece}
    elif not says_type and isinstance(default, list) and "items" in piece:
        piece = {"type": "array", **piece}
    elif not says_type:
        raise Mistyped(f"{where}: the default {default!r} does not say its type; write `# @schema …` above it")
    return dict(_expand(piece, where))


def _expand(piece: Any, where: str) -> Any:
    """`piece` with types in the place of their names."""
    if isinstance(piece, str):
        return _named(piece, where)
    if not isinstance(piece, dict):
        return piece
    found = dict(piece)
    for word in {"items", "additionalProperties", "propertyNames"} & set(piece):
        found[word] = _expand(piece[word], where)
    if "properties" in piece:
        found["properties"] = {name: _expand(part, where) for name, part in piece["properties"].items()}
    return found


def _or_empty(found: dict[str, Any]) -> dict[str, Any]:
    if "pattern" in found:
        found["pattern"] = f"^$|{found['pattern']}"
    found.pop("minLength", None)
    return found


def _or_null(found: dict[str, Any]) -> dict[str, Any]:
    """As lists of types and values, not as alternatives: of those, a refusal would list each."""
    if "enum" in found:
        return found | {"enum": [*found["enum"], None]}
    types = found["type"] if isinstance(found["type"], list) else [found["type"]]
    return found | {"type": [*types, "null"]}


def _named(name: str, where: str) -> dict[str, Any]:
    if name not in TYPES:
        raise Mistyped(f"{where}: @schema: no type {name}; there are {', '.join(TYPES)}")
    return dict(TYPES[name])


if __name__ == "__main__":
    try:
        found = json.dumps(schema(VALUES.read_text(encoding="utf-8")), indent=2, ensure_ascii=False)
        print(re.sub("[\u2028\u2029\ufffe\uffff]", lambda odd: f"\\u{ord(odd[0]):04x}", found))
    except Mistyped as error:
        sys.exit(str(error))
