"""When a checkpoint is due, where `checkpoint.save_every` is a time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Schedule:
    """Rank 0's clock: ranks that each looked at their own would not agree.

    Args:
        seconds: between two checkpoints; None: they are due by steps, which every rank counts for itself.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """The time to the next checkpoint begins."""
        self._last = self._clock()

    def due(self) -> bool:
        """Whether a checkpoint is due now; asked once a step, and after a yes the time begins anew."""
        if self.seconds is None or self._clock() - self._last < self.seconds:
            return False
        self.begin()
        return True
