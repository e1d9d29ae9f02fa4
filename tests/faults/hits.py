"""What is done to a start: signals, to whom, and the exit codes that may follow."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.faults.judge import Wrong
from tests.faults.life import Start
from tests.faults.scene import TIMEOUT

SLACK = 20  # seconds on a busy machine
KILLED, TERMINATED = 128 + signal.SIGKILL, 128 + signal.SIGTERM

Hit = Callable[[Start, random.Random], tuple[int, ...]]  # does it, and returns the exit codes that may follow


def lose(start: Start, dice: random.Random) -> tuple[int, ...]:
    start.lose()
    return (-signal.SIGKILL, 0)


def kill_rank(start: Start, dice: random.Random) -> tuple[int, ...]:
    """One rank; a verdict that it has given already stands."""
    if ranks := all_ranks(start):
        send(dice.choice(ranks), signal.SIGKILL)
    return (KILLED, 0)


def stop_rank(start: Start, dice: random.Random) -> tuple[int, ...]:
    """SIGSTOP to one; the other leaves by the time-out, and the launcher ends the stopped one."""
    ranks = all_ranks(start)
    if not ranks:
        return (0,)
    victim, other = dice.sample(ranks, 2)
    send(victim, signal.SIGSTOP)
    try:
        other.wait(TIMEOUT + SLACK)
    except psutil.TimeoutExpired as error:
        raise Wrong(f"{start.life.folder}: a rank is there {TIMEOUT + SLACK} s after another was stopped") from error
    return (76, 0)


@contextmanager
def standing_still(processes: list[psutil.Process]) -> Iterator[None]:
    """SIGSTOP to all of them, for the time of the block."""
    try:
        for process in processes:
            send(process, signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            send(process, signal.SIGCONT)


def tell_launcher(start: Start, dice: random.Random) -> tuple[int, ...]:
    heard = catches(start.process.pid)
    start.process.send_signal(signal.SIGTERM)
    return (75, 0) if heard else (75, 0, -signal.SIGTERM)


def tell_rank(start: Start, dice: random.Random) -> tuple[int, ...]:
    ranks = all_ranks(start)
    return tell(start, [dice.choice(ranks)] if ranks else [])


def tell_ranks(start: Start, dice: random.Random) -> tuple[int, ...]:
    return tell(start, all_ranks(start))


def tell_twice(start: Start, dice: random.Random) -> tuple[int, ...]:
    first = tell_launcher(start, dice)
    until = time.monotonic() + dice.uniform(0, 0.5)
    start.wait_for(lambda: time.monotonic() >= until)
    return first + (tell_launcher if dice.random() < 0.5 else tell_ranks)(start, dice)


TOLD: dict[str, Hit] = {"launcher": tell_launcher, "one rank": tell_rank, "all ranks": tell_ranks, "twice": tell_twice}


def tell(start: Start, ranks: list[psutil.Process]) -> tuple[int, ...]:
    """SIGTERM to these ranks themselves; one whose Python has not begun yet can't catch it, and is a killed rank."""
    heard = all(catches(rank.pid) for rank in ranks)
    for rank in ranks:
        send(rank, signal.SIGTERM)
    return (75, 0) if heard else (75, 0, TERMINATED)


def send(process: psutil.Process, signum: int) -> None:
    """A signal to one that may have ended since it was looked for."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signum)


def catches(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM; one that is gone needs none."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return True


def all_ranks(start: Start) -> list[psutil.Process]:
    """The ranks, once all of them are there; none where the run has ended."""
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = start.ranks()
        return len(found) == start.life.ranks

    return found if start.wait_for(there) else []
