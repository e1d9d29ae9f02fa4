"""The names of pods, one hosts file a namespace: what cluster DNS answers for a headless Service."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.api import Object


class Hosts:
    """Files that are mounted as /etc/hosts, so they are rewritten in place as pods come and go."""

    def __init__(self, folder: Path, api_server: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._fixed = ["127.0.0.1 localhost", f"{api_server} kubernetes.default.svc kubernetes.default kubernetes"]
        self._pods: dict[str, tuple[str, list[str]]] = {}  # address: (namespace, names)
        self._lock = threading.Lock()
        self.no_servers = folder / "resolv.conf"  # a name that stands in no hosts file fails at once
        self.no_servers.write_text("")

    def file(self, namespace: str) -> Path:
        """What the pods of `namespace` read."""
        return self._folder / namespace

    @contextlib.contextmanager
    def named(self, pod: Object, address: str) -> Iterator[None]:
        """During the block the pod's names lead to its address."""
        namespace, spec = pod["metadata"]["namespace"], pod["spec"]
        hostname = spec.get("hostname", pod["metadata"]["name"])
        names = [hostname]
        if "subdomain" in spec:
            service = f"{hostname}.{spec['subdomain']}"
            names = [
                f"{service}.{namespace}.svc.cluster.local",
                f"{service}.{namespace}.svc",
                f"{service}.{namespace}",
                service,
                *names,
            ]
        with self._lock:
            self._pods[address] = (namespace, names)
            self._write(namespace)
        try:
            yield
        finally:
            with self._lock:
                del self._pods[address]
                self._write(namespace)

    def _write(self, namespace: str) -> None:
        lines = [f"{address} {' '.join(names)}" for address, (place, names) in self._pods.items() if place == namespace]
        file = self.file(namespace)
        file.touch()
        with file.open("r+") as open_file:
            open_file.write("\n".join([*self._fixed, *lines, ""]))
            open_file.truncate()
