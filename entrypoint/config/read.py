"""From the composed tree to a typed `Run`: unknown keys first, then every value, then what is missing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from entrypoint.conf import METHODS, Run
from entrypoint.conf.key import REQUIRED
from entrypoint.config.keys import Key, groups, keys
from entrypoint.config.unknown import unknown_key
from entrypoint.config.value import read_value, show
from entrypoint.errors import ConfigError

GIVE = {
    "data.path": "give a file, folder, glob or s3:// address of Parquet traces",
    "model.path": "give the base model's folder or s3:// address",
    "output.path": "give the folder or s3:// address where the tuned model goes",
}


def read_run(tree: Any, method: str, *, may_lack: Collection[str] = ()) -> Run:
    """The run that `tree`, plain dicts as composed for `method`, describes.

    Args:
        tree: group names to dicts of values; what it lacks has its default.
        method: grpo or dpo.
        may_lack: required keys that stay "???" where they are not given, or their groups with a dot (`output.`).

    Raises:
        ConfigError: the first thing that is wrong, with the key's name, what was expected and what was got.
    """
    refuse_unknown("", tree, method)
    tops = [name for name in groups(method) if "." not in name]
    return Run(**{name: _build(name, tree.get(name, {}), method, tuple(may_lack)) for name in tops})


def refuse_unknown(name: str, value: Any, method: str) -> None:
    """Refuse `name` and what is below it, "" being the whole run, where a run of `method` has no such key.

    Raises:
        ConfigError: an unknown key, or a value where a group of keys is wanted.
    """
    if name in keys(method):
        return
    if name and name not in groups(method):
        raise unknown_key(name, method)
    if not isinstance(value, dict):
        raise _no_group(name, value, method)
    for child, inside in value.items():
        refuse_unknown(f"{name}.{child}" if name else str(child), inside, method)


def _no_group(name: str, value: Any, method: str) -> ConfigError:
    if value is None:
        return ConfigError(f"{name}: holds nothing; give keys below it or remove the line")
    if name == "train" and value in METHODS:
        return ConfigError(f"train: its numbers follow the method; select that instead: method={value}")
    if name == "method" and value in METHODS:
        return ConfigError(
            f"method: write `method: {{name: {value}}}` in a file; `method={value}` is the command line's"
        )
    example = next(key for key in keys(method) if key.startswith(f"{name}."))
    return ConfigError(f"{name}: expected keys, such as {example}, got {show(value)}")


def _build(group: str, tree: dict[Any, Any], method: str, may_lack: tuple[str, ...]) -> Any:
    known, kind = keys(method), groups(method)[group].kind
    values: dict[str, Any] = {}
    for child in (item.name for item in fields(kind)):
        name = f"{group}.{child}"
        if name in known:
            values[child] = _value(known[name], tree.get(child, known[name].default), may_lack)
        else:
            values[child] = _build(name, tree.get(child, {}), method, may_lack)
    return kind(**values)


def _value(key: Key, value: Any, may_lack: tuple[str, ...]) -> Any:
    if isinstance(value, str) and value == REQUIRED:
        if key.required and key.name.startswith(may_lack):
            return REQUIRED
        raise ConfigError(f"{key.name}: is required; {GIVE.get(key.name, 'give a value')}")
    if value is None and key.required:
        raise ConfigError(f"{key.name}: is required; {GIVE.get(key.name, 'give a value')}")
    return read_value(key, value)
