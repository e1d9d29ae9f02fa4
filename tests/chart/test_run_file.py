"""From a values file to the trainer: what was written under `training` is what it reads, or it is refused."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from entrypoint.config import compose
from entrypoint.config.keys import Key, keys
from entrypoint.errors import ConfigError
from tests.chart.helm import CHART, HELMS, VALUES, run, run_file, template
from tests.process import ROOT, run_entrypoint

SMOKE = ROOT / "values/cpu-smoke.yaml"
MOUNT = "/checkpoints/"  # the chart lets a run write nowhere else
WRITTEN = ("checkpoint.path", "data.cache_path", "model.cache_path", "output.path")
# Text that YAML, Go's templates, a shell or a reader of columns could take for something else; the trainer takes it.
WORDS = r"""
    yes no on off y n True null Null ~ 1 +1 1e-07 1e3 1.e3 .5 0. .inf .NaN 0x1F 0o17 0b1 012 1_000 1:30 -1:30.5
    2026-11-01 2026-11-01T10:00:00Z - ? : , -- --- ... ' '' " "" \ \\ \n ! !!str & * @ ` % # | > $ $HOME $(id) [a] {a}
    it's "a" a: a# *a &a %a @a `a` %s <b>&amp; {{ }} {{.Values.nodes}} {{-fail`x`-}} ünï 日本語 🚀
