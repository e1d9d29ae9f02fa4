"""The JSON Schema: valid, closed at every level, and of one mind with composing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from entrypoint.config import compose
from entrypoint.config.keys import Key, keys
from entrypoint.config.value import read_value
from entrypoint.errors import ConfigError
from entrypoint.schema import schema
from tests.process import run_entrypoint

METHODS = ["grpo", "dpo"]
GIVEN = {"data": {"path": "/traces"}, "model": {"path": "/models/base"}, "output": {"path": "/out/run-1"}}
VALIDATOR = Draft202012Validator(schema())


def composed(method: str) -> dict[str, Any]:
    """A composed run, as plain dicts."""
    required = [f"{group}.path={keys['path']}" for group, keys in GIVEN.items()]
    return asdict(compose([f"method={method}", *required]))


def objects(node: Any) -> Iterator[dict[str, Any]]:
    """Every part of a schema that describes an object."""
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield node
        for child in node.values():
            yield from objects(child)


def groups_in(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A tree's dicts, the tree itself first."""
    yield tree
    for child in tree.values():
        if isinstance(child, dict):
            yield from groups_in(child)


def with_value(tree: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of `tree` in which the dotted key `name` has `value`."""
    tree = deepcopy(tree)
    *path, leaf = name.split(".")
    group = tree
    for part in path:
        group = group.setdefault(part, {})
    group[leaf] = value
    return tree


def test_the_module_prints_it() -> None:
    printed = run_entrypoint(module="entrypoint.schema")
    assert json.loads(printed.stdout) == schema()
    assert printed.stderr == ""


def test_it_is_a_valid_schema_with_every_object_closed() -> None:
    Draft202012Validator.check_schema(schema())
    found = list(objects(schema()))
    assert len(found) == 1 + 5 + 1 + 2 + 2  # the run; data to tracking; lora; method and train, each twice
    for node in found:
        assert node["additionalProperties"] is False


def test_no_reference_ties_it_to_the_root_of_a_document() -> None:
    assert "$ref" not in json.dumps(schema())
    chart = {"type": "object", "properties": {"training": schema()}}
    Draft202012Validator(chart).validate({"training": GIVEN})


@pytest.mark.parametrize("method", METHODS)
def test_a_composed_run_conforms_and_a_misspelt_key_does_not(method: str) -> None:
    run = composed(method)
    VALIDATOR.validate(run)
    places = len(list(groups_in(run)))
    misspelt = 0
    for place in range(places):
        for name in list(list(groups_in(run))[place]):
            changed = deepcopy(run)
            group = list(groups_in(changed))[place]
            group[name + "x"] = group.pop(name)
            assert not VALIDATOR.is_valid(changed), name
            misspelt += 1
    assert misspelt == len(keys(method)) + places - 1


def test_the_method_decides_which_keys_and_defaults_there_are() -> None:
    VALIDATOR.validate(GIVEN)
    VALIDATOR.validate(GIVEN | {"method": {"kl_coeff": 0.2}})
    VALIDATOR.validate(GIVEN | {"method": {"name": "dpo", "beta": 0.2}})
    for method in (
        {"beta": 0.2},
        {"name": "dpo", "kl_coeff": 0.2},
        {"name": "ppo"},
        "dpo",
        {"name": 1},
        {"vf_coeff": 0.5},
    ):
        assert not VALIDATOR.is_valid(GIVEN | {"method": method}), method
    branches = {"dpo": schema()["then"]["properties"], "grpo": schema()["else"]["properties"]}
    assert {name: branch["train"]["properties"]["learning_rate"]["default"] for name, branch in branches.items()} == {
        "grpo": 1e-5,
        "dpo": 5e-7,
    }
    assert branches["grpo"]["train"]["properties"]["max_steps"]["default"] == 1000
    assert branches["dpo"]["train"]["properties"]["max_steps"]["default"] is None


@pytest.mark.parametrize("lacking", ["data", "model", "output"])
def test_what_is_required_is_required(lacking: str) -> None:
    assert not VALIDATOR.is_valid({name: group for name, group in GIVEN.items() if name != lacking})
    assert not VALIDATOR.is_valid(GIVEN | {lacking: {}})


@pytest.mark.parametrize("path", ["s3://lake/x", ["a", "b"]])
def test_traces_are_one_place_or_several(path: object) -> None:
    VALIDATOR.validate(with_value(GIVEN, "data.path", path))


def probes(key: Key) -> list[Any]:
    """Values of every type, and those on and beside each bound."""
    bounds = [bound for bound in (key.minimum, key.maximum, key.above, key.below) if bound is not None]
    beside = [bound + step for bound in bounds for step in (-1, -1e-6, 0, 1e-6, 1)]
    plain: list[Any] = [
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        1.0,
        1.5,
        1e6,
        2**31 - 1,
        2**31,
        "",
        "x",
        "1",
        "10m",
        "010m",
        [],
        ["a"],
        ["a", 1],
        [""],
        {},
    ]
    return [*plain, *beside, *(key.choices or ()), key.default]


@pytest.mark.parametrize("method", METHODS)
def test_schema_and_composing_agree_on_every_value(method: str) -> None:
    """What Helm lets through is not refused on the nodes that were bought for it, and the other way round."""
    run = composed(method)
    asked = 0
    for name, key in keys(method).items():
        if name == "method.name":
            continue  # its other value selects the other branch
        for value in probes(key):
            if key.required and value == key.default:
                continue  # "???" is OmegaConf's word for nothing
            try:
                read_value(key, value)
                accepted = True
            except ConfigError:
                accepted = False
            assert VALIDATOR.is_valid(with_value(run, name, value)) == accepted, (name, value)
            asked += 1
    assert asked > 1000
