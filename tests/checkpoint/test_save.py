"""Saving: what is on disk is the state at the moment of `save`, whatever training and the storage do afterwards."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from entrypoint.checkpoint import Saved, reader
from entrypoint.checkpoint.manifest import MANIFEST, Manifest
from entrypoint.checkpoint.state import own_share
from entrypoint.conf import Grpo
from entrypoint.errors import CheckpointError
from tests.checkpoint.states import State, checkpoints
from tests.e2e.runs import wait_until
from tests.process import ROOT, scrubbed
from tests.trainers.builders import make_run, make_trainer
from tests.trainers.sample_groups import ragged_groups


def test_a_loaded_state_takes_the_straight_course(tmp_path: Path) -> None:
    """Steps 3 to 5 after a load of step 2 are those of a run that was not cut off: random numbers included."""
    straight = State.fresh().steps(5)
    run, store = State.fresh().steps(2), checkpoints(tmp_path)
    run.save(store)
    run.steps(3)  # while it is written
    store.wait()
    assert torch.equal(run.weight, straight.weight)
    again = State.fresh()
    torch.manual_seed(99)
    path = checkpoints(tmp_path).find("must")
    assert path == tmp_path / "step-00000002"
    again.load(store := checkpoints(tmp_path), path)
    assert store.newest == 2
    assert again.trainer.log_history == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    again.steps(3)
    assert torch.equal(again.weight, straight.weight)
    assert again.scheduler.state_dict() == straight.scheduler.state_dict()


def test_what_a_save_copies_into_is_allocated_after_the_first_step(tiny: Path, tmp_path: Path) -> None:
    """Long before a notice can make a save urgent; the save after step 2 allocates nothing more."""
    run = make_run(Grpo(), tmp_path, max_steps=3, save_every=2)
    trainer, _ = make_trainer(run, tiny, ragged_groups(8))
    seen: list[dict[str, int]] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            buffers = trainer._checkpoints._staging._buffers
            seen.append({name: buffer.data_ptr() for name, buffer in buffers.items()})

    trainer.add_callback(Look())
    trainer.train()
    trainer._checkpoints.wait()
    assert sum(name.endswith((".exp_avg", ".exp_avg_sq")) for name in seen[0]) == 2 * len(
        list(trainer.model.parameters())
    )
    assert seen[0] == seen[1] == seen[2]


def test_what_training_does_meanwhile_is_not_in_it(tmp_path: Path) -> None:
    held = threading.Event()
    run, store = State.fresh().steps(1), checkpoints(tmp_path, check=lambda: held.wait(60) and None)
    before = run.weight
    run.save(store)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(7)
    assert not (tmp_path / "step-00000001").exists()  # it waits for its name, and training goes on
    held.set()
    store.wait()
    again = State.fresh().load(checkpoints(tmp_path), tmp_path / "step-00000001")
    assert torch.equal(again.weight, before)


def test_one_is_written_at_a_time_and_each_is_told_when_it_is_complete(tmp_path: Path) -> None:
    told: list[Saved] = []
    run = State.fresh()
    store = checkpoints(tmp_path, on_saved=told.append)
    for _ in range(3):
        run.step()
        run.save(store)
    assert [saved.step for saved in told][:2] == [1, 2]  # the third may be complete too
    store.wait()
    run.save(store)  # is saved already
    store.wait()
    assert [saved.step for saved in told] == [1, 2, 3]
    for saved in told:
        assert 0 < saved.stall < saved.seconds
    newest = told[-1]
    assert newest.path == tmp_path / "step-00000003"
    files = [path for path in newest.path.iterdir() if path.name != MANIFEST]
    assert newest.bytes == sum(path.stat().st_size for path in files)
    assert {path.name for path in files} == set(Manifest.read(newest.path).files)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    run, store = State.fresh(), checkpoints(tmp_path, keep=2)
    kept = []
    for best in (0.7, None, 0.9, 0.8, 0.9, None, None, 0.1):
        run.step()
        run.save(store, best)
        store.wait()
        kept.append([int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))])
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [5, 6, 7], [5, 7, 8]]


def test_whole_tensors_are_one_rank_s_each_and_random_numbers_everyone_s() -> None:
    """16, 12, 8 and 4 bytes: a to rank 0, b to rank 1, c to the lighter rank 1, the last to rank 0; 20 bytes each."""
    groups = [{"lr": 0.1, "params": ["a"]}]
    state = {
        "model": {"c": torch.zeros(2), "a": torch.zeros(4), "b": torch.zeros(3)},
        "optimizer": {"state": {"a": {"step": torch.zeros(())}}, "param_groups": groups},
        "rng": {"0": {"cpu": torch.zeros(9)}},
    }
    first, second = (own_share(state, rank=rank, size=2) for rank in (0, 1))
    assert [*first["model"]] == ["a"]
    assert [*second["model"]] == ["c", "b"]
    assert [*first["optimizer"]["state"]["a"]] == ["step"]
    assert second["optimizer"]["state"]["a"] == {}
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"] == groups
    assert [*first["rng"]["0"]] == [*second["rng"]["0"]] == ["cpu"]
    alone = own_share(state, rank=0, size=1)
    assert [*alone["model"]] == ["c", "a", "b"]


def test_a_kill_in_the_middle_of_a_save_costs_that_save(tmp_path: Path) -> None:
    """A process saves step after step, each weight filled with the step, and is killed while one is written."""
    script = f"""
import torch
from pathlib import Path
from tests.checkpoint.states import State, checkpoints
run, store = State.fresh(1500), checkpoints(Path({str(tmp_path)!r}))
while True:
    run.step()
    with torch.no_grad():
        run.model.weight.fill_(run.trainer.global_step)
    run.save(store)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=scrubbed({}))
    try:
        wait_until(lambda: (tmp_path / "step-00000004.partial").exists() or process.poll() is not None)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    path = checkpoints(tmp_path).find("must")
    assert path is not None
    step = int(path.name[5:])
    assert step >= 3
    assert not [*tmp_path.glob("*.partial")]
    assert torch.all(State.fresh(1500).load(checkpoints(tmp_path), path).weight == step)


class Evil:
    """What a pickle can do: call anything when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, ("evil", 0o777)


@pytest.mark.parametrize("place", ["metadata", "value"])
def test_no_pickle_is_trusted(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, store = State.fresh().steps(1), checkpoints(tmp_path)
    run.save(store)
    store.wait()
    path = tmp_path / "step-00000001"
    if place == "metadata":
        (path / reader.METADATA).write_bytes(pickle.dumps(Evil()))
    else:
        found = reader.Reader(path).read_metadata()
        at = next(info for index, info in found.storage_data.items() if index.fqn.endswith("betas"))
        evil = io.BytesIO()
        torch.save(Evil(), evil)
        file = path / at.relative_path
        at.offset, at.length = file.stat().st_size, len(evil.getvalue())
        file.write_bytes(file.read_bytes() + evil.getvalue())
        (path / reader.METADATA).write_bytes(pickle.dumps(found))
    with pytest.raises(pickle.UnpicklingError):
        store.load(path, run.model, run.optimizer, run.scheduler)
    assert not (tmp_path / "evil").exists()


def test_a_folder_that_another_run_has_taken_gets_no_checkpoint(tmp_path: Path) -> None:
    def check() -> None:
        raise CheckpointError("was taken")

    run, store = State.fresh().steps(1), checkpoints(tmp_path, check=check)
    run.save(store)
    with pytest.raises(CheckpointError, match="was taken"):
        store.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.partial"]  # or is that by now the other's?
