"""`python -m entrypoint.schema`: the run file's JSON Schema (draft 2020-12), generated from the dataclasses.

Every object is closed. `method.name` decides which keys `method` has and which defaults `train` has, by if/then/else;
nothing is referred to by `$ref`, so that a chart can put the whole below a key of its own values.
"""

from __future__ import annotations

import json
from typing import Any

from entrypoint.conf import METHODS
from entrypoint.config.keys import INT_MAX, Key, groups, keys

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FIRST, SECOND = METHODS  # the first is the default
BOUNDS = {"minimum": "minimum", "maximum": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}
TYPES = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "texts": "array"}


def schema() -> dict[str, Any]:
    """The schema of a run file that has no defaults list.

    Key by key it accepts what composing accepts, text of blanks or with line breaks aside; what must hold between keys
    is `entrypoint.config.checks`'s.
    """
    tops = [name for name in groups(FIRST) if "." not in name]
    shared = {name: _group(name, FIRST) for name in tops if name not in ("method", "train")}
    about = groups(FIRST)
    properties = {
        name: shared.get(name) or {"description": about[name].doc}  # the branches below close these two
        for name in tops
    }
    properties["method"]["properties"] = {"name": {"enum": list(METHODS), "default": FIRST}}
    return {
        "$schema": DIALECT,
        "title": "A preference-tuning run",
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, group in shared.items() if "required" in group],
        "properties": properties,
        "if": {
            "required": ["method"],
            "properties": {"method": {"required": ["name"], "properties": {"name": {"const": SECOND}}}},
        },
        "then": _branch(SECOND),
        "else": _branch(FIRST),
    }


def _branch(method: str) -> dict[str, Any]:
    return {"properties": {name: _group(name, method) for name in ("method", "train")}}


def _group(name: str, method: str) -> dict[str, Any]:
    nested = groups(method)
    inside = [child for child in (*keys(method), *nested) if child.rpartition(".")[0] == name]
    properties = {
        child.rpartition(".")[2]: _group(child, method) if child in nested else _key(keys(method)[child])
        for child in inside
    }
    required = [child.rpartition(".")[2] for child in inside if child in keys(method) and keys(method)[child].required]
    return {
        "description": nested[name].doc,
        "type": "object",
        "additionalProperties": False,
        **({"required": required} if required else {}),
        "properties": properties,
    }


def _key(key: Key) -> dict[str, Any]:
    text = {"type": "string", "minLength": 1}
    found: dict[str, Any] = {"description": key.doc}
    types = ["string", "array"] if key.kind == "paths" else [TYPES[key.kind]]
    types += ["null"] if key.optional else []
    found["type"] = types[0] if len(types) == 1 else types
    if key.choices:
        found["enum"] = [*key.choices, *([None] if key.optional else [])]
    elif key.kind in ("str", "paths"):
        found["minLength"] = 1
    if key.kind in ("texts", "paths"):
        found["items"] = text
    if key.kind == "paths":
        found["minItems"] = 1
    found |= {word: getattr(key, bound) for bound, word in BOUNDS.items() if getattr(key, bound) is not None}
    if key.kind == "int":
        found.setdefault("maximum", INT_MAX)
    if key.word is not None:
        about = found.pop("description")
        found = {"description": about, "anyOf": [found, {"const": key.word}]}
    if key.form is not None:
        about = found.pop("description")
        found = {"description": about, "anyOf": [found, {"type": "string", "pattern": f"^{key.form.pattern}$"}]}
    if not key.required:
        found["default"] = key.default
    return found


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2, ensure_ascii=False))
