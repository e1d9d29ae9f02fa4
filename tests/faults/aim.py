"""A moment of a start: a phase, by its progress, and a random time into it."""

from __future__ import annotations

import random
import time

from tests.faults.life import BEGINNING, ENDED, PHASES, Start
from tests.faults.scene import STEPS


def aim(start: Start, phase: str, longest: float, dice: random.Random) -> str:
    """Wait for the moment; returns the phase that the start is in then, or "ended".

    Args:
        phase: one of PHASES.
        longest: seconds that the straight run was in it.
    """
    life = start.life
    if phase in BEGINNING:
        start.wait_for(lambda: PHASES.index(start.phase()) >= PHASES.index(phase) if start.phase() != ENDED else True)
    elif phase == "final write":
        start.wait_for(lambda: start.phase() in (phase, ENDED))
    else:
        start.wait_for(lambda: start.phase() not in BEGINNING)
        step = dice.randint(life.reached, STEPS - 1)
        start.wait_for(lambda: life.reached >= step and start.phase() in (phase, "final write", ENDED))
    until = time.monotonic() + dice.uniform(0, longest)
    start.wait_for(lambda: time.monotonic() >= until)
    return start.phase()
