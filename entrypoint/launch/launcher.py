"""The launcher: starts a node's ranks, hands them the signals it gets, and returns their one verdict.

It is process 1 of a container: it reaps whatever is orphaned, and its exit code is what Kubernetes sees.
The order of verdicts is: 64 (starting again would not help), a crash's code, 75 (start again), 0.
All pods that end in one instant can make Volcano give the run up, so nodes leave one after another: the one that was
told to stop at once, the others after a hold that the scheduler's SIGTERM, which follows the first end, cuts short. See
`_hold_time`. They hold here and not in the ranks, which have saved, and give the devices and the network back.
Why not torch's elastic agent: it ends the siblings of a rank that leaves with 75 at once, and itself with 143.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from types import FrameType

from entrypoint.attempts import ABORTED
from entrypoint.errors import EXIT_DONE, EXIT_LOST, EXIT_REFUSED, EXIT_STOPPED
from entrypoint.launch.rank_process import LAUNCH_VARIABLE
from entrypoint.launch.ranks import STOP_SIGNALS, Ranks, say
from entrypoint.launch.restarts import Restarts
from entrypoint.launch.topology import Topology, read_topology
from entrypoint.launch.verdict import Verdict, combine

PATIENCE = 30.0  # seconds: what siblings get after a crash or a 64, and a rank to leave after its verdict
KILL_AFTER = 10.0  # seconds between the SIGTERM that ends the patience and SIGKILL
SAVE_SIGNAL = signal.SIGUSR1  # save now, go on: every one is forwarded


def launch(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    module: str = "entrypoint",
    restarts: Restarts | None = None,
    grace: float = 120.0,
    hold: float = 0.0,
    patience: float = PATIENCE,
    kill_after: float = KILL_AFTER,
) -> int:
    """Start this node's ranks and wait for them; owns the process: its signal handlers and all of its children.

    Args:
        argv: arguments of every rank.
        environ: base of the ranks' environment; see `read_topology` for what is read from it.
        module: what `python -m` runs as a rank.
        restarts: the run's earlier starts: after a crash there is a pause, after several a refusal.
        grace: seconds from a signal to stop until ranks that are still there are killed.
        hold: seconds over which the nodes of a run leave one after another, where they were not told to stop.
        patience: seconds that the others get after a crash or a 64, before SIGTERM.
        kill_after: seconds between that SIGTERM and SIGKILL.

    Returns:
        The ranks' verdict: 64, else the first crash's code (128 + N for signal N), else 75, else 0.

    Raises:
        ConfigError: the environment does not say where ranks meet.
        CrashedError: the run has crashed too often.
    """
    topology = read_topology(environ)
    wakeup = _catch_signals()
    _adopt_orphans()
    name = uuid.uuid4().hex
    if restarts:
        restarts.story.launch = name
        if topology.node_rank == 0:
            restarts.begin(topology.nodes)
            if _told_in_pause(wakeup, *restarts.pause()):
                restarts.note(Verdict(EXIT_STOPPED), 0, told=True)
                return EXIT_STOPPED
    ranks = Ranks(grace, patience, kill_after)
    try:
        ranks.start(module, argv, {**environ, LAUNCH_VARIABLE: name}, topology)
        while ranks.running:
            for signum in _wait(wakeup, ranks):
                ranks.forward(signum)
            ranks.reap()
            ranks.enforce()
        verdict = combine(ranks.verdicts)
    finally:
        ranks.close()
    if restarts and (verdict.crashed or topology.node_rank == 0):
        restarts.note(verdict, topology.node_rank, told=ranks.told)
    seconds, why = _hold_time(verdict, topology, hold, one=ranks.killed_alone)
    if seconds and not ranks.stopping:
        say(f"{why}, for up to {seconds:g} s")
        _told_within(wakeup, seconds)
    return verdict.code


def _told_in_pause(wakeup: int, seconds: float, why: str) -> bool:
    """Wait before the ranks are started; whether a signal said to stop."""
    if seconds:
        say(f"the last start crashed ({why}); starting again in {seconds:g} s")
    return seconds > 0 and _told_within(wakeup, seconds)


def _hold_time(verdict: Verdict, topology: Topology, hold: float, *, one: bool) -> tuple[float, str]:
    """Seconds that a node which was not told to stop stays before it ends, and why.

    Nothing says whether the other nodes end for the same reason in the same instant: a bug that every rank meets in
    one step, a storage that is away for all. So each has a moment of its own: node i of n leaves at i/n of `hold`
    where its own ranks ended, half a share later where it has only lost another's, and at the end of `hold` where
    another was told to stop, or could not reach its storage. After 0 and 64 nothing is started again. A node that
    was told is the first to leave, and so is one of whose ranks `one` was killed: that is no end that all nodes meet.
    An abort is none of these: NCCL's watchdog brings it to some of the ranks of every node that has lost another.
    """
    node, share = topology.node_rank, hold / topology.nodes
    if topology.nodes == 1 or verdict.told or verdict.code in (EXIT_DONE, EXIT_REFUSED):
        return 0.0, ""
    if one and verdict.code > 128 and verdict.code != ABORTED:
        return 0.0, ""
    if verdict.code == EXIT_LOST:
        return share * (node + 0.5), "a rank of another node crashed or is lost: this node holds"
    if verdict.code == EXIT_STOPPED and verdict.hold:
        return hold, "the reason to stop is another node's: this node holds"
    return share * node, "other nodes may have ended in the same instant: this node holds"


def _told_within(wakeup: int, seconds: float) -> bool:
    """Whether a signal to stop comes within so many seconds; returns at once when it does."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([wakeup], [], [], left)[0] and set(os.read(wakeup, 4096)) & set(STOP_SIGNALS):
            return True
    return False


def _wait(wakeup: int, ranks: Ranks) -> list[int]:
    """Wait for a signal, a verdict or the next deadline; returns the signals to forward, in order."""
    ready, _, _ = select.select([wakeup, *ranks.verdict_fds()], [], [], ranks.wait_time())
    numbers = os.read(wakeup, 4096) if wakeup in ready else b""
    return [number for number in numbers if number != signal.SIGCHLD]


def _catch_signals() -> int:
    """Turn signals into bytes on a pipe: they are handled in the loop, between two lines, never inside one.

    The handlers stay: a signal that comes after the verdict must not replace it.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for signum in (*STOP_SIGNALS, SAVE_SIGNAL, signal.SIGCHLD):
        signal.signal(signum, _nothing)
    return reader


def _nothing(signum: int, frame: FrameType | None) -> None:
    """The byte on the wakeup pipe is the news."""


def _adopt_orphans() -> None:
    """Get what process 1 gets, also where it is another: orphaned descendants are reaped here (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
