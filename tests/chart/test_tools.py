"""The pinned tools say of themselves what they are pinned to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.chart.helm import run
from tests.process import ROOT

ASK = {
    "helm3": ("version", "--template={{.Version}}"),
    "helm4": ("version", "--template={{.Version}}"),
    "helm-docs": ("--version",),
    "kubeconform": ("-v",),
}


def modules(name: str) -> dict[str, str]:
    """What a tool is built from: module to version."""
    pin = (ROOT / f".ci/tools/{name}/go.mod").read_text()
    return dict(re.findall(r"^(?:require )?\s*(\S+) (v\d\S*)(?: // indirect)?$", pin, re.M))


def version(name: str) -> str:
    (package,) = re.findall(r"^tool (\S+)/cmd/", (ROOT / f".ci/tools/{name}/go.mod").read_text(), re.M)
    return modules(name)[package].removeprefix("v")


@pytest.mark.parametrize("name", ASK)
def test_a_tool_says_its_pinned_version(name: str) -> None:
    said = run(name, *ASK[name]).stdout.strip()
    assert re.search(rf"(^|[ v]){re.escape(version(name))}$", said), said


def test_helm_unittest_knows_its_pinned_version(tmp_path: Path) -> None:
    """It has no option to say it; a suite that wants a newer one is skipped."""
    pinned = version("helm-unittest")
    (tmp_path / "Chart.yaml").write_text("{apiVersion: v2, name: c, version: 1.0.0}")
    for wanted, outcome in ((pinned, "1 passed, 1 total"), (f"{pinned}1", "1 skipped, 1 total")):
        tests = "[{it: is empty, asserts: [{hasDocuments: {count: 0}}]}]"
        (tmp_path / "c_test.yaml").write_text(f"{{suite: s, skip: {{minimumVersion: {wanted}}}, tests: {tests}}}")
        assert re.search(rf"Tests: .*\b{outcome}", run("helm-unittest", "--file", "c_test.yaml", tmp_path).stdout)


def test_the_helms_and_their_test_runner_share_what_they_are_built_from() -> None:
    """Common modules at one version are compiled once; and unit tests run on the pinned Helm 3."""
    tools = [modules(name) for name in ("helm4", "helm3", "helm-unittest")]
    assert tools[2]["helm.sh/helm/v3"] == tools[1]["helm.sh/helm/v3"]
    shared = {name: {found[name] for found in tools if name in found} for found in tools for name in found}
    assert {name: versions for name, versions in shared.items() if len(versions) > 1} == {}
