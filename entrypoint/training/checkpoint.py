"""Saving, finding and loading a run's state; all that is known of checkpoints is in this file.

A checkpoint is a folder `step-00000100` in `checkpoint.path`: torch's distributed checkpoint (weights and optimiser,
readable by any number of ranks), the trainer's state and, written last, `manifest.json` with the size of every file
and the run's fingerprint. It is written under a partial name and renamed.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import TrainerState

from entrypoint.errors import CheckpointError
from entrypoint.storage import sync
from entrypoint.world import World

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"  # the name transformers' Trainer looks for
SCHEDULER = "scheduler.json"
PARTIAL = ".partial"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: seen by all ranks.
        keep: how many of the newest complete ones stay.
        fingerprint: what the run is made of; a checkpoint of another is refused.
    """

    def __init__(self, folder: Path, *, keep: int, fingerprint: dict[str, Any], world: World) -> None:
        self.folder = folder
        self.keep = keep
        self.fingerprint = fingerprint
        self.world = world

    # Save ------------------------------------------------------------------------------------------------------------

    def save(self, model: nn.Module, optimizer: Any, scheduler: Any, state: TrainerState) -> Path:
        """Write the state after `state.global_step` steps."""
        final = self.folder / f"step-{state.global_step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
            partial.mkdir(parents=True)
        self.world.barrier()
        with _quiet():
            dcp.save(_state_dict(model, optimizer), checkpoint_id=partial)
        if self.world.is_main:
            state.save_to_json(str(partial / TRAINER_STATE))
            (partial / SCHEDULER).write_text(json.dumps(scheduler.state_dict()))
            self._seal(partial, final, state.global_step)
            self._prune()
        self.world.barrier()
        return final

    def _seal(self, partial: Path, final: Path, step: int) -> None:
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        manifest = {"step": step, "fingerprint": self.fingerprint, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*partial.iterdir(), partial]:
            sync(path)
        if final.exists():  # damaged, or it would have been resumed from
            final.rename(_free_name(final, "damaged"))
        partial.rename(final)
        sync(self.folder)

    def _prune(self) -> None:
        for old in self._complete()[self.keep :]:
            # Under a partial name first: what a kill leaves of it is not taken for damage.
            shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))

    # Find ------------------------------------------------------------------------------------------------------------

    def find(self, resume: str) -> Path | None:
        """The newest complete checkpoint, where `checkpoint.resume` wants one.

        Called on one rank: it moves and removes folders.

        Raises:
            CheckpointError: it is another run's, or `must` and there is none.
        """
        for torn in self.folder.glob(f"step-*{PARTIAL}"):  # of a save or a removal that was killed
            shutil.rmtree(torn)
        complete = self._complete()
        if resume == "never":
            self._set_aside(complete)
            return None
        if not complete:
            if resume == "must":
                raise CheckpointError(
                    f"{self.folder}: no complete checkpoint, expected one since checkpoint.resume=must; "
                    "give the folder of the run to go on with, or checkpoint.resume=auto"
                )
            return None
        found = json.loads((complete[0] / MANIFEST).read_text())["fingerprint"]
        if differ := differences(found, self.fingerprint):
            raise CheckpointError(
                f"{complete[0]}: is another run's checkpoint, it differs in {differ}; "
                "give this run a checkpoint.path of its own, or checkpoint.resume=never"
            )
        return complete[0]

    def _set_aside(self, complete: list[Path]) -> None:
        """Out of the way of a run that begins anew, but not gone: they may be somebody's last copy."""
        if not complete:
            return
        aside = _free_name(self.folder / "older", "aside")
        aside.mkdir()
        for path in complete:
            path.rename(aside / path.name)
        print(
            f"entrypoint: checkpoint.resume=never: {len(complete)} older checkpoints were moved to {aside}",
            file=sys.stderr,
        )

    def _complete(self) -> list[Path]:
        """Newest first, by step: times say nothing after a copy."""
        found = [path for path in self.folder.glob("step-*") if path.name[5:].isdigit() and is_complete(path)]
        return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)

    # Load ------------------------------------------------------------------------------------------------------------

    def load(self, path: str | Path, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Put a checkpoint's state into a prepared model, its optimiser and its scheduler, on any number of ranks."""
        state = _state_dict(model, optimizer)
        with _quiet():
            dcp.load(state, checkpoint_id=path)
        set_state_dict(
            model,
            _bare(optimizer),
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_options(model),
        )
        scheduler.load_state_dict(json.loads((Path(path) / SCHEDULER).read_text()))


def is_complete(path: Path) -> bool:
    """Whether the folder holds every file of its manifest, in its size."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The keys in which two fingerprints differ, each with both values; empty where they are the same run's."""
    keys = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    return ", ".join(f"{key} ({found.get(key)!r} there, {wanted.get(key)!r} here)" for key in keys)


def _state_dict(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    weights, moments = get_state_dict(model, _bare(optimizer), options=_options(model))
    return {"model": weights, "optimizer": moments}


def _options(model: nn.Module) -> StateDictOptions:
    # With an adapter the frozen base is not part of the run's state: it is read from model.path again.
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)


def _bare(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def _free_name(path: Path, why: str) -> Path:
    """A name beside `path` that says why it was put there and is not taken."""
    number = 1
    while (free := path.with_name(f"{path.name}.{why}-{number}")).exists():
        number += 1
    return free


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns that one process is not a process group: that is how we mean it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
