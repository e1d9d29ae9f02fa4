"""The largest micro-batch that fits: measured on this device, agreed, and kept for a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from entrypoint import host
from entrypoint.errors import TooLargeError
from entrypoint.training import memory
from entrypoint.training.batches import Cost, StepSampler, group_units
from tests.trainers.builders import ALONE
from tests.trainers.sample_groups import ragged_groups
from tests.trainers.train_rank import LEAST, run_ranks

TOKEN = 2**20  # bytes that a token needs in these tests: far more than what else the process does meanwhile
GROUPS = ragged_groups(60)
SETTING: dict[str, str] = {}


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> StepSampler:
    monkeypatch.setattr(memory, "FIRST", 64)
    made = StepSampler(GROUPS, group_units(GROUPS), batch_size=30, seed=0, budget=64, rank=0, world_size=1)
    made.cost = Cost(GROUPS, shared=True)
    return made


def find(sampler: StepSampler, folder: Path, tried: list[int], *, broke_off: bool = False) -> int:
    def compute(responses: list[int]) -> None:
        tried.append(sampler.cost.of(responses))
        np.ones(tried[-1] * TOKEN, np.uint8).sum()  # every page of it is touched

    return search(compute, sampler, folder, broke_off=broke_off)


def search(
    compute: Callable[[list[int]], None],
    sampler: StepSampler,
    folder: Path,
    *,
    collective: bool = False,
    broke_off: bool = False,
) -> int:
    return memory.find_budget(
        compute,
        sampler,
        GROUPS,
        parameters=0,
        device=torch.device("cpu"),
        world=ALONE,
        collective=collective,
        folder=folder,
        setting=SETTING,
        broke_off=broke_off,
    )


def test_twice_the_tokens_are_tried_until_the_next_would_not_fit(
    sampler: StepSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 700 tokens' room 85 % are used, 595: after 128 and 256 tokens 512 are expected to need 256 + 1.2 x 256 = 563,
    which fits; after 512 twice as many do not."""
    monkeypatch.setattr(host, "available", lambda: 700 * TOKEN)
    tried: list[int] = []
    assert find(sampler, tmp_path, tried) == 512
    assert [1 << (n - 1).bit_length() for n in tried] == [128, 256, 512]
    assert all(n <= wanted for n, wanted in zip(tried, [128, 256, 512], strict=True))


def test_a_step_that_is_small_is_never_cut(sampler: StepSampler, tmp_path: Path) -> None:
    most = max(max(sampler.loads(step)) for step in sampler.steps(0))
    tried: list[int] = []
    assert find(sampler, tmp_path, tried) == most
    assert max(tried) <= most


def test_a_restart_on_the_same_machine_cuts_alike_without_trying(
    sampler: StepSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "available", lambda: 400 * TOKEN)
    first = find(sampler, tmp_path, [])
    monkeypatch.setattr(host, "available", lambda: 4000 * TOKEN)
    tried: list[int] = []
    assert find(sampler, tmp_path, tried) == first
    assert tried == []
    monkeypatch.setattr(memory, "_name", lambda device: "another")
    assert find(sampler, tmp_path, tried) > first
    assert tried


def test_no_room_at_all_leaves_the_least(sampler: StepSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available", lambda: 10 * TOKEN)
    assert find(sampler, tmp_path, []) == 64


def test_memory_that_the_process_has_freed_is_no_room(
    sampler: StepSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gigabyte of small blocks, freed but for the last, stays resident: a batch laid into it would seem to need
    nothing."""
    blocks = [np.ones(2**16, np.uint8) for _ in range(2**14)]
    del blocks[:-1]
    monkeypatch.setattr(host, "available", lambda: 10 * TOKEN)
    assert find(sampler, tmp_path, []) == 64
    assert len(blocks) == 1


def test_another_run_in_the_same_folder_looks_for_itself(
    sampler: StepSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find(sampler, tmp_path, [])
    monkeypatch.setitem(SETTING, "gradient_checkpointing", "never")
    tried: list[int] = []
    find(sampler, tmp_path, tried)
    assert tried


def test_a_run_killed_while_it_tries_starts_again_with_what_fits_anywhere(
    sampler: StepSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that may have been for want of memory; after a notice it tries again."""
    monkeypatch.setattr(host, "available", lambda: 400 * TOKEN)

    def killed(responses: list[int]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(killed, sampler, tmp_path)
    tried: list[int] = []
    assert find(sampler, tmp_path, tried, broke_off=True) == 64
    assert not tried
    assert find(sampler, tmp_path, tried) > 64
    assert tried


def short(sampler: StepSampler) -> Callable[[list[int]], None]:
    """A pass that has memory for 256 tokens."""

    def compute(responses: list[int]) -> None:
        if sampler.cost.of(responses) > 256:
            raise torch.OutOfMemoryError("out of memory")

    return compute


def test_a_rank_by_itself_that_runs_out_of_memory_takes_what_fitted(sampler: StepSampler, tmp_path: Path) -> None:
    assert search(short(sampler), sampler, tmp_path) == 256


def test_ranks_that_meet_in_the_pass_start_again_with_what_fitted(sampler: StepSampler, tmp_path: Path) -> None:
    with pytest.raises(TooLargeError, match=r"over \d+ tokens ran out of memory; start .* again, it takes 256"):
        search(short(sampler), sampler, tmp_path, collective=True)
    tried: list[int] = []
    assert find(sampler, tmp_path, tried) == 256
    assert not tried


@pytest.mark.slow
@pytest.mark.parametrize("short", ["short", "short=all"])
def test_under_fsdp_ranks_that_run_out_of_memory_leave_together(tiny: Path, tmp_path: Path, short: str) -> None:
    """In the middle of a forward pass: where one does, the other waits in its collectives, and hears why, not a
    time-out."""
    case = "run:grpo:grpo:auto:fsdp"
    first, second = run_ranks(2, tiny, tmp_path, [f"{case}:{short}"])
    assert (first[0], second[0]) == (75, 75)
    assert "entrypoint: train.micro_batch_tokens=auto: a forward pass over" in first[1]
    assert f"ran out of memory; start the same command again, it takes {2 * LEAST}" in first[1]
    assert "Traceback" not in first[1] + second[1]
    again = run_ranks(2, tiny, tmp_path, [case])
    assert [code for code, _ in again] == [0, 0], again[0][1]
    assert f"{2 * LEAST} tokens a forward pass, as found before" in again[0][1]


def test_a_damaged_answer_is_found_again(sampler: StepSampler, tmp_path: Path) -> None:
    first = find(sampler, tmp_path, [])
    (tmp_path / memory.FILE).write_text("{")
    tried: list[int] = []
    assert find(sampler, tmp_path, tried) == first
    assert tried
