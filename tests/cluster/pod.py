"""One pod from its binding to its end, in a thread of its own."""

from __future__ import annotations

import base64
import http.client
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from tests.cluster.api import Api, ApiError, Object
from tests.cluster.container import IMAGE_ENVIRONMENT, PID_FILE, Container, Mount, now
from tests.cluster.environment import environment, expand
from tests.cluster.hosts import Hosts
from tests.cluster.network import Network
from tests.cluster.volumes import Volumes

POLL = 0.05  # seconds between two looks at the processes
RESTART_DELAY = 5.0  # a kubelet's first back-off is 10
AGAIN = 0.5  # seconds until the API server is told once more what it did not take


@dataclass(frozen=True)
class Machine:
    """What all pods share: the API, the network with its names, where volumes and logs lie."""

    api: Api
    network: Network
    hosts: Hosts
    folder: Path
    cluster: Mapping[str, str]  # environment that every container gets of its cluster


class Stopped(Exception):
    """The pod is to end before it has begun."""


class Pod(threading.Thread):
    """Runs one pod that was bound to a node of ours, tells the API server about it, and ends with it."""

    def __init__(self, machine: Machine, pod: Object) -> None:
        super().__init__(name=pod["metadata"]["name"], daemon=True)
        self.machine, self.pod = machine, pod
        self.namespace = pod["metadata"]["namespace"]
        self.node = pod["spec"]["nodeName"]
        self._folder = _folder(machine.folder, pod)
        self._inits = self._containers("initContainers")
        self._mains = self._containers("containers")
        self._start_time = now()
        self._address = ""
        self._deadline: float | None = None  # when what still runs is killed
        self._silent = False  # the machine is dead: nothing is reported any more

    def stop(self, grace: float) -> None:
        """SIGTERM now, SIGKILL after `grace` seconds; a later call may only make it sooner."""
        deadline = time.monotonic() + grace
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def kill(self) -> None:
        """What happens to a pod whose machine is gone: no signal, no word."""
        self._silent = True
        self.stop(0)

    def run(self) -> None:
        """Until the pod has ended and, where it was deleted, is gone."""
        spec, network = self.pod["spec"], self.machine.network
        hostname = spec.get("hostname", self.name)
        try:
            with (
                network.address() as self._address,
                self.machine.hosts.named(self.pod, self._address),
                network.sandbox(self._address, hostname) as sandbox,
            ):
                try:
                    self._live(sandbox)
                finally:
                    _signal([*self._inits, *self._mains], signal.SIGKILL)  # after an error some may be left
                    self._volumes().release()
        except Stopped:
            self._report("Failed")
        except Exception as error:  # a pod that this kubelet can't run must not look as if it ran
            print(f"{self.namespace}/{self.name} can't be run: {error!r}", flush=True)
            self._report("Failed", reason="KubeletError", message=f"{type(error).__name__}: {error}")
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        while self._deadline is None:
            time.sleep(POLL)  # an ended pod stays until somebody deletes it
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.pod["metadata"]["uid"]}}
        self._tell(partial(self.machine.api.delete, "pods", self.name, self.namespace, **options))

    def _live(self, sandbox: int) -> None:
        self._report("Pending")
        folders = self._volumes().prepare()
        for container in self._inits:
            self._start(container, sandbox, folders)
            self._report("Pending")
            self._until_ended([container], sandbox, folders)
            if container.code:
                self._report("Failed")
                return
        for container in self._mains:
            self._start(container, sandbox, folders)
        self._report("Running")
        self._until_ended(self._mains, sandbox, folders)
        codes = {container.spec["name"]: container.code for container in self._mains}
        if not self._silent:
            print(f"{self.namespace}/{self.name} ended: {codes}", flush=True)
        self._report("Failed" if any(codes.values()) else "Succeeded")

    def _start(self, container: Container, sandbox: int, folders: Mapping[str, Path]) -> None:
        if self._deadline is not None:
            raise Stopped
        base = {**IMAGE_ENVIRONMENT, "HOSTNAME": self.pod["spec"].get("hostname", self.name), **self.machine.cluster}
        variables = environment(self.pod, container.spec, self._address, base, self._data)
        mounts = [self._mount(mount, folders, variables) for mount in container.spec.get("volumeMounts", [])]
        mounts.append(Mount(self.machine.hosts.file(self.namespace), "/etc/hosts", read_only=True))
        mounts.append(Mount(self.machine.hosts.no_servers, "/etc/resolv.conf", read_only=True))
        words = {
            name: [expand(word, variables) for word in container.spec.get(name, [])] for name in ("command", "args")
        }
        container.spec = {**container.spec, **words}
        container.start(sandbox, self.pod, variables, mounts)

    def _mount(self, mount: Object, folders: Mapping[str, Path], variables: Mapping[str, str]) -> Mount:
        source = folders[mount["name"]]
        below = mount.get("subPath") or expand(mount.get("subPathExpr", ""), variables)
        if below:
            source = source / below
            if not source.exists():
                source.mkdir(parents=True)
        return Mount(source, mount["mountPath"], mount.get("readOnly", False))

    def _until_ended(self, containers: list[Container], sandbox: int, folders: Mapping[str, Path]) -> None:
        told = False
        again: dict[str, float] = {}  # when a container that ended is started again
        while True:
            if self._deadline is not None:
                if not told:
                    told = self._silent or _signal(containers, signal.SIGTERM)
                if time.monotonic() >= self._deadline:
                    if self._silent:
                        self.machine.network.cut(self._address)  # first: a dead machine closes no connection
                    _signal(containers, signal.SIGKILL)
            for container in containers if self._deadline is None else []:
                name = container.spec["name"]
                if self._restarts(container) and time.monotonic() >= again.setdefault(
                    name, time.monotonic() + RESTART_DELAY
                ):
                    del again[name]
                    container.restarts += 1
                    self._start(container, sandbox, folders)
                    self._report("Running")
            stopping = self._deadline is not None
            if all(c.code is not None and (stopping or not self._restarts(c)) for c in containers):
                return
            time.sleep(POLL)

    def _restarts(self, container: Container) -> bool:
        policy = self.pod["spec"].get("restartPolicy", "Always")
        return container.code is not None and (policy == "Always" or (policy == "OnFailure" and container.code != 0))

    def _report(self, phase: str, *, reason: str = "", message: str = "") -> None:
        ready = "True" if phase == "Running" else "False"
        initialized = "True" if all(container.code == 0 for container in self._inits) else "False"
        conditions = {"Initialized": initialized, "ContainersReady": ready, "Ready": ready}
        status = {
            "phase": phase,
            "hostIP": self.machine.network.gateway,
            "podIP": self._address,
            "podIPs": [{"ip": self._address}] if self._address else [],
            "startTime": self._start_time,
            "initContainerStatuses": [container.status() for container in self._inits],
            "containerStatuses": [container.status() for container in self._mains],
            "conditions": [
                {"type": kind, "status": value, "lastTransitionTime": now()} for kind, value in conditions.items()
            ],
            "reason": reason or None,
            "message": message or None,
        }
        body = {"metadata": {"uid": self.pod["metadata"]["uid"]}, "status": status}
        patch = partial(self.machine.api.patch, sub="status", strategic=True)
        self._tell(partial(patch, "pods", self.name, body, self.namespace))

    def _tell(self, call: Callable[[], object]) -> None:
        """Once the API server takes it: one that is busy, or away, is told again; nothing where the machine died."""
        while not self._silent:
            try:
                call()
                return
            except (ApiError, OSError, http.client.HTTPException) as error:
                if isinstance(error, ApiError) and error.status < 500:
                    if error.status in (404, 409):  # gone, or another pod of that name
                        return
                    raise
                print(f"{self.namespace}/{self.name}: {error!r}; told again", flush=True)
                time.sleep(AGAIN)

    def _containers(self, kind: str) -> list[Container]:
        logs = log_folder(self.machine.folder, self.pod)
        return [
            Container(spec, self._folder / spec["name"], logs / f"{spec['name']}.log")
            for spec in self.pod["spec"].get(kind, [])
        ]

    def _volumes(self) -> Volumes:
        claims = self.machine.folder / "volumes"
        return Volumes(self.machine.api, self.pod, self._folder / "volumes", claims, self._address, self._data)

    def _data(self, kind: str, name: str, optional: bool) -> Mapping[str, bytes]:
        """A ConfigMap's or Secret's content; where it is not there yet it is waited for, as a kubelet does."""
        while True:
            found = self.machine.api.find(kind, name, self.namespace)
            if found is not None or optional:
                break
            if self._deadline is not None:
                raise Stopped
            time.sleep(0.2)
        data = (found or {}).get("data", {})
        return {key: base64.b64decode(text) if kind == "secrets" else text.encode() for key, text in data.items()}


def log_folder(plane: Path, pod: Object) -> Path:
    """Where the logs of a pod's containers lie; they stay when the pod has gone. `plane` is the plane's folder."""
    metadata = pod["metadata"]
    return plane / f"pods/{metadata['namespace']}/{metadata['name']}-{metadata['uid'][:8]}"


def first_process(plane: Path, pod: Object, container: str) -> psutil.Process | None:
    """Process number 1 of a container as this machine sees it; None where there is none. `plane` is its folder."""
    with suppress(OSError, ValueError, psutil.Error):
        return psutil.Process(int((_folder(plane, pod) / container / PID_FILE).read_text()))
    return None


def _folder(plane: Path, pod: Object) -> Path:
    return plane / "run" / str(pod["metadata"]["uid"])


def _signal(containers: list[Container], number: int) -> bool:
    """Whether each of those that run has got it."""
    got = [container.signal(number) for container in containers]
    return all(got)
