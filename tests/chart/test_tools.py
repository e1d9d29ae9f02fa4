"""The pinned tools say of themselves what they are pinned to."""

from __future__ import annotations

import re

import pytest

from tests.chart.helm import run
from tests.process import ROOT

ASK = {
    "helm3": ("version", "--template={{.Version}}"),
    "helm4": ("version", "--template={{.Version}}"),
    "helm-docs": ("--version",),
    "helm-unittest": ("--version",),
    "kubeconform": ("-v",),
}


@pytest.mark.parametrize("name", ASK)
def test_a_tool_says_its_pinned_version(name: str) -> None:
    pin = (ROOT / f".ci/tools/{name}/go.mod").read_text()
    (package,) = re.findall(r"^tool (\S+)/cmd/", pin, re.M)
    (version,) = re.findall(rf"^\s*{re.escape(package)} (\S+)", pin, re.M)
    said = run(name, *ASK[name]).stdout
    assert re.search(rf"(^|[ v]){version.removeprefix('v')}$", said.strip()), said
