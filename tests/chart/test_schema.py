"""The chart's schema: closed at every level under both Helms, and a generator that refuses what it can't type."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from entrypoint.config.keys import groups
from tests.chart.helm import CHART, HELMS, VALUES, run, template
from tests.process import ROOT

GENERATOR = runpy.run_path(str(ROOT / ".ci/chart_schema.py"))
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
GRPO = ROOT / "values/grpo.yaml"
DPO = ROOT / "values/dpo.yaml"


def parts(node: Any, *path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema of a key in `node`, with its dotted name."""
    for name, part in node.get("properties", {}).items():
        yield ".".join((*path, name)), part
        yield from parts(part, *path, name)


def test_it_is_a_valid_schema_and_takes_its_own_defaults() -> None:
    Draft7Validator.check_schema(SCHEMA)
    for name, part in parts(SCHEMA):
        if "default" in part and not name.startswith("training."):
            assert list(Draft7Validator(part).iter_errors(part["default"])) == [], name


def test_every_group_is_closed() -> None:
    found = [(name, part) for name, part in [("", SCHEMA), *parts(SCHEMA)] if "properties" in part]
    closed = {name for name, part in found if part.get("additionalProperties") is False}
    by_branch = {"training.method", "training.train"}  # their keys depend on the method; see below
    assert {name for name, _ in found} - closed <= by_branch
    assert {"", "training", "training.data", "nodePool"} <= closed


@pytest.mark.parametrize("values", [GRPO, DPO], ids=lambda path: path.stem)
@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize(
    "command",
    [("template", "run-042"), ("install", "run-042", "--dry-run=client"), ("lint", "--strict")],
    ids=lambda command: command[0],
)
def test_a_misspelt_key_anywhere_is_refused_with_its_path(
    values: Path, helm: str, command: tuple[str, ...], kubeconfig: Path
) -> None:
    """One in each group of the run at once: each is named."""
    places = [f"training.{group}" for group in groups(values.stem)] + ["training", "nodePool", "storage.fsx"]
    settings = [word for place in places for word in ("--set", f"{place}.misspelt=1")]
    done = run(helm, *command, CHART, "-f", values, *settings, kubeconfig=kubeconfig)
    assert done.returncode != 0
    refused = re.findall(r"at '/?([^']*)': additional properties 'misspelt' not allowed", done.stdout + done.stderr)
    assert {place.replace("/", ".") for place in refused} == {*places}


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("misspelt=1", "at '': additional properties 'misspelt' not allowed"),
        ("nodes=null", "at '': missing property 'nodes'"),
        ("training.method.name=ppo", "at '/training/method/name': value must be one of 'grpo', 'dpo'"),
        ("training.method.beta=0.1", "at '/training/method': additional properties 'beta' not allowed"),
        ("training.train.learning_rate=fast", "at '/training/train/learning_rate': got string, want number"),
        ("training.checkpoint.save_every=10s", "at '/training/checkpoint/save_every': '10s' does not match pattern"),
        ("extraEnv[0].name=A,extraEnv[0].valuefrom=x", "additional properties 'valuefrom' not allowed"),
        ("image.repository=acme/x:1.2", "at '/image/repository': 'acme/x:1.2' does not match pattern"),
        ("preflight.image.repository=Foo Bar", "at '/preflight/image/repository': 'Foo Bar' does not match pattern"),
        ("image.tag=a b", "at '/image/tag': 'a b' does not match pattern"),
        ("global.imageRegistry=https://acme.io", "at '/global/imageRegistry': 'https://acme.io' does not match"),
        ("global.imageRegistry=acme.io/", "at '/global/imageRegistry': 'acme.io/' does not match"),
        ("nodeClass.role=arn:aws:iam::1:role/x", "at '/nodeClass/role': 'arn:aws:iam::1:role/x' does not match"),
        ("resources.memoryGiB=900Gi", "at '/resources/memoryGiB': got string, want integer"),
        ("training.data=null", "at '/training/data': got null, want object"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(helm: str, setting: str, said: str) -> None:
    done = run(helm, "template", "run-042", CHART, "-f", GRPO, "--set", setting)
    assert done.returncode == 1
    assert said in done.stderr


def test_text_that_has_a_form_keeps_it() -> None:
    """The pattern of free text would take its place: minutes are the one form yet."""
    done = run("helm4", "template", "run-042", CHART, "-f", GRPO, "--set", "training.checkpoint.save_every=10m")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("helm", HELMS)
def test_a_label_that_null_deletes_is_gone_where_helm_keeps_the_null(helm: str) -> None:
    """As with --reuse-values after an install that deleted a default; to the API server null is an empty value."""
    pools = ("nodeSelector", "preflight.nodeSelector")
    labels = json.dumps({"kubernetes.io/arch": None, "gone": None, "kept": "1"})
    arguments = [word for pool in pools for word in ("--set-json", f"{pool}={labels}")]
    objects = template(helm, "-f", ROOT / "values/cpu-smoke.yaml", *arguments)
    found = re.findall(r'"nodeSelector": (\{.*?\})', json.dumps(objects))
    assert {*found} == {'{"kept": "1"}'}
    assert len(found) == 3  # preflight and its test, the trainer


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_a_values_file_passes_the_strict_lint(helm: str, path: Path) -> None:
    done = run(helm, "lint", "--strict", CHART, "-f", path)
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("nodes: 3", "line 1: nodes: no description; write `# -- …` above it"),
        ("# -- Tags.\ntags: {}", "line 2: tags: the default {} does not say its type; write `# @schema …` above it"),
        ("# @schema nme\n# -- Tags.\ntags: {}", "line 3: tags: @schema: no type nme; there are text, "),
        ("# @schema [a]\n# -- Tags.\ntags: {}", "line 3: tags: @schema: expected a type's name or {…}, got [a]"),
        ("# -- Tags.\n# @schema labels\ntags: {}", "line 3: @schema goes above the description"),
    ],
)
def test_a_value_that_is_not_typed_is_refused_by_the_generator(values: str, said: str) -> None:
    with pytest.raises(GENERATOR["Mistyped"], match=re.escape(said)):
        GENERATOR["schema"](values)


def test_annotations_become_schema() -> None:
    text = """
# -- A group.
queue:
  # @schema name?
  # -- Queue that is there,
  # or none.
  existing: ""
  # @schema {items: quantity}
  # -- Sizes.
  sizes: []
  # @schema duration
  # -- How long; null: for ever.
  wait: null
training: {}
"""
    queue = GENERATOR["schema"](text)["properties"]["queue"]
    assert queue["required"] == ["existing", "sizes"]
    assert queue["properties"]["existing"]["description"] == "Queue that is there, or none."
    check = Draft7Validator(queue).is_valid
    good = {"existing": "a", "sizes": ["1Gi", 2], "wait": "1h30m"}
    assert check(good)
    assert check({**good, "existing": "", "wait": None})
    for bad in ({"existing": "A"}, {"sizes": ["1GiB"]}, {"wait": "1 h"}, {"more": 1}):
        assert not check({**good, **bad}), bad
