"""A moment of a start (a phase, by its progress, and a random time into it), and what is done to it then."""

from __future__ import annotations

import random
import time
from contextlib import suppress

import psutil

from tests.faults.hits import Hit
from tests.faults.judge import STOPPED, Broken, Wrong, check
from tests.faults.life import BEGINNING, COURSE, ENDED, PHASES, Life, Start
from tests.faults.scene import SAVE_EVERY, STEPS

BREAKS = 3  # faults in the life of one run
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


def strike(
    start: Start,
    phase: str,
    longest: dict[str, float],
    dice: random.Random,
    hit: Hit,
    what: str,
    *,
    last: int = STEPS - 1,
) -> Broken:
    """Break a start at a moment (see `aim`) and wait for its end; "ended" where the run was faster."""
    at = aim(start, phase, longest, dice, last)
    begun = time.monotonic()
    codes: tuple[int, ...] = (0,) if at == ENDED else hit(start, dice)
    ended = start.end()
    seconds = time.monotonic() - begun
    check(ended.code, codes, start, ended)
    if ended.code == 0 and not start.done:
        raise Wrong(f"{start.life.folder}: start {start.life.starts} ended with 0 and without run.json")
    return Broken(
        phase=at,
        how=STOPPED,
        what=what,
        code=ended.code,
        counted=start.known and not start.done,
        # Training goes on while a checkpoint is written: one that was under way is lost too.
        repeat=2 * SAVE_EVERY,
        seconds=seconds,
        real=start.real,
    )


def moments(life: Life, dice: random.Random, *, real: bool) -> list[str]:
    """BREAKS phases in the order in which a run that is started again comes through them.

    A `real` first start is broken in its imports: that is what the others don't have.
    """
    phases = [phase for phase in PHASES if phase != "upload" or "checkpoint.mirror" in life.words]
    chosen = ["start"] * real + dice.choices(phases, k=BREAKS - real)
    return sorted(chosen, key=lambda phase: min(PHASES.index(phase), PHASES.index("step")) + (phase == "final write"))
