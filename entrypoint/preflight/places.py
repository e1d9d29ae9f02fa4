"""Where the run writes: checkpoints, their mirror and the output, each tried by writing there and reading it back."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from entrypoint.conf import Run
from entrypoint.config import fingerprint_keys
from entrypoint.errors import CheckpointError, ModelError
from entrypoint.output.publish import claim_output
from entrypoint.output.target import Target, open_target
from entrypoint.preflight.base_model import BaseModel, gigabytes
from entrypoint.storage import explained, is_s3, local_path

ON_DISK = 128 << 20  # bytes of a trial: enough to be on the disk's own speed, little enough for a small pod's memory
ON_S3 = 32 << 20
BLOCK = 1 << 20  # bytes of noise that a trial repeats: farther apart than a compressing file system looks


def check_checkpoint(run: Run, model: BaseModel, warn: Callable[[str], None]) -> str:
    """Write and read a trial file in checkpoint.path; returns its speed and what a save would take.

    Raises:
        CheckpointError: it, or data.cache_path, can't be used, or has no room for the checkpoints that are kept.
    """
    folder = Path(str(run.checkpoint.path))
    with _writable("checkpoint.path", str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        speed = round_trip(open_target(str(folder)), ON_DISK)
        there = _kept_bytes(folder)
        free = shutil.disk_usage(folder).free
    cache = str(run.data.cache_path)
    with _writable("data.cache_path", cache):
        open_target(cache).probe()
    said = f"{folder}: {gigabytes(ON_DISK)} written at {gigabytes(speed)}/s and read back, {gigabytes(free)} free"
    try:
        size = model.saved_bytes
    except ModelError:  # told by its own check, where that was asked for
        return f"{said}; what a save takes can't be told without the model"
    kept = run.checkpoint.keep + 1
    if kept * size > free + there:
        raise CheckpointError(
            f"{folder}: {gigabytes(free)} free, but checkpoint.keep={run.checkpoint.keep} and the one being written "
            f"need {gigabytes(kept * size - there)}; give a larger file system, or keep fewer"
        )
    grace = run.checkpoint.grace_seconds
    if size > speed * grace:
        warn(
            f"checkpoint.grace_seconds={grace}: a save of {gigabytes(size)} needs {gigabytes(size / grace)}/s, this "
            f"pod alone writes {gigabytes(speed)}/s; unless the nodes together are as fast, a spot notice costs what "
            f"was done since the last save (checkpoint.save_every={run.checkpoint.save_every})"
        )
    return f"{said}; a save is {gigabytes(size)}, {size / speed:,.0f} s at this speed, of {grace} s grace"


def check_mirror(run: Run) -> str:
    """List checkpoint.mirror; write, read and remove an object there; returns its speed.

    Raises:
        CheckpointError: one of the four is refused.
    """
    url = run.checkpoint.mirror
    if url is None:
        return "checkpoint.mirror is not set"
    with explained(url, CheckpointError):
        target = open_target(url, run.data.endpoint_url)
        target.sizes()  # a resume looks here; and a bucket that is not there says so, where a write may only break off
        speed = round_trip(target, ON_S3)
    return f"{url}: {gigabytes(ON_S3)} written at {gigabytes(speed)}/s, read back and removed"


def check_output(run: Run) -> str:
    """Claim output.path as the trainer does at its start.

    Raises:
        CheckpointError: another run's output is there, or it can't be written.
    """
    url = run.output.path
    with _writable("output.path", url):
        done = claim_output(url, fingerprint_keys(run), endpoint_url=run.data.endpoint_url, partial=True)
    return f"{url}: holds this run's output already" if done else f"{url}: writable"


def round_trip(target: Target, size: int) -> float:
    """Write `size` bytes to the target, read them back and remove them; returns the bytes a second of the writing.

    Raises:
        CheckpointError: other bytes came back.
        OSError: the storage's own.
    """
    name = f".preflight-{uuid.uuid4().hex[:12]}"
    content = os.urandom(BLOCK) * (size // BLOCK)
    try:
        began = time.monotonic()
        target.write(name, content)
        seconds = time.monotonic() - began
        if target.read(name) != content:
            raise CheckpointError(f"{target.url}/{name}: other bytes were read than written; mend this storage")
    except BaseException:
        with suppress(Exception):  # what went wrong is on its way already
            target.remove(name)
        raise
    target.remove(name)
    return size / seconds


@contextmanager
def _writable(key: str, place: str) -> Iterator[None]:
    """Explain a refused write: on a volume by whose it is, since a kubelet may have left its group alone."""
    try:
        with explained(place, CheckpointError):
            yield
    except CheckpointError as error:
        if is_s3(place) or not isinstance(error.__cause__, PermissionError):
            raise
        raise CheckpointError(f"{key}: {_owner(local_path(place))}") from None


def _owner(folder: Path) -> str:
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    state = there.stat()
    groups = ", ".join(map(str, sorted({os.getgid(), *os.getgroups()})))
    return (
        f"{there} can't be written by user {os.getuid()} of groups {groups}: it belongs to user {state.st_uid}, group "
        f"{state.st_gid}, mode {state.st_mode & 0o7777:o}; let the kubelet set the group (fsGroupPolicy: File in the "
        f"volume's CSIDriver), or once as root: chown {os.getuid()}:{os.getgid()} {there}"
    )


def _kept_bytes(folder: Path) -> int:
    """What this folder's checkpoints take already."""
    return sum(path.stat().st_size for path in folder.glob("step-*/*") if path.is_file())
