"""Ragged groups of random tokens: the same for every process that asks."""

from __future__ import annotations

from typing import Any

import numpy as np

from entrypoint.data.groups import Groups

EOS = 0


def ragged_rows(count: int, *, seed: int = 0, logged: bool = False) -> list[dict[str, Any]]:
    """`count` groups of 2 to 5 responses, prompts of 1 to 20 tokens, responses of 1 to 30; each makes a pair.

    logged: every second response has recorded log-probs, one token of them NaN.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        size = int(rng.integers(2, 6))
        rewards = np.sort(0.1 + 0.8 * rng.random(size))[::-1]
        rewards[0], rewards[-1] = 0.9, 0.1
        responses = [[*rng.integers(3, 300, rng.integers(0, 30)).tolist(), EOS] for _ in range(size)]
        row: dict[str, Any] = {
            "prompt_ids": rng.integers(3, 300, rng.integers(1, 20)).tolist(),
            "response_ids": responses,
            "rewards": rewards.tolist(),
        }
        if logged:
            row["behaviour_logps"] = [
                [float(x) for x in -6 + rng.random(len(r) - 1)] + [float("nan")] if i % 2 else None
                for i, r in enumerate(responses)
            ]
        rows.append(row)
    return rows


def ragged_groups(count: int, *, seed: int = 0, logged: bool = False) -> Groups:
    """`ragged_rows` as `Groups`."""
    return Groups.from_lists(ragged_rows(count, seed=seed, logged=logged))
