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

WAIT = 1.05  # of the even share: below it the most loaded rank is not worth cutting groups for
SPLITS = (2, 3, 4, 8)  # parts of a group that are tried
CUTS = 8  # shares of the groups that are tried: the costliest eighth, two eighths, …


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

    def atoms(self, unit: int) -> list[list[int]]:
        """The unit's responses, those together that must be computed together."""
        responses = self.of(unit).tolist()
        return [responses[i : i + self.atom] for i in range(0, len(responses), self.atom)]


def group_units(groups: Groups) -> Units:
    """One unit a group."""
    n = len(groups)
    return Units(np.arange(n), np.arange(groups.offsets[-1]), groups.offsets, atom=1)


def pair_units(groups: Groups, pairs: Pairs) -> Units:
    """One unit a pair: its chosen response, then its rejected one."""
    first = groups.offsets[pairs.group]
    responses = np.stack([first + pairs.chosen, first + pairs.rejected], axis=1).reshape(-1)
    return Units(pairs.group, responses, 2 * np.arange(len(pairs.group) + 1), atom=2)


class Step(NamedTuple):
    """What a whole optimiser step holds over all ranks.

    sequences: atoms, which the loss is a mean over (or `tokens`: response tokens).
    length: tokens of its mean row, prompt and response.
    computed: tokens that the ranks' forwards see; distinct: those that differ, each prompt once; stock: what one
        padded batch of all its rows would have.
    imbalance: the most loaded rank's tokens over the mean rank's.
    """

    sequences: int
    tokens: int
    length: float
    computed: int
    distinct: int
    stock: int
    imbalance: float


class Bundle(NamedTuple):
    """Atoms that a rank computes together, and the tokens of that."""

    atoms: list[list[int]]
    load: int


class MicroBatch(NamedTuple):
    """One forward pass of one rank; `responses` is empty where the rank has nothing left to do in this step."""

    responses: tuple[int, ...]
    step: Step


class Cost:
    """Tokens that a forward pass computes, which is what memory and time go by.

    Attributes:
        shared: each prompt is computed once for all of its responses in a batch; otherwise every response brings its
            own, and rows are padded to the longest.
    """

    def __init__(self, groups: Groups, *, shared: bool) -> None:
        self.shared = shared
        self.group = np.repeat(np.arange(len(groups)), groups.sizes)
        self.prompt = np.repeat(groups.prompt_lengths, groups.sizes)
        self.response = groups.response_lengths
        self.row = self.prompt + self.response

    def distinct(self, responses: list[int]) -> int:
        """Tokens of these responses and of their prompts, each once."""
        once = np.unique(np.asarray(responses, np.int64))
        first = np.unique(self.group[once], return_index=True)[1]
        return int(self.response[once].sum() + self.prompt[once][first].sum())

    def of(self, responses: list[int]) -> int:
        """What one forward pass over `responses` computes."""
        return self.distinct(responses) if self.shared else len(responses) * int(self.row[responses].max(initial=0))

    def pack(self, atoms: list[list[int]], budget: int) -> list[list[int]]:
        """Atoms in their order, cut into batches of at most `budget` tokens; an atom over it is alone.

        Responses of one group must be neighbours for their prompt to be shared.
        """
        batches: list[list[int]] = []
        rows, longest, distinct, seen = 0, 0, 0, set[int]()
        for atom in atoms:
            rows, longest = rows + len(atom), max(longest, *(int(self.row[r]) for r in atom))
            fresh = set(atom) - seen
            known = batches and self.group[batches[-1][-1]] == self.group[atom[0]]
            distinct += sum(int(self.response[r]) for r in fresh) + (0 if known else int(self.prompt[atom[0]]))
            if batches and (distinct if self.shared else rows * longest) <= budget:
                batches[-1] += atom
                seen |= fresh
            else:
                batches.append(list(atom))
                seen = set(atom)
                rows, longest = len(atom), max(int(self.row[r]) for r in atom)
                distinct = sum(int(self.response[r]) for r in seen) + int(self.prompt[atom[0]])
        return batches


