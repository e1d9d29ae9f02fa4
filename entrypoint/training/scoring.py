"""Per-token log-probabilities of logged responses under a model, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from entrypoint.data.groups import Float32, Groups, Int32, Int64
from entrypoint.training.batches import deal, pack
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


@torch.no_grad()
def log_probs(
    forward: Forward, groups: Groups, responses: Int64, *, pad: int, budget: int, device: torch.device, world: World
) -> Iterator[tuple[int, Float32]]:
    """This rank's share of `responses` with their log-probs, as (flat index, nats of each token (R,)).

    Every rank must consume its iterator to the end and be given the same responses: each makes equally many forward
    calls, since under FSDP a forward is a collective.
    """
    lengths = np.repeat(groups.prompt_lengths, groups.sizes) + groups.response_lengths
    shares = deal([int(lengths[r]) for r in responses], world.size)
    # Longest first within a rank (deal's own order), so that rows of a batch are of like length.
    batches = [pack([[int(responses[i])] for i in share], lengths, budget) for share in shares]
    rounds = max(len(batch) for batch in batches)
    for i in range(rounds):
        mine = batches[world.rank][i] if i < len(batches[world.rank]) else []
        rows = sequences(groups, np.array(mine, np.int64)) if mine else [EMPTY]
        batch = {name: value.to(device) for name, value in collate(rows, pad).items()}
        labels = batch["input_ids"].masked_fill(batch["response_mask"] == 0, -100)
        out = forward(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
        )
        scored = out.log_probs.float().cpu().numpy()
        for k, response in enumerate(mine):
            prompt, answer = rows[k]
            start = len(prompt) - 1  # position t predicts token t + 1
            yield response, scored[k, start : start + len(answer)].astype(np.float32)
