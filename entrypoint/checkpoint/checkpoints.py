"""`Checkpoints`: saving, finding and loading a run's state; the one door to all that is known of checkpoints.

A checkpoint is a folder `step-00000100` in `checkpoint.path`: torch's distributed checkpoint (weights, optimiser and
random numbers, readable by any number of ranks), the scheduler, the trainer's state with its log and, written last, the
manifest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerState

from entrypoint.checkpoint import find, reader
from entrypoint.checkpoint.manifest import DamagedError, Manifest
from entrypoint.checkpoint.saving import Saving
from entrypoint.checkpoint.staging import Staging
from entrypoint.checkpoint.state import get_place, get_state, own_share, set_state
from entrypoint.checkpoint.writer import SaveRefused, Writer
from entrypoint.errors import EXIT_STOPPED, CheckpointError, RunError
from entrypoint.world import World

if TYPE_CHECKING:
    from entrypoint.checkpoint.mirror import Mirror

TRAINER_STATE = "trainer_state.json"  # the name transformers' Trainer looks for
SCHEDULER = "scheduler.json"


@dataclass(frozen=True)
class Saved:
    """One finished save: where and how large it is, the seconds that training stood still, and until it was on disk."""

    step: int
    path: Path
    bytes: int
    stall: float
    seconds: float


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: seen by all ranks.
        keep: how many of the newest complete ones stay; the best stays as well.
        fingerprint: what the run is made of; a checkpoint of another is refused.
        mirror: takes copies of complete ones; on rank 0.
        on_saved: called on rank 0 as soon as a checkpoint is complete, in the writer's thread.
        check: called on rank 0 before a checkpoint gets its name; raises CheckpointError where the folder is not this
            run's any more.

    Attributes:
        newest: steps of the newest checkpoint that is complete on disk; None: there is none yet.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        fingerprint: dict[str, Any],
        world: World,
        mirror: Mirror | None = None,
        on_saved: Callable[[Saved], None] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.fingerprint = fingerprint
        self.world = world
        self.mirror = mirror
        self.on_saved = on_saved
        self.check = check
        self.newest: int | None = None
        self._staging = Staging()
        self._writer: Writer | None = None
        self._save: Saving | None = None

    # Save ------------------------------------------------------------------------------------------------------------

    def reserve(self, model: nn.Module, optimizer: Any) -> None:
        """Allocate what saves copy into, once the optimiser has made a step; every rank comes.

        Page-locking is not quick: the first save may be one that a notice leaves little time for.
        """
        self._staging.reserve(self._state(model, optimizer))

    def save(
        self, model: nn.Module, optimizer: Any, scheduler: Any, state: TrainerState, *, best: float | None = None
    ) -> None:
        """Copy the state after `state.global_step` steps and write the copy in a thread; every rank comes.

        Returns when the copy is made. One save at a time: the one before is waited for first. Nothing is done where
        this step is saved already.

        Args:
            best: how good the policy is, evaluated at this step: the one with the most is kept.

        Raises:
            CheckpointError: see `wait`.
        """
        began = time.monotonic()
        self.wait()
        if state.global_step == self.newest:
            return
        if self._writer is None:
            self._writer = Writer(self.folder, self._group(), self.check)
        staged = self._staging.copy(self._state(model, optimizer))
        documents = {}
        if self.world.is_main:
            documents[SCHEDULER] = json.dumps(scheduler.state_dict())
            documents[TRAINER_STATE] = json.dumps({field.name: getattr(state, field.name) for field in fields(state)})
        manifest = Manifest(state.global_step, self.fingerprint, best, {})
        self._save = Saving(manifest.step, lambda save: self._write(save, staged, documents, manifest), began)

    def wait(self) -> None:
        """Wait until what was saved is complete on disk; every rank comes, at a stop and at the end too.

        A storage that refuses it costs that checkpoint, not the run: a warning says so, and what a crash would cost.

        Raises:
            CheckpointError: the storage refused, and there is no older checkpoint either.
        """
        save, self._save = self._save, None
        if save is None:
            return
        error = save.result(self.world.patience)
        if error is None:
            self.newest = save.step
        elif not isinstance(error, SaveRefused):
            raise error
        elif self.newest is None:
            raise CheckpointError(f"step {save.step} can't be saved, and there is no older checkpoint: {error}")
        else:
            self.world.warn(
                f"step {save.step} is not saved: {error}; training goes on, and a crash would now go back to step "
                f"{self.newest}"
            )

    def _write(self, save: Saving, staged: dict[str, Any], documents: dict[str, str], manifest: Manifest) -> None:
        """In the thread."""
        assert self._writer is not None
        path, whole = self._writer.write(staged, documents, manifest)
        if not self.world.is_main:
            return
        if self.on_saved:
            self.on_saved(Saved(save.step, path, whole.bytes, save.stall, time.monotonic() - save.began))
        if self.mirror:
            self.mirror.submit(path)
        try:
            find.prune(self.folder, keep=self.keep, spare=self.mirror.uploading if self.mirror else None)
        except OSError as error:
            self.world.warn(f"{self.folder}: an older checkpoint can't be removed ({error})")

    def _state(self, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """What this rank saves; its tensors are the model's own."""
        rank = self.world.rank
        return own_share(get_state(model, optimizer, rank=rank), rank=rank, size=self.world.size)

    def _group(self) -> dist.ProcessGroup | None:
        """All ranks on CPU, for the writers' threads alone."""
        if self.world.size == 1:
            return None
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.world.patience))
        assert isinstance(group, dist.ProcessGroup)
        return group

    # Find ------------------------------------------------------------------------------------------------------------

    def find(self, resume: str) -> Path | None:
        """The newest whole checkpoint, here or in the mirror, where `checkpoint.resume` wants one.

        Called on one rank: it moves, removes and fetches folders.

        Raises:
            CheckpointError: it is another run's; `must` and there is none; or there are only damaged ones, which must
                not be the reason for a start at step 0.
        """
        find.remove_partial(self.folder)
        if resume == "never":
            self._begin_anew()
            return None
        if found := self._newest():
            return found
        damaged = [str(path) for path in find.damaged(self.folder)] + (self.mirror.damaged() if self.mirror else [])
        if damaged:
            raise CheckpointError(
                f"{self.folder}: holds no whole checkpoint, and {len(damaged)} damaged ones are known (such as "
                f"{damaged[-1]}); put a whole one back, or begin anew with checkpoint.resume=never"
            )
        if resume == "must":
            raise CheckpointError(
                f"{self.folder}: no complete checkpoint, expected one since checkpoint.resume=must; "
                "give the folder of the run to go on with, or checkpoint.resume=auto"
            )
        return None

    def _newest(self) -> Path | None:
        """Of the local ones and the mirror's the newest; of the same step the local one, which costs no download."""
        try:
            mirrored = self.mirror.newest(self.fingerprint) if self.mirror else None
        except RunError as error:
            local = self._local(above=-1) if error.exit_code == EXIT_STOPPED else None
            if local is None:  # not knowing what is up there is no reason to begin anew
                raise
            self.world.warn(f"the mirror is not looked at: {error}")
            return local
        local = self._local(above=-1 if mirrored is None else mirrored - 1)
        if self.mirror is None:
            return local
        if local is None and mirrored is not None:
            try:
                return self.mirror.fetch(mirrored, self.folder)
            except DamagedError:
                return self._newest()  # the mirror names the next older one now
        if local is not None and mirrored != find.step_of(local):
            self.mirror.submit(local)  # of a run that was killed before it was copied
        return local

    def _local(self, *, above: int) -> Path | None:
        return find.newest(self.folder, self.fingerprint, above=above, warn=self.world.warn)

    def _begin_anew(self) -> None:
        mirrored = self.mirror.newest(self.fingerprint) if self.mirror else None
        if mirrored is not None:
            raise CheckpointError(
                f"checkpoint.mirror: holds step {mirrored} of this run, which a later restart would go on from, and "
                "checkpoint.resume=never; name another mirror, or empty this one"
            )
        find.set_aside(self.folder, self.world.warn)

    # Load ------------------------------------------------------------------------------------------------------------

    def load(self, path: str | Path, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Put a checkpoint's state into a prepared model, its optimiser and its scheduler, on any number of ranks."""
        path, rank = Path(path), self.world.rank
        state = get_place(model, optimizer, rank=rank, saved=reader.names(path))
        reader.read(state, path)
        set_state(state, model, optimizer, rank=rank)
        scheduler.load_state_dict(json.loads((path / SCHEDULER).read_text()))
        self.newest = find.step_of(path)