"""
PHRASES = ["a: b", "a #b", "- a", "? a", "!a b", "| a", "a, b", "a\u00a0b", "\u200b", "\ufeffa", "e\u0301", "a" * 3000]
TRICKY = [*WORDS.split(), *PHRASES]
# Text that it refuses, or that is OmegaConf's; Helm hands it on unchanged all the same.
AWKWARD = [" a", "a ", " ", "none", "${", "${x}", "${x"]
# Characters that Helm's YAML loses or changes.
UNWRITABLE = ["a\nb", "a\tb", "a\r\nb", "\x00", "\x1b", "\x7f", "\x80", "a\x85b", "a\u2028b", "\ufffe"]
TEXT = st.sampled_from(TRICKY) | st.text(
    st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1
)


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *groups, leaf = name.split(".")
        group = tree
        for part in groups:
            group = group.setdefault(part, {})
        group[leaf] = value
    return tree


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The leaves of `tree` by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return found


def composed(text: str) -> dict[str, Any]:
    """What the trainer makes of the text of a run.yaml, as dotted keys; a ConfigError where it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.yaml").write_text(text, encoding="utf-8")
        return flat(asdict(compose(["--config-dir", folder, "--config-name", "run"])))


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_a_values_files_run_is_composed(helm: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its keys do not contradict each other; the places are those of pods."""
    monkeypatch.setenv("RUN_NAME", "run-042")  # as the chart sets it for the pods
    text = run_file(template(helm, "-f", path))
    got = composed(text)
    values = path.read_text(encoding="utf-8").replace("${oc.env:RUN_NAME}", "run-042")
    written = flat(yaml.safe_load(values)["training"])
    assert {name: got[name] for name in written} == written


def test_the_program_takes_a_run_file_of_the_charts(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(run_file(template("helm4", "-f", ROOT / "values/dpo.yaml")), encoding="utf-8")
    environment = {"RUN_NAME": "run-042"}
    done = run_entrypoint("--config-dir", tmp_path, "--config-name", "run", "--cfg", "job", env=environment)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["output"]["path"].endswith("/run-042-model")
    assert yaml.safe_load(done.stdout)["method"]["name"] == "dpo"


@pytest.mark.slow
def test_the_smoke_runs_file_trains(tiny: Path, tmp_path: Path) -> None:
    """With the demo's traces and a tiny model where the image has a small one; for two steps."""
    (tmp_path / "run.yaml").write_text(run_file(template("helm4", "-f", SMOKE)), encoding="utf-8")
    done = run_entrypoint(
        *("--config-dir", tmp_path, "--config-name", "run"),
        f"data.path={ROOT / 'entrypoint/demo/traces'}",
        f"model.path={tiny}",
        f"output.path={tmp_path / 'out'}",
        f"checkpoint.path={tmp_path / 'checkpoints'}",
        "train.max_steps=2",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/run.json").read_text())
    assert report["training"]["steps"] == 2


def accepted(text: str) -> bool:
    return text == text.strip() and text.lower() != "none" and "${" not in text and text not in ("???", "=", "<<")


def values_of(key: Key) -> st.SearchStrategy[Any]:
    """Values that the key takes, tricky ones among them."""
    text = TEXT.filter(accepted)
    if key.name in WRITTEN:
        found: st.SearchStrategy[Any] = text.map(lambda name: MOUNT + name)
    elif key.choices:
        found = st.sampled_from(key.choices)
    elif key.kind == "bool":
        found = st.booleans()
    elif key.kind == "int":
        found = st.integers(int(key.minimum or 0), int(key.maximum or 2**31 - 1)) | st.just(1_000_000)
    elif key.kind == "float":
        low, high = key.above if key.minimum is None else key.minimum, key.below if key.maximum is None else key.maximum
        above, below = key.above is not None, key.below is not None
        found = st.floats(low, high, allow_nan=False, allow_infinity=False, exclude_min=above, exclude_max=below)
        inside = [value for value in (1e-07, 1e6, 0.1 + 0.2, 1.5) if (low or 0) < value < (high or 1e9)]
        found |= st.sampled_from(inside)
    elif key.kind == "str":
        found = text
    else:
        found = st.lists(text, min_size=1, max_size=3)
    return found | st.none() if key.optional else found


def rendered(helm: str, training: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
    """What Helm makes of a values file with `training`."""
    roomy = {"gang": {"gracePeriodSeconds": 2**31 + 100}}  # for any checkpoint.grace_seconds
    # JSON is YAML, but for characters that YAML wants escaped, and half characters, which it does not know.
    document = json.dumps({**roomy, "training": training}, ensure_ascii=False)
    document = re.sub(r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda odd: f"\\u{ord(odd[0]):04x}", document)
    return run(helm, "template", "run-042", CHART, "-f", SMOKE, "-f", "-", stdin=document)


def through_the_chart(helm: str, training: Mapping[str, Any]) -> str:
    """The text of run.yaml that a values file with `training` gives."""
    done = rendered(helm, training)
    assert done.returncode == 0, done.stderr
    return run_file([found for found in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if found])


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("method", ["grpo", "dpo"])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.reuse, Phase.generate])
@given(data=st.data())
def test_what_is_written_reaches_the_trainer(helm: str, method: str, data: st.DataObject) -> None:
    """All keys of a run at once, each with a value that it takes; nothing is shrunk: the message names the key."""
    drawn = data.draw(st.fixed_dictionaries({name: values_of(key) for name, key in keys(method).items()}))
    written = {**drawn, "method.name": method}
    got = composed(through_the_chart(helm, nested(written)))
    assert {name: (got.get(name), value) for name, value in written.items() if got.get(name) != value} == {}


@pytest.mark.parametrize("helm", HELMS)
def test_awkward_text_reaches_the_trainer_unchanged(helm: str) -> None:
    text = through_the_chart(helm, {"data": {"models": AWKWARD + TRICKY}})
    assert yaml.safe_load(text)["data"]["models"] == AWKWARD + TRICKY


@pytest.mark.parametrize("helm", HELMS)
def test_what_helm_can_not_write_is_refused_by_name(helm: str) -> None:
    said = rendered(helm, {"data": {"models": UNWRITABLE, "path": ["a\tb"]}, "tracking": {"run_name": "a\x85b"}}).stderr
    for place in (*(f"data/models/{number}" for number in range(len(UNWRITABLE))), "data/path/0", "tracking/run_name"):
        assert f"at '/training/{place}': " in said


@pytest.mark.parametrize("text", ["=", "<<"])
def test_what_yaml_1_1_gives_a_meaning_is_refused(text: str) -> None:
    """Helm writes it without quotes."""
    with pytest.raises(ConfigError, match=r"run\.yaml: line \d+, column \d+: "):
        composed(through_the_chart("helm4", {"tracking": {"experiment": text}}))


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_is_refused(text: str) -> None:
    written = {"data.path": "/traces", "model.path": "/base", "output.path": "/out", "tracking.run_name": text}
    with pytest.raises(ConfigError, match=r"(tracking\.run_name|run\.yaml): "):
        composed(json.dumps(nested(written)))


@pytest.mark.parametrize(("text", "meaning"), [("${data.path}", "/traces"), ("???", None)])
def test_what_omegaconf_gives_a_meaning_has_it(text: str, meaning: str | None) -> None:
    """Another key's value, and nothing."""
    written = {"data.path": "/traces", "model.path": "/base", "output.path": "/out", "tracking.run_name": text}
    assert composed(json.dumps(nested(written)))["tracking.run_name"] == meaning


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize(
    "plain", ["yes", "on", "n", "1e3", "1_000", "0x1F", "012", "2026-11-01", "null", "~", "1:30", ".5"]
)
def test_text_without_quotes_is_the_same_text_or_refused(helm: str, plain: str) -> None:
    """YAML makes booleans, numbers and dates of some words; what reaches the trainer is never another text."""
    document = f"training: {{tracking: {{experiment: {plain}}}}}"
    done = run(helm, "template", "run-042", CHART, "-f", SMOKE, "-f", "-", stdin=document)
    if done.returncode:
        assert "/training/tracking/experiment" in done.stderr
        return
    objects = [found for found in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if found]
    assert composed(run_file(objects))["tracking.experiment"] == plain
