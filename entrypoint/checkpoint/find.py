"""Finding checkpoints again: which are there, which of them are whole, and what becomes of those that are not.

Order comes from the step, never from a file's time: a copy has other times.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from entrypoint.checkpoint.manifest import DamagedError, Manifest
from entrypoint.checkpoint.writer import PARTIAL
from entrypoint.errors import CheckpointError

T = TypeVar("T")


def step_of(path: Path) -> int:
    """Steps that were done when this checkpoint was taken."""
    return int(path.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """All that have a checkpoint's final name, newest first; whether they are whole is another question."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def newest(folder: Path, fingerprint: dict[str, Any], *, above: int, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a step > `above`; a damaged one in its way is set aside by name.

    Its fingerprint is compared before a tensor is read. Then rank 0 reads every file once, several at a time: for the
    384 GB of a 32B model 38 s at 10 GB/s, and what the page cache keeps of them is not read again by the load.

    Raises:
        CheckpointError: it is another run's.
    """
    for path in checkpoints(folder):
        if step_of(path) <= above:
            return None
        try:
            manifest = Manifest.read(path)
            if differ := differences(manifest.fingerprint, fingerprint):
                raise CheckpointError(
                    f"{path}: is another run's checkpoint, it differs in {differ}; "
                    "give this run a checkpoint.path of its own, or checkpoint.resume=never"
                )
            manifest.verify(path)
            return path
        except DamagedError as error:
            aside = free_name(path, "damaged")
            path.rename(aside)
            warn(f"{path}: is damaged ({error}); it is now {aside.name}, and the next older one is looked for")
    return None


def damaged(folder: Path) -> list[Path]:
    """Those that were set aside as damaged, now or at an earlier start."""
    return sorted(folder.glob("step-*.damaged-*"))


def set_aside(folder: Path, warn: Callable[[str], None]) -> None:
    """Out of the way of a run that begins anew, but not gone: they may be somebody's last copy."""
    found = [*checkpoints(folder), *damaged(folder)]
    if not found:
        return
    aside = free_name(folder / "older", "aside")
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    warn(f"checkpoint.resume=never: {len(found)} older checkpoints were moved to {aside}")


def remove_partial(folder: Path) -> None:
    """What a save, a removal or a download that was killed has left."""
    for torn in folder.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(torn)


def prune(folder: Path, *, keep: int, spare: Path | None) -> None:
    """Remove all but the newest `keep` and the best; called when the newest is complete.

    Args:
        spare: one that is being read, such as by the mirror.
    """
    there = checkpoints(folder)
    stay = kept({path.name: best_of(Manifest.read, path) for path in there}, keep)
    for path in there:
        if path != spare and path.name not in stay:
            # Under a partial name first: what a kill leaves of it is not taken for damage.
            shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)))


def kept(best: Mapping[str, float | None], keep: int) -> set[str]:
    """Which of these complete checkpoints stay: the newest `keep`, and the best, of several the newest.

    Args:
        best: how good each is, by name; None: it was not evaluated.
    """
    names = sorted(best, key=lambda name: step_of(Path(name)), reverse=True)
    judged = {name: value for name in names if (value := best[name]) is not None}
    return {*names[:keep], *([max(judged, key=judged.__getitem__)] if judged else [])}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The keys in which two fingerprints differ, each with both values; empty where they are the same run's."""
    keys = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    return ", ".join(f"{key} ({found.get(key)!r} there, {wanted.get(key)!r} here)" for key in keys)


def free_name(path: Path, why: str) -> Path:
    """A name beside `path` that says why it was put there and is not taken."""
    number = 1
    while (free := path.with_name(f"{path.name}.{why}-{number}")).exists():
        number += 1
    return free


def best_of(read: Callable[[T], Manifest], of: T) -> float | None:
    """How good a checkpoint is, by its manifest; None: not evaluated, or damaged."""
    try:
        return read(of).best
    except DamagedError:
        return None
