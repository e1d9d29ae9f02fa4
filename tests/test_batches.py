"""Order, dealing and micro-batches: every sequence of a step is computed exactly once, wherever that is."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from entrypoint.data.groups import Groups
from entrypoint.data.pairs import Pairs, pairs_of
from entrypoint.training.batches import Cost, MicroBatch, StepSampler, deal, group_units, pair_units
from tests.trainers.sample_groups import ragged_groups


def sampler(
    groups: Groups, *, batch_size: int = 4, rank: int = 0, world: int = 1, budget: int = 100, **kwargs: int
) -> StepSampler:
    units = group_units(groups)
    seed = kwargs.get("seed", 42)
    return StepSampler(groups, units, batch_size=batch_size, seed=seed, budget=budget, rank=rank, world_size=world)


def all_pairs(groups: Groups) -> Pairs:
    return pairs_of(groups, chosen_threshold=0.5, rejected_threshold=0.5, pairing="all", pairs_per_prompt=4)


def test_longest_first_to_the_least_loaded_by_hand() -> None:
    # 7 -> rank 0; 5 -> rank 1; 4 -> rank 1 (5 < 7) = 9; 3 -> rank 0 = 10; 1 -> rank 1 = 10
    assert deal([3, 7, 4, 1, 5], 2) == [[1, 0], [4, 2, 3]]


def test_equal_costs_are_dealt_in_turn() -> None:
    assert deal([2, 2, 2, 2], 3) == [[0, 3], [1], [2]]


def of_lengths(rows: list[tuple[int, list[int]]], *, shared: bool) -> Cost:
    """The cost over groups of these (prompt length, response lengths)."""
    lists = [
        {"prompt_ids": [1] * p, "response_ids": [[2] * r for r in rs], "rewards": [0.5] * len(rs)} for p, rs in rows
    ]
    return Cost(Groups.from_lists(lists), shared=shared)


def test_a_plain_batch_is_cut_where_rows_times_longest_would_exceed_the_budget() -> None:
    cost = of_lengths([(1, [9, 8, 4, 4, 29])], shared=False)  # rows of 10, 9, 5, 5 and 30 tokens
    # 2 x 10 = 20 fits, 3 x 10 does not; 5 and 5 fit; 30 is over the budget and alone
    assert cost.pack([[0], [1], [2], [3], [4]], 20) == [[0, 1], [2, 3], [4]]
    assert cost.of([0, 1]) == 20
    assert cost.of([]) == 0


def test_a_shared_batch_is_cut_by_distinct_tokens() -> None:
    cost = of_lengths([(10, [3, 4, 5]), (6, [1, 2])], shared=True)
    # 10 + 3 + 4 = 17 fits, + 5 = 22 does not: the prompt comes again, 10 + 5 = 15; + 6 + 1 = 22 does not
    assert cost.pack([[0], [1], [2], [3], [4]], 20) == [[0, 1], [2], [3, 4]]
    assert [cost.of(batch) for batch in ([0, 1], [2], [3, 4], [0, 4])] == [17, 15, 9, 21]
    # A response that is in two pairs is computed once: 10 + 3 + 5, then + 4
    assert cost.pack([[0, 2], [0, 1]], 22) == [[0, 2, 0, 1]]
    assert cost.of([0, 2, 0, 1]) == 22


@pytest.mark.parametrize("shared", [True, False])
def test_an_atom_stays_together(shared: bool) -> None:
    cost = of_lengths([(1, [3, 3, 3, 3])], shared=shared)
    assert cost.pack([[0, 1], [2, 3]], 12) == [[0, 1], [2, 3]]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    groups = ragged_groups(13)
    first = [s.tolist() for s in sampler(groups).steps(3)]
    assert first == [s.tolist() for s in sampler(groups, rank=2, world=3, budget=7).steps(3)]
    assert first != [s.tolist() for s in sampler(groups).steps(4)]
    assert first != [s.tolist() for s in sampler(groups, seed=43).steps(3)]


def test_the_smaller_last_batch_of_an_epoch_is_kept() -> None:
    steps = sampler(ragged_groups(13), batch_size=4).steps(0)
    assert [len(step) for step in steps] == [4, 4, 4, 1]
    assert sorted(np.concatenate(steps)) == list(range(13))


def test_pairs_of_a_group_are_neighbours_and_batches_are_exact() -> None:
    groups = ragged_groups(13)
    units = pair_units(groups, all_pairs(groups))
    assert len(units) > 13
    steps = StepSampler(groups, units, batch_size=3, seed=1, budget=90, rank=0, world_size=1).steps(0)
    assert {len(step) for step in steps[:-1]} == {3}
    order = units.group[np.concatenate(steps)].tolist()
    runs = 1 + sum(a != b for a, b in pairwise(order))
    assert runs == len(set(order))  # each group appears in one run


def test_a_pair_unit_is_its_chosen_then_its_rejected_response() -> None:
    groups = Groups.from_lists(
        [
            {"prompt_ids": [1], "response_ids": [[2], [3], [4]], "rewards": [0.9, 0.6, 0.1]},
            {"prompt_ids": [1], "response_ids": [[5], [6]], "rewards": [0.8, 0.2]},
        ]
    )
    found = pairs_of(groups, chosen_threshold=0.7, rejected_threshold=0.5, pairing="ranked", pairs_per_prompt=4)
    units = pair_units(groups, found)
    assert units.of(0).tolist() == [0, 2]
    assert units.of(1).tolist() == [3, 4]


@pytest.mark.parametrize("world", [1, 2, 3, 8, 24, 40])
@pytest.mark.parametrize("kind", ["groups", "pairs"])
def test_ranks_share_a_step_without_loss_or_repetition(world: int, kind: str) -> None:
    groups = ragged_groups(32)
    units = group_units(groups) if kind == "groups" else pair_units(groups, all_pairs(groups))
    step_sampler = StepSampler(groups, units, batch_size=32, seed=0, budget=120, rank=0, world_size=world)
    for step in step_sampler.steps(0):
        ranks = step_sampler.micro_batches(step)
        assert len(ranks) == world
        assert len({len(rank) for rank in ranks}) == 1  # equally many forward calls
        got = sorted(r for rank in ranks for micro in rank for r in micro.responses)
        wanted = sorted(int(r) for unit in step for r in units.of(int(unit)))
        assert got == wanted
        sequences = len(wanted) // units.atom
        tokens = int(groups.response_lengths[wanted].sum())
        assert {(m.step.sequences, m.step.tokens) for rank in ranks for m in rank} == {(sequences, tokens)}


@pytest.mark.parametrize("shared", [True, False])
def test_micro_batches_stay_within_the_budget(shared: bool) -> None:
    groups = ragged_groups(32)
    step_sampler = sampler(groups, batch_size=32, budget=150, world=2)
    step_sampler.cost = Cost(groups, shared=shared)
    for rank in step_sampler.micro_batches(step_sampler.steps(0)[0]):
        for micro in rank:
            if len(micro.responses) > 1:
                assert step_sampler.cost.of(list(micro.responses)) <= 150


def test_what_a_step_computes_is_counted() -> None:
    rows = [(10, [3, 4]), (6, [1, 2, 2])]
    lists = [
        {"prompt_ids": [1] * p, "response_ids": [[2] * r for r in rs], "rewards": [0.5] * len(rs)} for p, rs in rows
    ]
    groups = Groups.from_lists(lists)
    two = sampler(groups, batch_size=2, world=2)
    two.cost = Cost(groups, shared=True)
    (first, *_), _ = two.micro_batches(two.steps(0)[0])
    # 10 + 7 on one rank, 6 + 5 on the other; one batch of five rows would be as wide as the longest, 14
    assert first.step == (5, 12, (13 + 14 + 7 + 8 + 8) / 5, 28, 28, 5 * 14, 17 * 2 / 28)


def test_iterating_gives_this_ranks_part_of_the_set_epoch() -> None:
    groups = ragged_groups(9)
    mine = sampler(groups, rank=1, world=2)
    mine.set_epoch(5)
    wanted = [mine.micro_batches(step)[1] for step in mine.steps(5)]
    assert list(mine) == wanted
    assert len(mine) == len(wanted) == 3
    assert isinstance(wanted[0][0], MicroBatch)


def test_visited_names_what_the_first_steps_compute() -> None:
    groups = ragged_groups(13)
    step_sampler = sampler(groups)
    wanted = sorted(int(r) for step in step_sampler.steps(0)[:2] for u in step for r in step_sampler.units.of(int(u)))
    assert step_sampler.visited(2).tolist() == wanted
    assert step_sampler.visited(100).tolist() == list(range(groups.offsets[-1]))


@pytest.mark.parametrize("world", [4, 24, 40])
def test_ranks_without_a_group_are_no_error(world: int) -> None:
    groups = ragged_groups(3)
    few = sampler(groups, batch_size=3, world=world)
    few.cost = Cost(groups, shared=True)
    step = few.steps(0)[0]
    assert len(few.loads(step)) == len(few.micro_batches(step)) == world
    assert few.cost.of([]) == 0


def test_a_group_is_cut_where_it_keeps_the_others_waiting() -> None:
    """32 groups of 32 + 8 x 8 tokens on 24 ranks: whole, eight ranks have two, 192 tokens, and 16 have one.

    Some in halves of 64 or thirds of 56 tokens: 96 + 56 = 152 on the most loaded one.
    """
    lists = [{"prompt_ids": [1] * 32, "response_ids": [[2] * 8] * 8, "rewards": [0.5] * 8} for _ in range(32)]
    groups = Groups.from_lists(lists)
    many = sampler(groups, batch_size=32, world=24)
    step = many.steps(0)[0]
    many.cost = Cost(groups, shared=True)
    assert max(many.loads(step)) == 152
    ranks = many.micro_batches(step)
    assert sorted(r for rank in ranks for micro in rank for r in micro.responses) == list(range(256))
    alone = sampler(groups, batch_size=32, world=32)
    alone.cost = many.cost
    assert set(alone.loads(step)) == {96}


def test_without_sharing_each_response_is_dealt_by_itself() -> None:
    groups = Groups.from_lists([{"prompt_ids": [1], "response_ids": [[2] * 9] * 8, "rewards": [0.5] * 8}])
    assert sampler(groups, world=4).loads(np.array([0])) == [20, 20, 20, 20]
