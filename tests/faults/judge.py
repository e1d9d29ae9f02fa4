"""The judge of every case: whatever happened, the run ended as the straight one did, and said what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.e2e.runs import Ended, maths, sha256
from tests.faults.life import Life, Start

STOPPED, CRASH, LOST = "stopped", "crash", "lost"  # as run.json["story"] says how a start ended


class Wrong(AssertionError):
    """The run did not do what it must: what was found, what was expected."""


@dataclass
class Broken:
    """A fault and what came of it.

    Attributes:
        phase: where it hit; "ended": it came too late, and is none.
        how: what the story must call the start's end.
        counted: whether the story knows this start: it had looked at the checkpoints, and was not done.
        repeat: the most steps that may be done again because of it.
        seconds: from the fault to the end of the process.
        real: whether the real command had been started.
    """

    phase: str
    how: str
    what: str
    code: int
    counted: bool
    repeat: int
    seconds: float
    real: bool = False


@dataclass
class Verdict:
    """What a case has shown."""

    faults: list[Broken] = field(default_factory=list)
    repeated: list[tuple[str, int]] = field(default_factory=list)  # how a start ended, and the steps done again
    injected: int = 0  # faults of the storage


def check(code: int, expected: tuple[int, ...], start: Start, ended: Ended) -> None:
    """The exit code is by the contract, and what ends so by intention has no traceback.

    Raises:
        Wrong: it is not.
    """
    last = f"{start.life.folder}, start {start.life.starts}: {ended.err[-1500:]}"
    if code not in expected:
        raise Wrong(f"ended with {code}, expected {expected}; {last}")
    if code in (0, 64, 75) and "Traceback" in ended.err:
        raise Wrong(f"ended with {code} and a traceback; {last}")


def finish(life: Life, straight: Ended, verdict: Verdict, *, ranks: int | None = None) -> Ended:
    """Start the run until it is done, and compare it with the straight one: exactly, or of another world size nearly.

    Raises:
        Wrong, AssertionError: it differs.
    """
    start = life.start(ranks=ranks)
    ended = start.end()
    check(ended.code, (0,), start, ended)
    if ranks is None:
        exact(ended, straight)
    else:
        from tests.e2e.oracle import assert_same_course, assert_same_weights  # imports torch: few cases need it

        assert_same_course(ended, straight)
        assert_same_weights(ended, straight, share=1e-5)
    told(ended, verdict)
    return ended


def exact(ended: Ended, straight: Ended, *, since: int = 0) -> None:
    """Each metric of each step and evaluation, every file and run.json's numbers, to the last bit.

    Args:
        since: the first step whose metrics are there: those before it were lost with a disk.
    """
    ours, theirs = ([line for line in maths(run) if line[0] >= since] for run in (ended, straight))
    if ours != theirs:
        at = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), (len(ours), len(theirs)))
        raise Wrong(f"{ended.checkpoints}: {at[0]}, expected {at[1]}")
    for name in ("files", "counts", "metrics"):
        if ended.record[name] != straight.record[name]:
            raise Wrong(f"{ended.output}/run.json: {name}: {ended.record[name]}, expected {straight.record[name]}")
    for name, said in ended.record["files"].items():
        if sha256(ended.output / name) != said["sha256"]:
            raise Wrong(f"{ended.output / name}: is not what run.json says")


def told(ended: Ended, verdict: Verdict) -> None:
    """The story has every start that was broken, calls it what it was, and repeats no more than it may.

    Raises:
        Wrong: it has not.
    """
    story: dict[str, Any] = ended.record["story"]
    expected = [fault for fault in verdict.faults if fault.counted]
    found = [restart["how"] for restart in story["restarts"]]
    if found != [fault.how for fault in expected]:
        raise Wrong(f"{ended.output}/run.json: starts ended {found}, expected {[fault.how for fault in expected]}")
    for fault, restart in zip(expected, story["restarts"], strict=True):
        steps = int(restart["steps_repeated"])
        verdict.repeated.append((fault.how, steps))
        if steps > fault.repeat:
            raise Wrong(f"{ended.output}/run.json: {steps} steps repeated after {fault.what}, at most {fault.repeat}")
