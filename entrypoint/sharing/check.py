"""The self-check of a run's start: one group of its own, on its own weights, computed both ways."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from entrypoint.data.groups import Float32
from entrypoint.sharing.forward import SharedPrompts

# Mean difference of a token's log-prob, in nats: more than rounding makes of it, far less than a wrong mask does.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


def settle(
    shared: SharedPrompts, score: Callable[[], Float32], *, dtype: str, worst: Callable[[float], float]
) -> str | None:
    """Share prompts in the first way that computes what the plain forward computes; returns why none does.

    Args:
        score: log-probs of a few responses to one prompt, flat, by the model's forward as it is.
        dtype: of the forward pass; the tolerance goes by it.
        worst: the greatest of the ranks' numbers; every rank calls it equally often, whatever happens on it.
    """
    with shared.off():
        plain = score()
    found = []
    for attention in shared.ways():
        off, error = _off(shared, attention, score, plain)
        most = worst(off)
        if most <= TOLERANCE[dtype]:
            return None
        if error is None:
            limit = f"log-probs are off by {most:.2g} nats a token, at most {TOLERANCE[dtype]:g}"
            error = "another rank fails" if math.isinf(most) else limit
        found.append(f"with {attention}: {error}")
    shared.give_up()
    return "; ".join(found)


def _off(
    shared: SharedPrompts, attention: str, score: Callable[[], Float32], plain: Float32
) -> tuple[float, str | None]:
    """Mean difference in nats; infinite, with the reason, where the forward fails or gives what is no number."""
    try:
        shared.use(attention)
        off = float(np.abs(score() - plain).mean())
    except Exception as error:  # a kernel that the device has not, a shape that it refuses: the plain one is there
        return math.inf, (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (off, None) if math.isfinite(off) else (math.inf, "a log-prob is no number")
