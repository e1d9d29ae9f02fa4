"""Topology: how many ranks this node starts and where all of them meet, read from the environment without torch."""

from __future__ import annotations

import ctypes
import random
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from entrypoint.errors import ConfigError

DEFAULT_PORT = 29500  # torch's own; several nodes can't look for a free port together
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Topology:
    """One node's place among all ranks; every node starts equally many."""

    nodes: int
    node_rank: int
    local_ranks: int
    address: str
    port: int

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.local_ranks

    def environ(self, local_rank: int) -> dict[str, str]:
        """The variables that torch.distributed reads, for one rank of this node."""
        return {
            "RANK": str(self.node_rank * self.local_ranks + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_ranks),
            "NNODES": str(self.nodes),
            "NODE_RANK": str(self.node_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def read_topology(environ: Mapping[str, str]) -> Topology:
    """Read LOCAL_WORLD_SIZE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: one of them is no number in its range, or several nodes lack what they need to meet.
    """
    nodes = read_number(environ, "NNODES", default=1, minimum=1)
    if nodes > 1:
        for name, meaning in (("MASTER_ADDR", "the host name of node 0"), ("NODE_RANK", "this node's number from 0")):
            if not environ.get(name):
                raise ConfigError(f"environment: NNODES={nodes} needs {name}, which is not set; set it to {meaning}")
    node_rank = read_number(environ, "NODE_RANK", default=0, minimum=0)
    if node_rank >= nodes:
        raise ConfigError(f"environment: NODE_RANK={node_rank} must be below NNODES={nodes}; nodes count from 0")
    local_ranks = read_number(environ, "LOCAL_WORLD_SIZE", default=0, minimum=1)
    port = read_number(environ, "MASTER_PORT", default=DEFAULT_PORT if nodes > 1 else 0, minimum=1, maximum=65535)
    return Topology(
        nodes=nodes,
        node_rank=node_rank,
        local_ranks=local_ranks or cuda_devices(environ) or 1,
        address=environ.get("MASTER_ADDR") or LOOPBACK,
        port=port or free_port(),
    )


def cuda_devices(environ: Mapping[str, str]) -> int:
    """CUDA devices that a rank started with `environ` can use: the driver's, narrowed by CUDA_VISIBLE_DEVICES."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _driver_devices()
    named = visible_devices(visible)
    return named if named and _driver_devices() else 0


def visible_devices(visible: str) -> int:
    """Entries of a CUDA_VISIBLE_DEVICES value up to the first invalid one, as CUDA counts them."""
    count = 0
    for entry in visible.split(","):
        if not entry.strip() or entry.strip().startswith("-"):
            break
        count += 1
    return count


def free_port() -> int:
    """A free port below the kernel's range for outgoing connections, which could take it before rank 0 listens."""
    try:
        below = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        below = 32768
    low = 10000
    for _ in range(100 if below > low + 100 else 0):
        port = random.SystemRandom().randrange(low, below)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def read_number(
    environ: Mapping[str, str], name: str, *, default: int, minimum: int, maximum: int | None = None
) -> int:
    """A whole number from the environment; `default` where it is not set.

    Raises:
        ConfigError: it is none, or out of its bounds.
    """
    text = environ.get(name, "").strip()
    if not text:
        return default
    bounds = f"from {minimum} to {maximum}" if maximum is not None else f"of at least {minimum}"
    if not re.fullmatch("-?[0-9]+", text):
        raise ConfigError(f"environment: {name}={text!r} must be an integer {bounds}; correct or unset it")
    number = int(text)
    if number < minimum or (maximum is not None and number > maximum):
        raise ConfigError(f"environment: {name}={number} must be an integer {bounds}; correct or unset it")
    return number


def _driver_devices() -> int:
    """Devices that NVML counts, as torch does before CUDA is initialised; 0 without a driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        count = ctypes.c_uint(0)
        if nvml.nvmlInit_v2() != 0:
            return 0
        try:
            return count.value if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0 else 0
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return 0
