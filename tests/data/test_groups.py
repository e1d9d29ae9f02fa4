"""The memory-mapped set of groups: what is written is what is read, in arrays of the documented shapes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrypoint.data.groups import Groups, write_groups

ROWS: list[dict[str, Any]] = [
    {
        "prompt_ids": [1, 2, 3],
        "response_ids": [[4, 9], [5, 6, 9]],
        "rewards": [0.9, 0.1],
        "behaviour_logps": [None, [-1.0, -2.0, float("nan")]],
    },
    {"prompt_ids": [1], "response_ids": [[4, 9], [5, 6, 9], [7, 7, 7, 9]], "rewards": [0.8, 0.3, 0.2]},
]


def mapped(rows: list[dict[str, Any]], folder: Path) -> Groups:
    return Groups.from_file(write_groups(folder / "groups.arrow", rows))


def listed(rows: list[dict[str, Any]], folder: Path) -> Groups:
    return Groups.from_lists(rows)


@pytest.fixture(params=[mapped, listed])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[list[dict[str, Any]]], Groups]:
    return lambda rows: request.param(rows, tmp_path)


def test_a_group_has_the_documented_arrays(make: Callable[[list[dict[str, Any]]], Groups]) -> None:
    first, second = make(ROWS)
    assert first.prompt_hash == "0" * 64
    assert second.prompt_hash == "0" * 63 + "1"
    assert first.prompt_ids.tolist() == [1, 2, 3]
    assert first.prompt_ids.dtype == np.int32
    assert [ids.tolist() for ids in first.response_ids] == [[4, 9], [5, 6, 9]]
    assert {ids.dtype for ids in first.response_ids} == {np.dtype(np.int32)}
    assert first.rewards.tolist() == [0.9, 0.1]
    none, some = first.behaviour_logps
    assert none is None
    assert some is not None
    np.testing.assert_array_equal(some, np.array([-1, -2, np.nan], np.float32))
    assert second.behaviour_logps == (None, None, None)


def test_lengths_and_rewards_over_the_set(make: Callable[[list[dict[str, Any]]], Groups]) -> None:
    groups = make(ROWS)
    assert groups.prompt_lengths.tolist() == [3, 1]
    assert groups.sizes.tolist() == [2, 3]
    assert groups.offsets.tolist() == [0, 2, 5]
    assert groups.response_lengths.tolist() == [2, 3, 2, 3, 4]
    assert groups.rewards.tolist() == [0.9, 0.1, 0.8, 0.3, 0.2]
    assert groups.rewards_of(1).tolist() == [0.8, 0.3, 0.2]
    assert groups.lengths_of(0).tolist() == [2, 3]


def test_an_empty_set(make: Callable[[list[dict[str, Any]]], Groups]) -> None:
    groups = make([])
    assert len(groups) == 0
    assert groups.offsets.tolist() == [0]
    assert groups.prompt_lengths.tolist() == groups.response_lengths.tolist() == groups.rewards.tolist() == []


def test_indices(make: Callable[[list[dict[str, Any]]], Groups]) -> None:
    groups = make(ROWS)
    assert groups[-1].prompt_ids.tolist() == groups[np.int64(1)].prompt_ids.tolist() == [1]
    assert [group.prompt_ids.tolist() for group in groups[:1]] == [[1, 2, 3]]
    with pytest.raises(IndexError, match="group 2 of 2"):
        groups[2]


def test_groups_travel_to_another_process(make: Callable[[list[dict[str, Any]]], Groups]) -> None:
    again = pickle.loads(pickle.dumps(make(ROWS)))
    assert again[1].rewards.tolist() == [0.8, 0.3, 0.2]
