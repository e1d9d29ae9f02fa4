"""Releases of the chart on a plane, by Helm itself."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.chart.helm import CHART, environment, template, tool
from tests.chart.helm import run as run_helm
from tests.cluster.api import Object
from tests.cluster.events import what_happened
from tests.cluster.plane import Plane, until
from tests.cluster.pod import log_folder

VALUES = Path(__file__).parent / "values.yaml"
ONGOING = ("", "Pending", "Running", "Completing", "Restarting")  # phases of a Job on its way


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
        return self.run("install", self.name, str(CHART), *self._values(), *arguments)

    def install_interrupted(self, moment: Callable[[], object]) -> int:
        """`helm install`, and Ctrl-C at a moment; its exit code."""
        words = ["install", self.name, str(CHART), *self._values(), "--namespace", self.namespace]
        with subprocess.Popen([tool(self.helm), *words], env=environment(self.plane.kubeconfig)) as helm:
            try:
                until(moment, 60, "the moment to interrupt Helm")
                helm.send_signal(signal.SIGINT)
                return helm.wait(60)
            finally:
                helm.kill()

    def upgrade(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`helm upgrade` with the same values, and what the arguments change of them."""
        return self.run("upgrade", self.name, str(CHART), *self._values(), *arguments)

    def objects(self) -> list[Object]:
        """What would be sent, hooks included."""
        return template(self.helm, *self._values(), "--namespace", self.namespace, name=self.name)

    def uninstall(self) -> subprocess.CompletedProcess[str]:
        """`helm uninstall`, which waits until what it deletes is gone; fine where there is no such release."""
        return self.run("uninstall", self.name, "--wait", "--ignore-not-found")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Helm with the plane's kubeconfig and nothing of this machine's configuration."""
        kubeconfig, words = self.plane.kubeconfig, (*arguments, "--namespace", self.namespace)
        return run_helm(self.helm, *words, stdin="", kubeconfig=kubeconfig, timeout=600)

    @contextmanager
    def installed(self) -> Iterator[Release]:
        """The release during the block, and uninstalled after it; before that a failed block prints what happened.

        Raises:
            AssertionError: Helm refused, or could not uninstall; its words are in the message.
        """
        try:
            done = self.install()
            assert done.returncode == 0, done.stderr + done.stdout
            yield self
        except Exception:
            print(what_happened(self.plane))
            raise
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

    def log(self, pod: Object) -> str:
        """What a pod of the gang has written so far."""
        file = log_folder(self.plane.folder, pod) / "trainer.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def _values(self) -> list[str]:
        file = self.plane.folder / f"values-{self.namespace}-{self.name}.yaml"
        file.write_text(yaml.safe_dump(dict(self.values)))
        return ["-f", str(VALUES), "-f", str(file)]


def until_completed(release: Release, seconds: float) -> None:
    """Wait for the end of the Job, a good one."""
    until(lambda: release.phase not in ONGOING, seconds, f"the run {release.name} ends")
    assert release.phase == "Completed", release.logs()


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
