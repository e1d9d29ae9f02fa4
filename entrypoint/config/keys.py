"""The keys of a run, walked from the dataclasses: what composing, the schema, the help and resuming know of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_type_hints

from entrypoint.conf import METHODS, Run
from entrypoint.conf.key import REQUIRED, Form

INT_MAX = 2**31 - 1  # of an integer key without a bound of its own: more is a slip of the finger


@dataclass(frozen=True)
class Key:
    """One key of the run file: its full dotted name, its type and what `key()` declared.

    `kind` is one of bool, int, float, str, texts (a list of str) and paths (a str or a list of str).
    """

    name: str
    kind: str
    optional: bool
    default: Any
    doc: str
    choices: tuple[str, ...] | None
    minimum: float | None
    maximum: float | None
    above: float | None
    below: float | None
    word: str | None
    form: Form | None

    @property
    def required(self) -> bool:
        """Whether the run can't do without it."""
        return bool(self.default == REQUIRED)


@dataclass(frozen=True)
class Group:
    """One group of keys: its dataclass and what it is about."""

    kind: type
    doc: str


@cache
def groups(method: str) -> Mapping[str, Group]:
    """Each group of a run of `method`, nested ones by their dotted names, in the run file's order."""
    chosen = dict(zip(("method", "train"), METHODS[method], strict=True))
    found: dict[str, Group] = {}
    hints = get_type_hints(Run)
    for item in fields(Run):
        _add_group(found, item.name, Group(chosen.get(item.name, hints[item.name]), item.metadata["doc"]))
    return found


def _add_group(found: dict[str, Group], name: str, group: Group) -> None:
    found[name] = group
    hints = get_type_hints(group.kind)
    for item in fields(group.kind):
        if is_dataclass(hints[item.name]):
            _add_group(found, f"{name}.{item.name}", Group(hints[item.name], item.metadata["doc"]))


@cache
def keys(method: str) -> Mapping[str, Key]:
    """Every key of a run of `method` by its dotted name, in the run file's order."""
    found: dict[str, Key] = {}
    nested = groups(method)
    for group, about in nested.items():
        hints = get_type_hints(about.kind)
        for item in fields(about.kind):
            name = f"{group}.{item.name}"
            if name not in nested:
                found[name] = _key(name, hints[item.name], item)
    return found


def _key(name: str, hint: Any, item: Field[Any]) -> Key:
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = [option for option in options if option is not type(None)]
    if item.metadata["word"] or item.metadata["form"]:
        kinds.remove(str)
    kind = "paths" if len(kinds) > 1 else "texts" if kinds[0] == list[str] else kinds[0].__name__
    default = item.default if item.default_factory is MISSING else item.default_factory()
    return Key(name, kind, type(None) in options, default, **item.metadata)


def flatten(run: Run) -> dict[str, Any]:
    """Every value of the run by its dotted name, in the run file's order."""
    return {name: _value(run, name) for name in keys(run.method.name)}


def _value(run: Run, name: str) -> Any:
    value: Any = run
    for part in name.split("."):
        value = getattr(value, part)
    return value


# Keys that a restarted run may change: where things go, what is written down, what fits into memory; never the maths.
FREE = (
    "checkpoint.",
    "tracking.",
    "output.iteration",
    "output.path",
    "data.cache_path",
    "data.endpoint_url",
    "model.cache_path",
    "train.collective_timeout",
    "train.eval_pairs",
    "train.eval_steps",
    "train.gradient_checkpointing",
    "train.logging_steps",
    "train.micro_batch_tokens",
    "train.sharding",
    "train.share_prompts",
)


def run_key(run: Run) -> str:
    """A run's name among those that share a folder: the SHA-256 of its `fingerprint_keys`."""
    return hashlib.sha256(json.dumps(fingerprint_keys(run), sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_keys(run: Run) -> dict[str, Any]:
    """The values that make a run this run: a checkpoint of others is not resumed."""
    return {name: value for name, value in flatten(run).items() if not name.startswith(FREE)}
