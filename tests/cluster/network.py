"""A bridge of this machine's own with a namespace for each pod on it, and relays from it to servers on loopback.

Nothing is routed: a pod reaches the other pods and what is relayed, and no name or address outside of this machine.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.servers.server import end_with_parent

NETWORKS = range(32)  # 10.77.N.0/24
PORTS, PORTS_EACH = 20000, 64  # below those that kernels deal out by themselves


@dataclass
class Network:
    """One bridge; `gateway` is this machine's address on it."""

    number: int
    _taken: set[str] = field(default_factory=set)
    _turn: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def bridge(self) -> str:
        """The bridge's interface."""
        return f"plane{self.number}"

    @property
    def gateway(self) -> str:
        """This machine's address as pods see it."""
        return f"10.77.{self.number}.1"

    def ports(self, *names: str) -> dict[str, int]:
        """Loopback's ports for the programs of this network, by name: from a block that no other network looks at."""
        block = range(PORTS + PORTS_EACH * self.number, PORTS + PORTS_EACH * (self.number + 1))
        free = (port for port in block if _is_free(port))
        return dict(zip(names, free, strict=False))

    @contextlib.contextmanager
    def address(self, first: int = 10) -> Iterator[str]:
        """An address that nobody else in this process has, from the `first`-th on; free again after the block."""
        with self._lock:
            hosts = [str(host) for host in ipaddress.ip_network(f"10.77.{self.number}.0/24").hosts()][first:]
            turned = hosts[self._turn % len(hosts) :] + hosts[: self._turn % len(hosts)]
            address = next(host for host in turned if host not in self._taken)
            self._turn += 1  # not the one that was given back last: somebody may still talk to it
            self._taken.add(address)
        try:
            yield address
        finally:
            self._taken.discard(address)

    @contextlib.contextmanager
    def sandbox(self, address: str, hostname: str) -> Iterator[int]:
        """Network, host name and IPC namespaces with one interface on the bridge; yields a process that lives in them.

        They vanish with that process, which ends with the block or with this process, however it ends.
        """
        holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "--ipc", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        outer = self._link(address)
        try:
            _until_unshared(holder.pid)
            _ip(
                f"link add {outer} type veth peer name eth0 netns {holder.pid}",
                f"link set {outer} master {self.bridge} up",
            )
            inside = ["nsenter", "--target", str(holder.pid), "--net", "--uts"]
            _ip("link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up", inside=inside)
            subprocess.run([*inside, "hostname", hostname], check=True)
            yield holder.pid
        finally:
            # Now, and not when the kernel finds that the namespace has nobody left: the name is used again.
            subprocess.run(["ip", "link", "del", outer], stderr=subprocess.DEVNULL, check=False)
            holder.kill()
            holder.wait()

    def cut(self, address: str) -> None:
        """Nothing gets in or out of the sandbox of an address any more, not even its kernel's goodbyes."""
        _ip(f"link set {self._link(address)} down")

    def _link(self, address: str) -> str:
        return f"{self.bridge}-{address.rpartition('.')[2]}"

    @contextlib.contextmanager
    def relay(self, port: int) -> Iterator[str]:
        """Connections to `gateway:port` go to loopback's port of the same number; yields `gateway:port`."""
        with socket.create_server((self.gateway, port), backlog=128) as server:
            threading.Thread(target=_accept, args=(server, port), daemon=True).start()
            try:
                yield f"{self.gateway}:{port}"
            finally:
                server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts


@contextlib.contextmanager
def new_network() -> Iterator[Network]:
    """A bridge with the first free number; a dead process's left-over is taken over.

    Raises:
        RuntimeError: no number is free.
    """
    for number in NETWORKS:
        with contextlib.ExitStack() as stack:
            claim = stack.enter_context(socket.socket(socket.AF_UNIX))
            try:
                claim.bind(f"\0plane-network-{number}")  # the kernel forgets it with this process
            except OSError:
                continue
            network = Network(number)
            subprocess.run(["ip", "link", "del", network.bridge], stderr=subprocess.DEVNULL, check=False)
            _ip(
                f"link add {network.bridge} type bridge",
                f"addr add {network.gateway}/24 dev {network.bridge}",
                f"link set {network.bridge} up",
            )
            stack.callback(_ip, f"link del {network.bridge}")
            yield network
            return
    raise RuntimeError(f"all {len(NETWORKS)} networks are in use: end a plane first (make cluster-down)")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what waits for its last packets is free
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


def _until_unshared(pid: int) -> None:
    deadline = time.monotonic() + 60
    while os.readlink(f"/proc/{pid}/ns/ipc") == os.readlink("/proc/self/ns/ipc") or _comm(pid) != "sleep":
        if time.monotonic() > deadline:
            raise RuntimeError(f"unshare (process {pid}) made no namespaces within 60 s")
        time.sleep(0.005)


def _comm(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip()


def _ip(*commands: str, inside: list[str] | None = None) -> None:
    batch = "\n".join(commands)
    subprocess.run([*(inside or []), "ip", "-batch", "-"], input=batch, text=True, check=True)


def _accept(server: socket.socket, port: int) -> None:
    while True:
        try:
            near, _ = server.accept()
        except OSError:
            return  # closed
        try:
            far = socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:
            near.close()
            continue
        far.settimeout(None)
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)  # the other direction may still have something to say
