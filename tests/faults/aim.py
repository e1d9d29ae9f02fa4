"""A moment of a start: a phase, by its progress, and a random time into it."""

from __future__ import annotations

import random
import time
from contextlib import suppress

import psutil

from tests.faults.life import BEGINNING, COURSE, PHASES, Start
from tests.faults.scene import STEPS

SHORT = 0.3  # seconds into a phase that the straight run was not seen in: an upload, a save that was fast


def aim(start: Start, phase: str, longest: dict[str, float], dice: random.Random, last: int = STEPS - 1) -> str:
    """Wait for the moment; returns the phase that the start is in then: a later one, or "ended", where it was fast.

    Args:
        phase: one of PHASES.
        longest: seconds that the straight run was in each.
        last: the step that is waited for at most.
    """
    if phase == "start" and start.real:
        return importing(start, dice)
    if phase in BEGINNING:
        here: tuple[str, ...] = (phase,)
        start.wait_for(lambda: start.phase() not in PHASES[: PHASES.index(phase)])
    elif phase == "final write":
        here = (phase,)
        start.wait_for(lambda: start.phase() == phase)
    else:
        here = COURSE
        start.wait_for(lambda: start.phase() not in BEGINNING)
        step = dice.randint(min(start.reached, last), last)
        start.wait_for(lambda: start.reached >= step and start.phase() in (phase, "final write"))
    until = time.monotonic() + dice.uniform(0, longest.get(phase, SHORT))
    start.wait_for(lambda: time.monotonic() >= until or start.phase() not in here)
    return start.phase()


def importing(start: Start, dice: random.Random) -> str:
    """A moment of the imports of a real start, by what the rank has computed: how long they take is the machine's."""
    enough = dice.uniform(0, start.life.zygote.cpu)

    def computed() -> bool:
        with suppress(psutil.Error):
            times = [rank.cpu_times() for rank in start.ranks()[:1]]
            return sum(each.user + each.system for each in times) >= enough or start.phase() != "start"
        return False

    start.wait_for(computed)
    return start.phase()
