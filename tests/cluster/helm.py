"""Releases of the chart on a plane, by Helm itself."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.chart.helm import CHART
from tests.chart.helm import run as run_helm
from tests.cluster.api import Object
from tests.cluster.plane import Plane, until

VALUES = Path(__file__).parent / "values.yaml"


@dataclass(frozen=True)
class Release:
    """One release; `values` are laid over `values.yaml`, which says what differs from production."""

    plane: Plane
    namespace: str
    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    helm: str = "helm4"

    def install(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`helm install`; never raises on an exit code."""
        return self.run("install", *self._chart(), *arguments)

    def upgrade(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`helm upgrade` with the same values, and what the arguments change of them."""
        return self.run("upgrade", *self._chart(), *arguments)

    def template(self) -> subprocess.CompletedProcess[str]:
        """`helm template`: what would be sent, hooks included."""
        return self.run("template", *self._chart())

    def uninstall(self) -> subprocess.CompletedProcess[str]:
        """`helm uninstall`, which waits until what it deletes is gone; fine where there is no such release."""
        return self.run("uninstall", self.name, "--wait", "--ignore-not-found")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Helm with the plane's kubeconfig and nothing of this machine's configuration."""
        kubeconfig, words = self.plane.kubeconfig, (*arguments, "--namespace", self.namespace)
        return run_helm(self.helm, *words, stdin="", kubeconfig=kubeconfig, timeout=600)

    @contextmanager
    def installed(self) -> Iterator[Release]:
        """The release during the block, and uninstalled after it.

        Raises:
            AssertionError: Helm refused, or could not uninstall; its words are in the message.
        """
        try:
            done = self.install()
            assert done.returncode == 0, done.stderr + done.stdout
            yield self
        finally:
            done = self.uninstall()
            assert done.returncode == 0, done.stderr + done.stdout

    @property
    def job(self) -> Object:
        """The Volcano Job."""
        return self.plane.api.get("jobs.batch.volcano.sh", self.name, self.namespace)

    @property
    def phase(self) -> str:
        """The Volcano Job's phase, `Running` or `Completed`; empty before it has one."""
        return str(self.job.get("status", {}).get("state", {}).get("phase", ""))

    @property
    def restarts(self) -> int:
        """How often Volcano has restarted the gang."""
        return int(self.job.get("status", {}).get("retryCount", 0))

    @property
    def pods(self) -> list[Object]:
        """The gang's pods by name."""
        labels = f"volcano.sh/job-name={self.name}"
        found = self.plane.api.list("pods", self.namespace, labels=labels)
        return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))

    @property
    def claims(self) -> list[Object]:
        """Karpenter's NodeClaims for this release."""
        labels = f"karpenter.sh/nodepool={self.name}.{self.namespace}"
        return self.plane.api.list("nodeclaims.karpenter.sh", labels=labels)

    def running(self) -> bool:
        """Whether every pod of the gang runs."""
        pods = self.pods
        wanted = int(self.job["spec"]["minAvailable"])
        return len(pods) == wanted and all(pod["status"].get("phase") == "Running" for pod in pods)

    def logs(self) -> str:
        """What all pods of the gang wrote so far, restarts included, in the order of their starts."""
        found = (self.plane.folder / "pods" / self.namespace).glob(f"{self.name}-node*/*.log")
        return "\n".join(file.read_text(errors="replace") for file in sorted(found, key=_age))

    def _chart(self) -> list[str]:
        file = self.plane.folder / f"values-{self.namespace}-{self.name}.yaml"
        file.write_text(yaml.safe_dump(dict(self.values)))
        return [self.name, str(CHART), "-f", str(VALUES), "-f", str(file)]


def everything(plane: Plane) -> set[str]:
    """Every object that the API server holds, as `resource namespace/name`, but events, leases and what is hidden."""
    api, found = plane.api, set()
    for group in ["", *(group["name"] for group in api.request("GET", "/apis")["groups"])]:
        version = api.request("GET", f"/apis/{group}") if group else {"preferredVersion": {"groupVersion": "v1"}}
        base = f"/apis/{version['preferredVersion']['groupVersion']}" if group else "/api/v1"
        for resource in api.request("GET", base)["resources"]:
            name = str(resource["name"])
            if "/" in name or "list" not in resource["verbs"] or name in ("events", "leases", "componentstatuses"):
                continue
            for item in api.request("GET", f"{base}/{name}")["items"]:
                metadata = item["metadata"]
                found.add(f"{name}.{group} {metadata.get('namespace', '')}/{metadata['name']}")
    return found


def before_a_release(plane: Plane) -> set[str]:
    """Everything that the API server holds, once what went with the releases before is gone: the collectors' work."""
    seen: list[set[str]] = [set(), set()]

    def settled() -> bool:
        seen.append(everything(plane))
        passing = ("nodeclaims.karpenter.sh", "podgroups.scheduling.volcano.sh", "pods.")
        return seen[-1] == seen[-2] and not any(name.startswith(passing) for name in seen[-1])

    until(settled, 120, "no run is left, and nothing changes")
    return seen[-1]


def until_gone(plane: Plane, before: set[str], seconds: float) -> None:
    """Wait until the API server holds exactly what it held `before`.

    Raises:
        AssertionError: it does not; the message names what is left and what is missing.
    """

    def same() -> bool:
        return everything(plane) == before

    with contextlib.suppress(TimeoutError):
        until(same, seconds, "everything is as it was")
    now = everything(plane)
    assert now == before, f"left behind: {sorted(now - before)}; missing: {sorted(before - now)}"


def seconds_since(begun: float) -> str:
    """For reports: the time since `begun` of time.monotonic()."""
    return f"{time.monotonic() - begun:.1f} s"


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl so far."""
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _age(file: Path) -> float:
    return file.stat().st_ctime
