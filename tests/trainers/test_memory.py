"""The largest micro-batch that fits: measured on this device, agreed, and kept for a restart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from entrypoint import host
from entrypoint.data.pairs import Pairs
from entrypoint.errors import TooLargeError
from entrypoint.training import memory
from entrypoint.training.batches import Cost, StepSampler, group_units, pair_units
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


def find(sampler: StepSampler, folder: Path, tried: list[int], *, broke_off: bool = False, parameters: int = 0) -> int:
    def compute(responses: list[int]) -> None:
        tried.append(sampler.cost.of(responses))
        np.ones(tried[-1] * TOKEN, np.uint8).sum()  # every page of it is touched

    return search(compute, sampler, folder, broke_off=broke_off, parameters=parameters)


def search(
    compute: Callable[[list[int]], None],
    sampler: StepSampler,
    folder: Path,
    *,
    collective: bool = False,
    broke_off: bool = False,
    parameters: int = 0,
) -> int:
    return memory.find_budget(
        compute,
        sampler,
        GROUPS,
        parameters=parameters,
        device=torch.device("cpu"),
        world=ALONE,
        collective=collective,
        folder=folder,
        setting=SETTING,
        broke_off=broke_off,
    ).tokens


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


@pytest.mark.parametrize(("parameters", "fits"), [(30, 128), (41, 64)])
def test_the_moments_and_the_gradient_that_waits_lie_beside_a_batch(
    sampler: StepSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: int, fits: int
) -> None:
    """12 bytes a parameter: of 595 tokens' room 128 and 360 fit, 128 and 492 don't; with the moments alone, 328, they
    would."""
    monkeypatch.setattr(host, "available", lambda: 700 * TOKEN)
    assert find(sampler, tmp_path, [], parameters=parameters * TOKEN) == fits


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


@pytest.mark.slow
@pytest.mark.parametrize("options", ["fsdp:late", "late"])
def test_a_step_that_runs_out_of_memory_has_the_next_start_take_half(tiny: Path, tmp_path: Path, options: str) -> None:
    """All ranks leave with 75, and the run goes on from its newest checkpoint."""
    case = "run:grpo:grpo:auto:" + options.partition("late")[0].rstrip(":")
    first, second = run_ranks(2, tiny, tmp_path, [f"run:grpo:grpo:auto:{options}"])
    assert (first[0], second[0]) == (75, 75), first[1]
    had, takes = told_to_start_again(first[1])
    assert takes == had // 2 > LEAST
    assert "Traceback" not in first[1] + second[1]
    again = run_ranks(2, tiny, tmp_path, [case])
    assert [code for code, _ in again] == [0, 0], again[0][1]
    assert f"{takes} tokens a forward pass, as found before" in again[0][1]
    assert [entry["step"] for entry in torch.load(tmp_path / "run.pt")["logs"]] == list(range(1, 9))


def told_to_start_again(text: str) -> tuple[int, int]:
    pattern = r"=auto: a step ran out of memory with (\d+) tokens .*; start the same command again, it takes (\d+)"
    had, takes = map(int, re.search(pattern, text).groups())  # type: ignore[union-attr]
    return had, takes


@pytest.mark.slow
def test_a_budget_that_was_given_is_the_users_to_lower(tiny: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, tiny, tmp_path, ["run:grpo:grpo:300:fsdp:late"])
    assert (first[0], second[0]) == (64, 64), first[1]
    assert "entrypoint: train.micro_batch_tokens: a step ran out of memory with 300 tokens a forward pass" in first[1]
    assert not list(tmp_path.rglob(memory.FILE))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
def test_below_what_is_computed_together_a_smaller_budget_does_not_help(
    sampler: StepSampler, tmp_path: Path, *, shared: bool, pairs: bool
) -> None:
    """From there on it is the rows that are too long: 64, else the run would start again for ever."""
    if pairs:
        sampler.units = pair_units(GROUPS, Pairs(np.array([0, 3]), np.array([0, 1]), np.array([1, 0]), 0))
    sampler.cost = Cost(GROUPS, shared=shared)
    atoms = [atom for unit in range(len(sampler.units)) for atom in sampler.units.atoms(unit)]
    least = max(map(sampler.cost.of, atoms))
    ends: list[TooLargeError] = []
    sampler.budget = 3 * least
    while not ends or ends[-1].exit_code == 75:
        ends.append(memory.out_of_memory(sampler, memory.Budget(sampler.budget, tmp_path / memory.FILE, SETTING)))
        sampler.budget = json.loads((tmp_path / memory.FILE).read_text())["tokens"]
    assert [str(end).rpartition(" ")[2] for end in ends[:-1]] == [f"{3 * least // 2:,}", f"{least:,}"]
    assert f"what is computed together has up to {least:,}; lower train.max_length" in str(ends[-1])
    assert ends[-1].exit_code == 64


def test_where_the_folder_may_be_gone_at_the_next_start_the_number_is_the_users_to_write(
    sampler: StepSampler, tmp_path: Path
) -> None:
    """Else each start of a run whose disk goes with its pod would find the same number again, and end as this one."""
    sampler.budget = 10_000
    end = memory.out_of_memory(sampler, memory.Budget(10_000, tmp_path / memory.FILE, SETTING, lasting=False))
    assert end.exit_code == 64
    assert str(end).endswith("write train.micro_batch_tokens=5000")
    assert not (tmp_path / memory.FILE).exists()


def test_a_damaged_answer_is_found_again(sampler: StepSampler, tmp_path: Path) -> None:
    first = find(sampler, tmp_path, [])
    (tmp_path / memory.FILE).write_text("{")
    tried: list[int] = []
    assert find(sampler, tmp_path, tried) == first
    assert tried
