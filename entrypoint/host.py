"""The memory of this machine, or of this container where it has less, in bytes."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own


def total() -> int:
    """What all processes here may have together."""
    limit, machine = _limit(), proc_bytes("meminfo", "MemTotal")
    return machine if limit is None else min(machine, limit)


def available() -> int:
    """What can still be given."""
    found = proc_bytes("meminfo", "MemAvailable")
    limit = _limit()
    if limit is None:
        return found
    # Pages of files that are only read, such as the model and the traces, are given back when they are needed.
    cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines()).get("inactive_file", "0")
    return min(found, limit - int((CGROUP / "memory.current").read_text()) + int(cached))


def ranks_here() -> int:
    """Ranks that share it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def proc_bytes(file: str, name: str) -> int:
    """Bytes of a line of a file in /proc, `name: … kB`."""
    lines = dict(line.split(":", 1) for line in Path("/proc", file).read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _limit() -> int | None:
    limit = CGROUP / "memory.max"
    text = limit.read_text().strip() if limit.exists() else "max"
    return None if text == "max" else int(text)