class StepSampler:
    """A batch sampler whose batch is this rank's whole optimiser step: a list of `MicroBatch`.

    The order of an epoch depends on (seed, epoch) alone: groups are shuffled, a group's pairs stay neighbours, and
    the sequence of units is cut every `batch_size`. The smaller last batch of an epoch is kept.

    Attributes:
        budget: tokens of one micro-batch, as `cost` counts them.
        cost: what a micro-batch costs; both may be set until the first step.
    """

    def __init__(
        self, groups: Groups, units: Units, *, batch_size: int, seed: int, budget: int, rank: int, world_size: int
    ) -> None:
        self.units = units
        self.batch_size = batch_size
        self.seed = seed
        self.budget = budget
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.cost = Cost(groups, shared=False)

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
        cuts = [self.cost.pack(atoms, self.budget) for atoms in self._dealt(step)]
        loads = [sum(self.cost.of(batch) for batch in cut) for cut in cuts]
        responses = [r for unit in step.tolist() for r in self.units.of(unit).tolist()]
        whole = Step(
            sequences=len(responses) // self.units.atom,
            tokens=int(self.cost.response[responses].sum()),
            length=float(self.cost.row[responses].mean()),
            computed=sum(loads),
            distinct=self.cost.distinct(responses),
            stock=len(responses) * int(self.cost.row[responses].max()),
            imbalance=max(loads) * self.world_size / sum(loads),
        )
        rounds = max(len(cut) for cut in cuts)
        return [[MicroBatch(tuple(cut[i]) if i < len(cut) else (), whole) for i in range(rounds)] for cut in cuts]

    def loads(self, step: Int64) -> list[int]:
        """Tokens that each rank would compute in a step, were it one forward pass."""
        return [self.cost.of([r for atom in atoms for r in atom]) for atoms in self._dealt(step)]

    def _dealt(self, step: Int64) -> list[list[list[int]]]:
        """Each rank's atoms of a step, those with the longest rows first.

        A group stays on one rank, which computes its prompt once, unless that keeps the others waiting: then the
        costliest groups are cut in two or more where that ends the step sooner, their prompts computed once a part.
        """
        whole = sorted(map(self._loaded, self._bundles(step)), key=lambda bundle: -bundle.load)
        best, least = self._deal(whole)
        even = sum(bundle.load for bundle in whole) / self.world_size
        for parts in SPLITS if self.cost.shared and least > WAIT * even else ():
            split = [[self._loaded(part) for part in _split(bundle.atoms, parts)] for bundle in whole]
            for share in range(1, CUTS + 1):
                first = -(-len(whole) * share // CUTS)
                dealt, most = self._deal([part for bundle in split[:first] for part in bundle] + whole[first:])
                if most < least:
                    best, least = dealt, most
        return [sorted(atoms, key=self._place) for atoms in best]

    def _deal(self, bundles: list[Bundle]) -> tuple[list[list[list[int]]], int]:
        """The atoms of each rank, and the tokens of the most loaded one."""
        dealt = deal([bundle.load for bundle in bundles], self.world_size)
        most = max(sum(bundles[i].load for i in mine) for mine in dealt)
        return [[atom for i in mine for atom in bundles[i].atoms] for mine in dealt], most

    def _bundles(self, step: Int64) -> list[list[list[int]]]:
        """The atoms of a step by group; one by one where nothing is shared."""
        bundles: dict[int, list[list[int]]] = {}
        for unit in step.tolist():
            bundles.setdefault(int(self.units.group[unit]), []).extend(self.units.atoms(unit))
        if self.cost.shared:
            return list(bundles.values())
        return [[atom] for atoms in bundles.values() for atom in atoms]

    def _loaded(self, atoms: list[list[int]]) -> Bundle:
        responses = [r for atom in atoms for r in atom]
        load = self.cost.distinct(responses) if self.cost.shared else int(self.cost.row[responses].sum())
        return Bundle(atoms, load)

    def _place(self, atom: list[int]) -> tuple[int, int]:
        """Where an atom stands in its rank's step: a group's atoms together; rows of like length where padded."""
        group = int(self.cost.group[atom[0]])
        return (group, 0) if self.cost.shared else (-int(self.cost.row[atom].max()), group)


def _split(atoms: list[list[int]], parts: int) -> list[list[list[int]]]:
    """A group's atoms in at most so many parts of like number."""
    size = -(-len(atoms) // parts)
    return [atoms[i : i + size] for i in range(0, len(atoms), size)]


def deal(costs: list[int], ranks: int) -> list[list[int]]:
    """Indices of `costs` shared out to ranks, the longest first to the least loaded (LPT; Graham 1969)."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        shares[rank].append(i)
        heapq.heappush(heap, (load + costs[i], rank))
    return shares
