"""The self-check of a run's start: one group of its own, on its own weights, computed both ways."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from entrypoint.data.groups import Float32
from entrypoint.sharing.forward import SharedPrompts

# Mean difference of a token's log-prob, in nats: more than rounding makes of it, far less than a wrong mask does.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


def settle(
    shared: SharedPrompts, score: Callable[[], Float32], *, dtype: str, agree: Callable[[float], float]
) -> str | None:
    """Share prompts in the first way that computes what the plain forward computes; returns why none does.

    Args:
        score: log-probs of a few responses to one prompt, flat, by the model's forward as it is.
        dtype: of the forward pass; the tolerance goes by it.
        agree: one number for all ranks, from each rank's own.
    """
    with shared.off():
        plain = score()
    found = []
    for attention in shared.ways():
        try:
            shared.use(attention)
            off = agree(float(np.abs(score() - plain).mean()))
        except Exception as error:  # a kernel that the device has not, a shape that it refuses: the plain one is there
            found.append(f"with {attention}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            continue
        if off <= TOLERANCE[dtype]:
            return None
        found.append(f"with {attention}: log-probs are off by {off:.2g} nats a token, at most {TOLERANCE[dtype]:g}")
    shared.give_up()
    return "; ".join(found)
