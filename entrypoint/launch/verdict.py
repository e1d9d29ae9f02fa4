"""Verdict: what a rank says of its own end, to the launcher that started it, and one verdict of many."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import stat
import sys
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import NoReturn

from entrypoint.errors import EXIT_DONE, EXIT_LOST, EXIT_REFUSED, EXIT_STOPPED

VERDICT_VARIABLE = "ENTRYPOINT_VERDICT"  # number of the inherited descriptor that a rank writes its verdict to
LONGEST = 4000  # bytes: a pipe takes so many whole or not at all (PIPE_BUF)


@dataclass(frozen=True)
class Verdict:
    """A rank's end.

    Attributes:
        code: the exit code.
        hold: with 75: the reason is another node's, which is to leave first.
        alone: with 75: it was told and left at once, without the others' agreement; they may not know and call it lost.
        error: one line, where the code is a crash's.
    """

    code: int
    hold: bool = False
    error: str = ""
    alone: bool = False

    @property
    def crashed(self) -> bool:
        """Whether something broke, here or in another rank."""
        return self.code not in (EXIT_DONE, EXIT_REFUSED, EXIT_STOPPED)


def report(verdict: Verdict) -> None:
    """Tell the launcher; nothing that happens later in the process can change it.

    An abort in a library's teardown (NCCL, gloo) would otherwise turn a finished or saved run into a crash.
    Does nothing more than flush in a process that no launcher of ours started.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    descriptor = os.environ.pop(VERDICT_VARIABLE, None)
    if descriptor is None or "WORLD_SIZE" not in os.environ:
        return
    said = json.dumps(asdict(replace(verdict, error=verdict.error[:500])))
    with contextlib.suppress(OSError, ValueError):
        if stat.S_ISFIFO(os.fstat(int(descriptor)).st_mode):
            os.write(int(descriptor), f"{said}\n".encode())
            os.close(int(descriptor))


def leave(code: int, seconds: float) -> NoReturn:
    """End the process without the interpreter's own end, in which libraries (gloo, NCCL) abort now and then.

    What was registered for the end is done all the same, for at most `seconds`.
    """
    tidy = threading.Thread(target=atexit._run_exitfuncs, name="leave", daemon=True)
    tidy.start()
    tidy.join(seconds)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def parse(text: str) -> Verdict | None:
    """What `report` wrote; None: nothing, or not that."""
    try:
        return Verdict(**json.loads(text))
    except (ValueError, TypeError):
        return None


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict of many, in the order in which they came: 64, else the first crash, else 75, else 0.

    A crash counts before what the others say of a lost rank, and so does a rank that was told and left without them.
    A node holds where all of its ranks that stopped would.
    """
    verdicts = list(verdicts)
    explained = any(verdict.alone for verdict in verdicts)
    crashes = [verdict for verdict in verdicts if verdict.crashed and not (explained and verdict.code == EXIT_LOST)]
    crashes.sort(key=lambda verdict: verdict.code == EXIT_LOST)  # stable
    refused = [verdict for verdict in verdicts if verdict.code == EXIT_REFUSED]
    stopped = [verdict for verdict in verdicts if verdict.code == EXIT_STOPPED]
    if first := [*refused, *crashes]:
        return first[0]
    return Verdict(EXIT_STOPPED, hold=all(verdict.hold for verdict in stopped)) if stopped else Verdict(EXIT_DONE)
