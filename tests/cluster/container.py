"""A container as the kubelet holds it: started, signalled, looked at."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import Any

from entrypoint.demo.model import unpack_model
from entrypoint.model.final import let_read
from tests.cluster.api import Object
from tests.process import ROOT, scrubbed
from tests.servers.server import end_with_parent, tail

# What stands in for the image (Dockerfile): its environment, user and folder.
IMAGE_ENVIRONMENT = {
    "PATH": f"{ROOT}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/tmp",
    "USER": "trainer",
    "LANG": "C.UTF-8",
}
IMAGE_USER = 1000
IMAGE_DIRECTORY = "/tmp"

PID_FILE = "pid"  # in a container's folder: its process number 1
MESSAGE_BYTES, MESSAGE_LINES = 2048, 80  # what a kubelet takes of a log as termination message


def image() -> dict[str, str]:
    """And its files, read-only in the container: where they lie on this machine, by where they are seen."""
    here = {folder: folder for folder in (str(ROOT), sys.base_prefix)}
    return here | {"/opt/demo/traces": str(ROOT / "entrypoint/demo/traces"), "/opt/demo/model": str(unpack_model())}


def prepare_image() -> None:
    """Make the demo's model, and compile what the image has compiled: no pod may write beside the modules."""
    let_read(unpack_model())  # to the pods' user too, whoever made it
    package = find_spec("trl")  # no test of this folder imports it by itself
    if package and package.origin and not Path(cache_from_source(package.origin)).exists():
        environment = scrubbed({"PYTHONDONTWRITEBYTECODE": None})
        subprocess.run([sys.executable, "-c", "import entrypoint.run"], env=environment, check=True)


@dataclass(frozen=True)
class Mount:
    """A file or folder of this machine and where the container sees it."""

    source: Path
    target: str
    read_only: bool


@dataclass
class Container:
    """One container of one pod; `spec` is the pod's entry for it, `log` what it wrote, over all of its starts."""

    spec: Object
    folder: Path
    log: Path
    restarts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _started: str = ""
    _ended: str = field(default="", init=False)

    def start(self, sandbox: int, pod: Object, environment: Mapping[str, str], mounts: Sequence[Mount]) -> None:
        """Start it, in the namespaces of the process `sandbox`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        message = self.folder / "message"
        message.write_text("")
        message.chmod(0o666)
        target = self.spec.get("terminationMessagePath", "/dev/termination-log")
        own = {
            "sandbox": sandbox,
            "scratch": str(self.folder / "root"),
            "pid_file": str(self._pid_file),
            "image": image(),
            "mounts": [
                {"source": str(mount.source), "target": mount.target, "read_only": mount.read_only}
                for mount in [*mounts, Mount(message, target, read_only=False)]
            ],
            "command": [*self.spec.get("command", []), *self.spec.get("args", [])],
            "environment": dict(environment),
            "directory": self.spec.get("workingDir", IMAGE_DIRECTORY),
            **identity(pod, self.spec),
        }
        self._pid_file.unlink(missing_ok=True)
        file = self.folder / "spec.json"
        file.write_text(json.dumps(own))
        with self.log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(ROOT / "tests/cluster/enter.py"), str(file)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self._started, self._ended = now(), ""

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs or was never started."""
        if self._process is None or self._process.poll() is None:
            return None
        self._ended = self._ended or now()
        return self._process.returncode

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self.code is None

    def signal(self, number: int) -> bool:
        """Send a signal to its first process, which for SIGKILL takes all others along; False: it has none yet."""
        with contextlib.suppress(FileNotFoundError):
            if self.running:
                process = int(self._pid_file.read_text())
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
            return True
        return False

    def status(self) -> Object:
        """Its entry in the pod's status."""
        state: Object = {"waiting": {"reason": "ContainerCreating"}}
        if self._process is not None:
            state = {"running": {"startedAt": self._started}}
        if self.code is not None:
            reason = "Completed" if self.code == 0 else "Error"
            times = {"startedAt": self._started, "finishedAt": self._ended}
            state = {"terminated": {"exitCode": self.code, "reason": reason, "message": self._message(), **times}}
        return {
            "name": self.spec["name"],
            "image": self.spec["image"],
            "imageID": "",
            "restartCount": self.restarts,
            "ready": self.running,
            "started": self.running,
            "state": state,
        }

    @property
    def _pid_file(self) -> Path:
        return self.folder / PID_FILE

    def _message(self) -> str:
        own = (self.folder / "message").read_text(errors="replace")[-MESSAGE_BYTES:]
        if own or self.code == 0 or self.spec.get("terminationMessagePolicy") != "FallbackToLogsOnError":
            return own
        return "\n".join(tail(self.log, MESSAGE_LINES))[-MESSAGE_BYTES:]


def identity(pod: Object, container: Object) -> dict[str, Any]:
    """Whom the container runs as and what it may do: the pod's security context under the container's own."""
    context = {**pod["spec"].get("securityContext", {}), **container.get("securityContext", {})}
    group = context.get("runAsGroup", 0)
    return {
        "user": context.get("runAsUser", IMAGE_USER),
        "group": group,
        "groups": [*context.get("supplementalGroups", []), *([context["fsGroup"]] if "fsGroup" in context else [])],
        "read_only_root": context.get("readOnlyRootFilesystem", False),
        "no_new_privileges": context.get("allowPrivilegeEscalation") is False,
    }


def now() -> str:
    """The time as the API writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
