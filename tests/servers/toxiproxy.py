"""toxiproxy: a TCP proxy that makes a real connection slow, short or dead while bytes are on their way."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoint.launch.topology import free_port
from tests.servers.s3 import ROOT
from tests.servers.server import serve


@dataclass(frozen=True)
class Toxiproxy:
    """A running proxy in front of one server."""

    endpoint_url: str
    api: str

    @contextlib.contextmanager
    def toxic(self, kind: str, *, stream: str = "downstream", **attributes: int) -> Iterator[None]:
        """One of toxiproxy's toxics (latency, bandwidth, timeout, reset_peer, limit_data…) for the block."""
        body = {"name": kind, "type": kind, "stream": stream, "attributes": attributes}
        _ask("POST", f"{self.api}/proxies/s3/toxics", body)
        try:
            yield
        finally:
            _ask("DELETE", f"{self.api}/proxies/s3/toxics/{kind}")

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Nobody listens while the block lasts."""
        _ask("POST", f"{self.api}/proxies/s3", {"enabled": False})
        try:
            yield
        finally:
            self.enable()

    def enable(self) -> None:
        """Listen again."""
        _ask("POST", f"{self.api}/proxies/s3", {"enabled": True})


@contextlib.contextmanager
def toxiproxy(folder: Path, upstream: str) -> Iterator[Toxiproxy]:
    """Start toxiproxy on free loopback ports in front of the server at `upstream`, http://host:port."""
    binary = subprocess.run(
        [ROOT / ".ci/tools/build", "toxiproxy"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    port, listen = free_port(), free_port()
    api = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            _ask("GET", f"{api}/version")
            return True
        except OSError:
            return False

    command = [binary, "-host", "127.0.0.1", "-port", str(port)]
    with serve(command, env={"PATH": os.environ["PATH"]}, log=folder / "toxiproxy.log", ready=ready, timeout=30):
        proxy = {"name": "s3", "listen": f"127.0.0.1:{listen}", "upstream": upstream.removeprefix("http://")}
        _ask("POST", f"{api}/proxies", {**proxy, "enabled": True})
        yield Toxiproxy(f"http://127.0.0.1:{listen}", api)


def _ask(method: str, url: str, body: Any = None) -> None:
    data = None if body is None else json.dumps(body).encode()
    # toxiproxy refuses what looks like a browser (Mozilla…): urllib doesn't.
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=5) as answer:
        answer.read()
