"""Helm as its users run it, both majors: no cluster, no plugins, nothing of this machine's configuration."""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.process import ROOT, scrubbed

CHART = ROOT / "chart"
VALUES = sorted((ROOT / "values").glob("*.yaml"))
HELMS = ("helm3", "helm4")


@cache
def tool(name: str) -> str:
    """The path of a pinned Go tool, built where it is not in the cache."""
    built = subprocess.run([ROOT / ".ci/tools/build", name], stdout=subprocess.PIPE, text=True, check=True)
    return built.stdout.strip()


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="helm-")  # goes when this process does


def environment(kubeconfig: Path | None = None) -> dict[str, str]:
    """Of a Go tool: no cluster but `kubeconfig`'s, and nothing of this machine's configuration."""
    home = _home().name
    homes = {f"HELM_{kind}_HOME": home for kind in ("CACHE", "CONFIG", "DATA")}
    return scrubbed({**homes, "KUBECONFIG": str(kubeconfig or f"{home}/none")})


def run(
    name: str,
    *arguments: str | Path,
    stdin: str | None = None,
    kubeconfig: Path | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a Go tool in the repository's root, without a cluster unless `kubeconfig` names one; `timeout` in seconds."""
    return subprocess.run(
        [tool(name), *arguments],
        cwd=ROOT,
        env=environment(kubeconfig),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def template(helm: str, *arguments: str | Path, name: str = "run-042") -> list[dict[str, Any]]:
    """The objects of a release, hooks included.

    Raises:
        AssertionError: Helm refused; its message is in it.
    """
    done = run(helm, "template", name, CHART, *arguments)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if found]


def run_file(objects: list[dict[str, Any]]) -> str:
    """The text of run.yaml among the objects of a release, the same in the ConfigMap of the pods and in its hooks'."""
    (text,) = {found["data"]["run.yaml"] for found in objects if "run.yaml" in (found.get("data") or {})}
    return str(text)
