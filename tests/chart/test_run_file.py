"""From a values file to the trainer: what was written under `training` is what it reads, or it is refused."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrypoint.config import compose
from entrypoint.config.keys import Key, keys
from entrypoint.errors import ConfigError
from tests.chart.helm import CHART, HELMS, VALUES, run, run_file, template
from tests.process import ROOT, run_entrypoint

SMOKE = ROOT / "values/cpu-smoke.yaml"
GIVEN = {"data.path": "s3://lake/traces/", "model.path": "/models/base", "output.path": "/checkpoints/run-042"}
HOSTILE = st.sampled_from(
    [
        *("yes", "no", "on", "off", "y", "n", "true", "null", "~", "1", "1e-07", "0x1F", "012", "1_000", "2026-11-01"),
        *(
            '"',
            "'",
            "''",
            '"quoted"',
            "it's",
            "a: b",
            "a #b",
            "- a",
            "* a",
            "&a",
            "!a",
            "%a",
            "@a",
            "`a`",
            "| a",
            "> a",
        ),
        *("{{ .Values.x }}", "{{", "}}", "{{- fail `x` -}}", "{a}", "[a]", "a, b", "$HOME", "$(id)", "${", "${x}"),
        *(
            "${oc.env:HOME}",
            r"\${x}",
            r"a\nb",
            "\\",
            "\\\\",
            "a\nb",
            "a\tb",
            "a\r\nb",
            " a",
            "a ",
            "",
            " ",
            "\x00",
            "\x7f",
        ),
        *(
            "ünï",
            "日本語",
            "🚀",
            "\u2028",
            "\u00a0",
            "\ufeff",
            "e\u0301",
            "a" * 3000,
            "???",
            "%s %d",
            "<b>&amp;",
            "---",
        ),
    ]
)
TEXT = HOSTILE | st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


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
    assert report["steps"] == 2


def values_of(key: Key) -> st.SearchStrategy[Any]:
    """Values that the key's type takes, the awkward ones among them."""
    if key.choices:
        found: st.SearchStrategy[Any] = st.sampled_from(key.choices)
    elif key.kind == "bool":
        found = st.booleans()
    elif key.kind == "int":
        found = st.integers(int(key.minimum or 0), int(key.maximum or 2**31 - 1)) | st.just(1_000_000)
    elif key.kind == "float":
        low, high = key.above if key.minimum is None else key.minimum, key.below if key.maximum is None else key.maximum
        bounded = {"exclude_min": key.above is not None, "exclude_max": key.below is not None}
        found = st.floats(low, high, allow_nan=False, allow_infinity=False, **bounded)
        found |= st.sampled_from([value for value in (1e-07, 1e6, 0.1 + 0.2, 1.0) if _inside(value, low, high)])
    elif key.kind == "str":
        found = TEXT
    else:
        found = st.lists(TEXT, min_size=1, max_size=3)
    return found | st.none() if key.optional else found


def _inside(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or low < value) and (high is None or value < high)


def through_the_chart(helm: str, leaves: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The composed run of a values file that says `leaves`, and why not, where one of the two refuses it."""
    document = json.dumps({"training": nested(leaves)})  # JSON is YAML, and spells every string in one way
    done = run(helm, "template", "run-042", CHART, "-f", SMOKE, "-f", "-", stdin=document)
    if done.returncode:
        return {}, done.stderr
    try:
        objects = [found for found in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if found]
        return composed(run_file(objects)), ""
    except ConfigError as error:
        return {}, str(error)


def named(message: str) -> str | None:
    """The key that a refusal of Helm's, of the chart's or of the trainer's is about."""
    found = re.search(r"at '/training/([\w/]+)|training\.([\w.]+\w)|^([\w.]+):", message)
    return next(part for part in found.groups() if part).replace("/", ".") if found else None


def awkward(value: Any) -> bool:
    """Whether text may be refused: blank, with blanks around it, line breaks, or what OmegaConf reads as its own."""
    if isinstance(value, list):
        return any(awkward(item) for item in value)
    return isinstance(value, str) and (
        value != value.strip()
        or not value
        or value.lower() == "none"
        or "${" in value
        or value == "???"
        or re.search(r"[\x00-\x1f\x7f-\x9f\ufeff\ufffe\uffff\u2028\u2029]", value) is not None
    )


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("method", ["grpo", "dpo"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_what_is_written_reaches_the_trainer_or_is_refused(helm: str, method: str, data: st.DataObject) -> None:
    """All keys of a run at once; what is refused is taken out, by the name in the refusal, until the rest passes."""
    drawn = data.draw(st.fixed_dictionaries({name: values_of(key) for name, key in keys(method).items()}))
    written = {**drawn, "method.name": method}
    while True:
        got, refusal = through_the_chart(helm, written)
        if not refusal:
            break
        name = named(refusal)
        assert name in written, refusal
        assert awkward(written[name]), refusal
        if name in GIVEN:
            assert written[name] != GIVEN[name], refusal
            written[name] = GIVEN[name]
        else:
            del written[name]
    # Where OmegaConf has a meaning for text, the chart's is that of the same file without the chart.
    own = composed(json.dumps(nested(written)))
    assert {name: got[name] for name in written} == {name: own[name] for name in written}
    plain = {name: value for name, value in written.items() if not awkward(value)}
    assert {name: got[name] for name in plain} == plain


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
