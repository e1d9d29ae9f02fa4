"""Pairs, derived by hand."""

from __future__ import annotations

import numpy as np
import pytest

from entrypoint.data.groups import Groups
from entrypoint.data.pairs import pairs, pairs_of

USER = {"chosen_threshold": 0.7, "rejected_threshold": 0.5}


def found(rewards: list[float], pairing: str = "ranked", cap: int = 4, **thresholds: float) -> list[tuple[int, int]]:
    return pairs(np.array(rewards), pairing=pairing, pairs_per_prompt=cap, **(USER | thresholds))


def test_ranked_matches_the_ith_best_with_the_ith_worst() -> None:
    """Chosen 0.9 (0), 0.7 (1), the threshold itself; rejected 0.0 (5), 0.3 (4), 0.49 (3); 0.5 (2) is neither."""
    assert found([0.9, 0.7, 0.5, 0.49, 0.3, 0.0]) == [(0, 5), (1, 4)]


def test_all_takes_every_combination_strongest_contrast_first() -> None:
    """0.9−0.0 = 0.9, 0.7−0.0 = 0.7, 0.9−0.3 = 0.6, 0.7−0.3 = 0.4."""
    assert found([0.9, 0.7, 0.3, 0.0], "all") == [(0, 3), (1, 3), (0, 2), (1, 2)]
    assert found([0.9, 0.7, 0.3, 0.0], "all", cap=3) == [(0, 3), (1, 3), (0, 2)]


def test_best_worst_is_one_pair() -> None:
    assert found([0.8, 0.9, 0.1, 0.2], "best_worst") == [(1, 2)]


def test_the_cap_counts_pairs_of_one_prompt() -> None:
    assert found([1.0, 0.9, 0.8, 0.2, 0.1, 0.0], cap=2) == [(0, 5), (1, 4)]


def test_order_of_the_responses_decides_only_ties() -> None:
    """Unsorted rewards; the two 0.9 keep their order, so do the two 0.1."""
    assert found([0.1, 0.9, 0.1, 0.9]) == [(1, 0), (3, 2)]


def test_no_pair_without_contrast() -> None:
    assert found([0.9, 0.8, 0.6]) == []
    assert found([0.6, 0.4, 0.1]) == []
    assert found([]) == []


def test_overlapping_thresholds_never_pair_a_response_with_its_equal() -> None:
    """Both are chosen (>= 0.2) and rejected (< 0.9): best 0.6 with worst 0.4; then 0.4 with 0.6 is refused."""
    assert found([0.6, 0.4], chosen_threshold=0.2, rejected_threshold=0.9) == [(0, 1)]
    assert found([0.5, 0.5], chosen_threshold=0.2, rejected_threshold=0.9) == []


def test_an_unknown_pairing_is_refused() -> None:
    with pytest.raises(ValueError, match="pairing: expected ranked, all or best_worst, got 'random'"):
        found([0.9, 0.1], "random")


def test_pairs_of_a_set_and_groups_without() -> None:
    """Group 0: (0, 2); group 1 has no chosen; group 2: (0, 3), (1, 2)."""
    groups = Groups.from_lists(
        {"prompt_ids": [1], "response_ids": [[2]] * len(rewards), "rewards": rewards}
        for rewards in ([0.9, 0.6, 0.1], [0.6, 0.1], [0.9, 0.8, 0.3, 0.2])
    )
    result = pairs_of(groups, pairing="ranked", pairs_per_prompt=4, **USER)
    assert result.group.tolist() == [0, 2, 2]
    assert result.chosen.tolist() == [0, 0, 1]
    assert result.rejected.tolist() == [2, 3, 2]
    assert result.groups_without == 1
    assert {a.dtype for a in result[:3]} == {np.dtype(np.int64)}


def test_pairs_of_nothing() -> None:
    result = pairs_of(Groups.from_lists([]), pairing="all", pairs_per_prompt=1, **USER)
    assert [len(a) for a in result[:3]] == [0, 0, 0]
    assert result.groups_without == 0
