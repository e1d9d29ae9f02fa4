"""The probe at the start: whether `checkpoint.path` is one folder that all ranks see."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from pathlib import Path

from entrypoint.errors import ConfigError
from entrypoint.world import World

PROBE = ".probe-"


def check_shared(folder: Path, world: World) -> None:
    """Each rank reads what rank 0 wrote, and rank 0 what each rank wrote; every rank comes.

    The names are new each time: no file system has remembered that they are missing.

    Raises:
        ConfigError: a rank sees another folder, or can't write there; on every rank.
    """
    if world.size == 1:
        return
    said = world.once(lambda: _begin(folder))
    probe = folder / said["name"]
    world.each(lambda: _answer(probe, world.rank, said["host"]))
    world.once(lambda: _finish(probe, world.size))


def _begin(folder: Path) -> dict[str, str]:
    for old in folder.glob(f"{PROBE}*"):  # of a start that was killed
        shutil.rmtree(old, ignore_errors=True)
    name = f"{PROBE}{secrets.token_hex(8)}"
    try:
        (folder / name).mkdir()
        (folder / name / "0").write_text(name)
    except OSError as error:
        raise ConfigError(f"checkpoint.path: {folder} can't be written ({error.strerror})") from error
    return {"name": name, "host": socket.gethostname()}


def _answer(probe: Path, rank: int, host: str) -> None:
    try:
        seen = (probe / "0").read_text()
        if rank:
            (probe / str(rank)).write_text(probe.name)
    except FileNotFoundError:
        seen = ""
    except OSError as error:
        raise ConfigError(
            f"checkpoint.path: rank {rank} on {socket.gethostname()}, user {os.getuid()}, can't write to "
            f"{probe.parent} ({error.strerror})"
        ) from error
    if seen != probe.name:
        raise ConfigError(
            f"checkpoint.path: rank {rank} on {socket.gethostname()} does not see in {probe.parent} what rank 0 on "
            f"{host} wrote there; expected one folder that all ranks see: name a file system that every node mounts"
        )


def _finish(probe: Path, size: int) -> None:
    seen = [rank for rank in range(size) if _is_there(probe / str(rank), probe.name)]
    shutil.rmtree(probe, ignore_errors=True)
    if lacking := sorted({*range(size)} - {*seen}):
        raise ConfigError(
            f"checkpoint.path: rank 0 does not see in {probe.parent} what rank {lacking[0]} wrote there; expected one "
            "folder that all ranks see: name a file system that every node mounts"
        )


def _is_there(path: Path, content: str) -> bool:
    try:
        return path.read_text() == content
    except OSError:
        return False
