"""Pairs for DPO and for held-out evaluation: a good response against a bad one to the same prompt."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from entrypoint.conf.data import Data
from entrypoint.data.groups import Float64, Groups, Int64
from entrypoint.errors import DataError


class Pairs(NamedTuple):
    """Pairs over a set of groups, group by group in the set's order.

    Shape: group, chosen, rejected (N,): the group's index and two responses' indices within it.
    """

    group: Int64
    chosen: Int64
    rejected: Int64
    groups_without: int  # groups that make no pair


def pairs(
    rewards: Float64,
    *,
    chosen_threshold: float,
    rejected_threshold: float,
    pairing: str,
    pairs_per_prompt: int,
) -> list[tuple[int, int]]:
    """(chosen index, rejected index) within one group, at most `pairs_per_prompt`, strongest contrast first.

    Chosen are the responses with at least `chosen_threshold`, rejected those with less than `rejected_threshold`.
    `ranked`: the i-th best chosen with the i-th worst rejected, each response used once; `all`: every combination,
    by reward difference; `best_worst`: one. Ties keep the responses' order, so the result is a function of the group.

    Shape: rewards (G,), in any order.
    """
    best_first = [int(i) for i in np.argsort(-rewards, kind="stable") if rewards[i] >= chosen_threshold]
    worst_first = [int(i) for i in np.argsort(rewards, kind="stable") if rewards[i] < rejected_threshold]
    if pairing == "best_worst":
        found = list(zip(best_first[:1], worst_first[:1], strict=False))
    elif pairing == "ranked":
        found = list(zip(best_first, worst_first, strict=False))
    elif pairing == "all":
        found = [(chosen, rejected) for chosen in best_first for rejected in worst_first]
        found.sort(key=lambda pair: rewards[pair[1]] - rewards[pair[0]])  # stable
    else:
        raise ValueError(f"pairing: expected ranked, all or best_worst, got {pairing!r}")
    # Thresholds that overlap would let a response meet one that is no worse, itself included.
    return [pair for pair in found if rewards[pair[0]] > rewards[pair[1]]][:pairs_per_prompt]


def no_pair(groups: int, data: Data) -> DataError:
    """What to raise where none of so many training groups makes a pair."""
    return DataError(
        f"data.path: none of the {groups} training groups has a response with a reward >= "
        f"{data.chosen_threshold} and one < {data.rejected_threshold}: DPO has no pair to train on; "
        "use method=grpo, or set data.chosen_threshold and data.rejected_threshold by these rewards"
    )


def pairs_of(
    groups: Groups,
    *,
    chosen_threshold: float,
    rejected_threshold: float,
    pairing: str,
    pairs_per_prompt: int,
) -> Pairs:
    """`pairs` of every group, and how many groups make none."""
    # Rewards descend within a group: its first and its last tell whether there is a pair at all.
    best, worst = groups.rewards[groups.offsets[:-1]], groups.rewards[groups.offsets[1:] - 1]
    able = (best >= chosen_threshold) & (worst < rejected_threshold) & (best > worst)
    group: list[int] = []
    chosen: list[int] = []
    rejected: list[int] = []
    without = len(groups)
    for i in np.flatnonzero(able):
        found = pairs(
            groups.rewards_of(int(i)),
            chosen_threshold=chosen_threshold,
            rejected_threshold=rejected_threshold,
            pairing=pairing,
            pairs_per_prompt=pairs_per_prompt,
        )
        without -= bool(found)
        group += [int(i)] * len(found)
        chosen += [pair[0] for pair in found]
        rejected += [pair[1] for pair in found]
    return Pairs(np.array(group, np.int64), np.array(chosen, np.int64), np.array(rejected, np.int64), without)
