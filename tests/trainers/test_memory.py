"""The largest micro-batch that fits: measured on this device, agreed, and kept for a restart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from entrypoint.training import memory
from entrypoint.training.batches import Cost, StepSampler, group_units
from tests.trainers.builders import ALONE
from tests.trainers.sample_groups import ragged_groups

TOKEN = 2**20  # bytes that a token needs in these tests: far more than what else the process does meanwhile
GROUPS = ragged_groups(60)
SETTING: dict[str, str] = {}


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> StepSampler:
    monkeypatch.setattr(memory, "FIRST", 64)
    made = StepSampler(GROUPS, group_units(GROUPS), batch_size=30, seed=0, budget=64, rank=0, world_size=1)
    made.cost = Cost(GROUPS, shared=True)
    return made


def find(sampler: StepSampler, folder: Path, tried: list[int]) -> int:
    def compute(responses: list[int]) -> None:
        tried.append(sampler.cost.of(responses))
        np.ones(tried[-1] * TOKEN, np.uint8).sum()  # every page of it is touched

    device = torch.device("cpu")
    return memory.find_budget(
        compute, sampler, GROUPS, parameters=0, device=device, world=ALONE, folder=folder, setting=SETTING
    )


def test_twice_the_tokens_are_tried_until_the_next_would_not_fit(
    sampler: StepSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 700 tokens' room 85 % are used, 595: after 128 and 256 tokens 512 are expected to need 256 + 1.2 x 256 = 563,
    which fits; after 512 twice as many do not."""
    monkeypatch.setattr(memory, "_available", lambda: 700 * TOKEN)
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
    monkeypatch.setattr(memory, "_available", lambda: 400 * TOKEN)
    first = find(sampler, tmp_path, [])
    monkeypatch.setattr(memory, "_available", lambda: 4000 * TOKEN)
    tried: list[int] = []
    assert find(sampler, tmp_path, tried) == first
    assert tried == []
    monkeypatch.setattr(memory, "_name", lambda device: "another")
    assert find(sampler, tmp_path, tried) > first
    assert tried


def test_no_room_at_all_leaves_the_least(sampler: StepSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda: 10 * TOKEN)
    assert find(sampler, tmp_path, []) == 64


def test_memory_that_the_process_has_freed_is_no_room(
    sampler: StepSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gigabyte of small blocks, freed but for the last, stays resident: a batch laid into it would seem to need
    nothing."""
    blocks = [np.ones(2**16, np.uint8) for _ in range(2**14)]
    del blocks[:-1]
    monkeypatch.setattr(memory, "_available", lambda: 10 * TOKEN)
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


def test_a_run_killed_while_it_tries_starts_again_with_what_fits_anywhere(sampler: StepSampler, tmp_path: Path) -> None:
    def killed(responses: list[int]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.find_budget(
            killed,
            sampler,
            GROUPS,
            parameters=0,
            device=torch.device("cpu"),
            world=ALONE,
            folder=tmp_path,
            setting=SETTING,
        )
    tried: list[int] = []
    assert find(sampler, tmp_path, tried) == 64
    assert not tried


def test_a_damaged_answer_is_found_again(sampler: StepSampler, tmp_path: Path) -> None:
    first = find(sampler, tmp_path, [])
    (tmp_path / memory.FILE).write_text("{")
    tried: list[int] = []
    assert find(sampler, tmp_path, tried) == first
    assert tried
