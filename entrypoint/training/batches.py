"""Which sequences each rank computes at each optimiser step: order, dealing, micro-batches.

Everything here is a function of the data's lengths, (seed, epoch) and the world size, computed alike on every rank
without communication. The maths of a step never depends on the last: world size and token budget only say where a
sequence is computed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from entrypoint.data.groups import Groups, Int64
from entrypoint.data.pairs import Pairs


@dataclass(frozen=True)
class Units:
    """What `train.batch_size` counts: a group with all its responses (GRPO) or a pair of responses (DPO).

    A response is named by its index in the flat arrays of `Groups`.

    Shape: group (U,) ascending; responses (sum of sizes,); starts (U + 1,), where each unit's responses begin.
    atom: how many neighbouring responses of a unit must be computed together: 1, or 2 for a pair.
    """

    group: Int64
    responses: Int64
    starts: Int64
    atom: int

    def __len__(self) -> int:
        return len(self.group)

    def of(self, unit: int) -> Int64:
        """Flat indices of the unit's responses."""
        return self.responses[self.starts[unit] : self.starts[unit + 1]]


def group_units(groups: Groups) -> Units:
    """One unit a group."""
    n = len(groups)
    return Units(np.arange(n), np.arange(groups.offsets[-1]), groups.offsets, atom=1)


def pair_units(groups: Groups, pairs: Pairs) -> Units:
    """One unit a pair: its chosen response, then its rejected one."""
    first = groups.offsets[pairs.group]
    responses = np.stack([first + pairs.chosen, first + pairs.rejected], axis=1).reshape(-1)
    return Units(pairs.group, responses, 2 * np.arange(len(pairs.group) + 1), atom=2)


class MicroBatch(NamedTuple):
    """One forward pass of one rank; `responses` is empty where the rank has nothing left to do in this step.

    step_sequences, step_tokens: what the whole step holds over all ranks: atoms, and response tokens.
    """

    responses: tuple[int, ...]
    step_sequences: int
    step_tokens: int


class StepSampler:
    """A batch sampler whose batch is this rank's whole optimiser step: a list of `MicroBatch`.

    The order of an epoch depends on (seed, epoch) alone: groups are shuffled, a group's pairs stay neighbours, and
    the sequence of units is cut every `batch_size`. The smaller last batch of an epoch is kept.
    """

    def __init__(
        self, groups: Groups, units: Units, *, batch_size: int, seed: int, budget: int, rank: int, world_size: int
    ) -> None:
        """`budget`: padded tokens of one micro-batch (rows x longest row)."""
        self.units = units
        self.batch_size = batch_size
        self.seed = seed
        self.budget = budget
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.response_lengths = groups.response_lengths
        self.lengths = np.repeat(groups.prompt_lengths, groups.sizes) + groups.response_lengths

    @property
    def batch_sampler(self) -> StepSampler:
        """Where transformers' Trainer looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.units) // self.batch_size)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for step in self.steps(self.epoch):
            yield self.micro_batches(step)[self.rank]

    def steps(self, epoch: int) -> list[Int64]:
        """The units of each step of an epoch, alike on every rank."""
        groups, index = np.unique(self.units.group, return_inverse=True)
        place = np.random.default_rng([self.seed, epoch]).permutation(len(groups))
        order = np.argsort(place[index], kind="stable")
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def visited(self, max_steps: int) -> Int64:
        """Flat indices of every response that the first `max_steps` steps compute, ascending."""
        if max_steps >= len(self):
            return np.unique(self.units.responses)
        return np.unique(np.concatenate([self.units.of(int(u)) for step in self.steps(0)[:max_steps] for u in step]))

    def micro_batches(self, step: Int64) -> list[list[MicroBatch]]:
        """Each rank's micro-batches of a step; every rank has equally many, since FSDP's forwards are collectives."""
        responses = np.concatenate([self.units.of(int(unit)) for unit in step])
        sequences = len(responses) // self.units.atom
        tokens = int(self.response_lengths[responses].sum())
        costs = [int(self.lengths[self.units.of(int(unit))].sum()) for unit in step]
        dealt = deal(costs, self.world_size)
        cuts = [self._cut([self.units.of(int(step[i])) for i in mine]) for mine in dealt]
        rounds = max(len(cut) for cut in cuts)
        return [
            [MicroBatch(tuple(cut[i]) if i < len(cut) else (), sequences, tokens) for i in range(rounds)]
            for cut in cuts
        ]

    def _cut(self, units: list[Int64]) -> list[list[int]]:
        """A rank's units, longest first, cut where rows x longest row would exceed the budget."""
        atom = self.units.atom
        units = sorted(units, key=lambda unit: -int(self.lengths[unit].max()))
        atoms = [unit[i : i + atom] for unit in units for i in range(0, len(unit), atom)]
        return pack([[int(r) for r in one] for one in atoms], self.lengths, self.budget)


def deal(costs: list[int], ranks: int) -> list[list[int]]:
    """Indices of `costs` shared out to ranks, the longest first to the least loaded (LPT; Graham 1969)."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        shares[rank].append(i)
        heapq.heappush(heap, (load + costs[i], rank))
    return shares


def pack(atoms: list[list[int]], lengths: Int64, budget: int) -> list[list[int]]:
    """Atoms in their order, cut into batches of at most `budget` padded tokens; an atom over it is alone."""
    batches: list[list[int]] = []
    width = 0
    for atom in atoms:
        longest = max(int(lengths[response]) for response in atom)
        if batches and (len(batches[-1]) + len(atom)) * max(width, longest) <= budget:
            batches[-1] += atom
            width = max(width, longest)
        else:
            batches.append(list(atom))
            width = longest
    return batches
