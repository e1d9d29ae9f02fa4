"""An HTTP proxy that breaks requests by plan and forwards the rest: what a status code, or half an answer, does.

It forwards each request with the Host that the client signed, so signatures hold. A plan sees the requests in the
order in which they arrive, so it is deterministic for a client that asks one at a time.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ERRORS = {"500": "InternalError", "503": "SlowDown", "429": "TooManyRequests"}
# reset: before the server hears of it; lost: after the server has done it; half: of the answer's body, or of its head.
FAULTS = (*ERRORS, "reset", "lost", "half", "slow")
HOLE = "hole"  # no answer, ever; costs the client its time-out
HOP = {"connection", "keep-alive", "transfer-encoding", "date", "server"}
SLOW = 0.05  # seconds before the answer, and again in the middle of it

Plan = Callable[[int, str, str], str | None]


def every(number: int, faults: Sequence[str] = FAULTS) -> Plan:
    """Every `number`th request, each fault in turn."""
    return lambda n, method, path: faults[n // number % len(faults)] if n % number == number - 1 else None


def at_random(seed: int, share: float, faults: Sequence[str] = FAULTS) -> Plan:
    """A share of the requests, whichever `seed` and the request's number choose."""

    def plan(n: int, method: str, path: str) -> str | None:
        dice = random.Random(f"{seed}/{n}")
        return dice.choice(faults) if dice.random() < share else None

    return plan


@dataclass
class FaultProxy:
    """A running proxy; `plan` can be changed at any time, `injected` counts the faults by kind."""

    endpoint_url: str
    plan: Plan | None = None
    injected: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def next_fault(self, method: str, path: str) -> str | None:
        with self.lock:
            fault = self.plan(self.requests, method, path) if self.plan else None
            self.requests += 1
            if fault:
                self.injected[fault] += 1
            return fault


@contextlib.contextmanager
def fault_proxy(upstream: str, plan: Plan | None = None) -> Iterator[FaultProxy]:
    """A proxy on a free loopback port in front of the server at `upstream`, http://host:port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    proxy = FaultProxy(f"http://127.0.0.1:{server.server_port}", plan)
    server.proxy, server.upstream = proxy, upstream.removeprefix("http://")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that gave up
            super().handle()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy: FaultProxy = self.server.proxy  # type: ignore[attr-defined]
        fault = proxy.next_fault(self.command, self.path)
        if fault in ERRORS:
            text = f"<Error><Code>{ERRORS[fault]}</Code><Message>by plan</Message></Error>".encode()
            self.give(int(fault), [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))], text)
            return
        if fault == HOLE:
            self.connection.settimeout(0.05)
            while not proxy.closing.is_set():
                with contextlib.suppress(TimeoutError):
                    if not self.connection.recv(1):
                        break
            self.close_connection = True
            return
        if fault == "reset":
            self.reset()
            return
        status, headers, content = self.forward(body)
        if fault == "lost":
            self.reset()
        elif fault == "half":
            self.give(status, headers, content[: len(content) // 2], whole=bool(content))
            self.reset()
        else:
            if fault == "slow":
                time.sleep(SLOW)
            self.give(status, headers, content, pause=SLOW if fault == "slow" else 0.0)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

    def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The server's answer: status, headers, body."""
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)  # type: ignore[attr-defined]
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):  # Expect was answered here
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP]
            if not any(name.lower() == "content-length" for name, _ in headers):
                headers.append(("Content-Length", str(len(content))))
            return response.status, headers, content
        finally:
            connection.close()

    def give(
        self, status: int, headers: list[tuple[str, str]], content: bytes, *, whole: bool = True, pause: float = 0.0
    ) -> None:
        """Send an answer; not `whole`: half of its head, and nothing after it."""
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not whole:
            self._headers_buffer = [b"".join(self._headers_buffer)[:20]]  # type: ignore[has-type]
            self.flush_headers()
            self.wfile.flush()
            return
        self.end_headers()
        if self.command != "HEAD":
            middle = len(content) // 2
            self.wfile.write(content[:middle])
            if pause:
                self.wfile.flush()
                time.sleep(pause)
            self.wfile.write(content[middle:])
        self.wfile.flush()

    def reset(self) -> None:
        """End the connection as a router that lost its state does."""
        self.close_connection = True
        # Without SO_LINGER the kernel would say goodbye in order (FIN); so it sends RST and drops what is unsent.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()
