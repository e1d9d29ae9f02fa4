"""Per-token log-probabilities of logged responses under a model, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from entrypoint.data.groups import Float32, Groups, Int32, Int64
from entrypoint.training.batches import Cost, deal
from entrypoint.world import World

Forward = Callable[..., Any]  # a model with TRL's fused head: (input_ids, attention_mask, labels) -> log_probs

EMPTY = (np.zeros(1, np.int32), np.zeros(1, np.int32))  # a real two-token sequence: a rank's place holder


def sequences(groups: Groups, responses: Int64) -> list[tuple[Int32, Int32]]:
    """(prompt ids, response ids) of flat response indices."""
    rows = np.searchsorted(groups.offsets, responses, side="right") - 1
    cache = {int(row): groups[int(row)] for row in np.unique(rows)}
    return [
        (cache[int(row)].prompt_ids, cache[int(row)].response_ids[int(response - groups.offsets[row])])
        for row, response in zip(rows, responses, strict=True)
    ]


def collate(pairs: list[tuple[Int32, Int32]], pad: int) -> dict[str, torch.Tensor]:
    """Prompt and response end to end, padded on the right.

    Padding on the right keeps a token's position its distance from the start: with absolute positions the numbers
    are then those of the sequence alone.

    Shape: input_ids, attention_mask, response_mask (B, L).
    """
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = np.full((len(pairs), length), pad, np.int64)
    attention = np.zeros((len(pairs), length), np.int64)
    response_mask = np.zeros((len(pairs), length), np.int64)
    for i, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids[i, :end] = np.concatenate([prompt, response])
        attention[i, :end] = 1
        response_mask[i, len(prompt) : end] = 1
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(attention),
        "response_mask": torch.from_numpy(response_mask),
    }


def inputs(rows: list[tuple[Int32, Int32]], pad: int, device: torch.device) -> dict[str, Any]:
    """What TRL's fused head is called with to score the responses of `rows`."""
    batch = {name: value.to(device) for name, value in collate(rows, pad).items()}
    labels = batch["input_ids"].masked_fill(batch.pop("response_mask") == 0, -100)
    return {**batch, "labels": labels, "fused_lm_head": True}


@dataclass(frozen=True)
class Scorer:
    """A model that scores responses, on every rank of `world` together.

    Attributes:
        shared: whether the forward computes each prompt of a call once.
        budget: tokens of one forward call, as `Cost` counts them.
    """

    forward: Forward
    pad: int
    shared: bool
    budget: int
    device: torch.device
    world: World

    @torch.no_grad()
    def log_probs(self, groups: Groups, responses: Int64, known: Collection[int] = ()) -> Iterator[tuple[int, Float32]]:
        """This rank's share of `responses` (ascending) with their log-probs: (flat index, nats of each token (R,)).

        Every rank must consume its iterator to the end and be given the same responses: each makes equally many
        forward calls, since under FSDP a forward is a collective.

        Args:
            known: of a pass that was stopped. A call whose responses are all known, on every rank, is left out; the
                others are what they would have been, so that their numbers are, to the last bit.

        Raises:
            StoppedError: a rank was told to stop, which all learn before the same call.
        """
        for mine in self._batches(groups, responses, known):
            self.world.check_stop("scoring responses")
            rows = sequences(groups, np.array(mine, np.int64)) if mine else [EMPTY]
            out = self.forward(**inputs(rows, self.pad, self.device))
            scored = out.log_probs.float().cpu().numpy()
            for k, response in enumerate(mine):
                prompt, answer = rows[k]
                start = len(prompt) - 1  # position t predicts token t + 1
                yield response, scored[k, start : start + len(answer)].astype(np.float32)

    def _batches(self, groups: Groups, responses: Int64, known: Collection[int]) -> list[list[int]]:
        """This rank's forward calls; empty ones where another rank has more."""
        cost = Cost(groups, shared=self.shared)
        bundles = [[r] for r in responses.tolist()]
        if self.shared:  # a group's together
            cuts = np.flatnonzero(np.diff(cost.group[responses])) + 1
            bundles = [bundle.tolist() for bundle in np.split(responses, cuts) if len(bundle)]
        shares = deal([cost.distinct(bundle) for bundle in bundles], self.world.size)
        # Longest first within a rank (deal's own order): without sharing, rows of a batch are of like length.
        batches = [cost.pack([[r] for i in share for r in bundles[i]], self.budget) for share in shares]
        calls = list(zip_longest(*batches, fillvalue=[]))  # each call's share of every rank
        return [call[self.world.rank] for call in calls if any(r not in known for share in call for r in share)]
