"""The launcher: starts a node's ranks, hands them the signals it gets, and returns their one verdict.

It is process 1 of a container: it reaps whatever is orphaned, and its exit code is what Kubernetes sees.
The order of verdicts is: 64 (starting again would not help), a crash's code, 75 (start again), 0.
A node that was not told to stop, while another was, holds, as does one that has lost another: all pods that end in one
instant can make Volcano give the run up. It holds here and not in the ranks, which have saved, and give the devices
and the network back.
Why not torch's elastic agent: it ends the siblings of a rank that leaves with 75 at once, and itself with 143.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from types import FrameType

from entrypoint.errors import EXIT_DONE, EXIT_LOST, EXIT_STOPPED
from entrypoint.launch.rank_process import LAUNCH_VARIABLE, STDERR, STDOUT, Output, RankProcess, start_rank
from entrypoint.launch.restarts import Restarts
from entrypoint.launch.topology import Topology, read_topology
from entrypoint.launch.verdict import Verdict, combine

PATIENCE = 30.0  # seconds: what siblings get after a crash or a 64, and a rank to leave after its verdict
KILL_AFTER = 10.0  # seconds between the SIGTERM that ends the patience and SIGKILL
TIDY = 2.0  # seconds for what the ranks leave behind (such as Python's resource tracker) to leave by itself

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # each is forwarded once: a second one changes nothing
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
        hold: seconds that a node of several waits to be told to stop, once its ranks have stopped because of another.
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
            if _told_in_pause(wakeup, *restarts.pause()):
                return EXIT_STOPPED
            restarts.begin()
    gang = _Gang(grace, patience, kill_after)
    try:
        gang.start(module, argv, {**environ, LAUNCH_VARIABLE: name}, topology)
        while gang.running:
            for signum in _wait(wakeup, gang):
                gang.forward(signum)
            gang.reap()
            gang.enforce()
        verdict = combine(gang.verdicts)
    finally:
        gang.close()
    if restarts and (verdict.crashed or topology.node_rank == 0):
        restarts.note(verdict, topology, told=gang.stopping)
    if topology.nodes > 1 and not gang.stopping:
        if verdict.code == EXIT_STOPPED and verdict.hold:
            _hold(wakeup, "another node was told to stop, this one was not: it holds, saved", hold)
        elif verdict.code == EXIT_LOST:  # nodes that have lost each other don't end in one instant either
            share = hold * (1 + topology.node_rank) / topology.nodes
            _hold(wakeup, "a rank of another node crashed or is lost: this node holds", share)
    return verdict.code


def _told_in_pause(wakeup: int, seconds: float, why: str) -> bool:
    """Wait before the ranks are started; whether a signal said to stop."""
    if seconds:
        _say(f"the last start crashed ({why}); starting again in {seconds:g} s")
    return seconds > 0 and _told_within(wakeup, seconds)


def _hold(wakeup: int, why: str, seconds: float) -> None:
    """Wait to be told to stop, so that the node that has the reason leaves first."""
    _say(f"{why}, for up to {seconds:g} s")
    _told_within(wakeup, seconds)


def _told_within(wakeup: int, seconds: float) -> bool:
    """Whether a signal to stop comes within so many seconds; returns at once when it does."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([wakeup], [], [], left)[0] and set(os.read(wakeup, 4096)) & set(STOP_SIGNALS):
            return True
    return False


class _Gang:
    """The ranks of this node, from their start to the last one's end."""

    def __init__(self, grace: float, patience: float, kill_after: float) -> None:
        self.ranks: list[RankProcess] = []
        self.verdicts: list[Verdict] = []  # in the order of ending
        self._grace, self._patience, self._kill_after = grace, patience, kill_after
        self._grace_ends: float | None = None  # monotonic seconds; set by a signal to stop
        self._output = Output()
        self._forwarded: set[int] = set()
        self._deadline: float | None = None  # monotonic seconds until those left are told to go
        self._told = False  # whether they were

    @property
    def running(self) -> list[RankProcess]:
        return [rank for rank in self.ranks if rank.ended is None]

    @property
    def stopping(self) -> bool:
        """Whether a signal said to stop."""
        return self._grace_ends is not None

    def start(self, module: str, argv: Sequence[str], environ: Mapping[str, str], topology: Topology) -> None:
        base = {"PYTHONUNBUFFERED": "1", **environ}
        if topology.local_ranks > 1:  # else every rank would start a thread on every core
            cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
            base.setdefault("OMP_NUM_THREADS", str(max(1, cores // topology.local_ranks)))
        for local_rank in range(topology.local_ranks):
            own = topology.environ(local_rank)
            rank = int(own["RANK"])
            inherited = [fd for fd in (STDOUT, STDERR) if rank == 0 and (topology.local_ranks == 1 or os.isatty(fd))]
            self.ranks.append(start_rank(module, argv, {**base, **own}, rank, self._output, inherited))
        self._output.start()

    def forward(self, signum: int) -> None:
        """Hand a signal to every rank; a stop signal only the first time."""
        if signum in STOP_SIGNALS:
            if signum in self._forwarded:
                return
            self._forwarded.add(signum)
            self._grace_ends = self._grace_ends or time.monotonic() + self._grace
            told = f"{len(self.running)} ranks are told" if len(self.running) > 1 else "the rank is told"
            _say(f"{signal.Signals(signum).name}: {told}; waiting for them to save and leave")
        for rank in self.running:
            rank.kill(signum)

    def reap(self) -> None:
        """Collect every child that has ended, orphans included, and what the ranks have reported."""
        for rank in self.running:
            rank.read_verdict()
            if rank.reported is not None and rank.overdue_at is None:
                rank.overdue_at = time.monotonic() + self._patience
        by_pid = {rank.pid: rank for rank in self.running}
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                if ended[0] in by_pid:
                    self._end(by_pid[ended[0]], os.waitstatus_to_exitcode(ended[1]))

    def _end(self, rank: RankProcess, how: int) -> None:
        rank.read_verdict()
        rank.ended = how
        code = how if how >= 0 else 128 - how
        if rank.reported is not None:  # it counts, whatever a library's teardown made of it
            self.verdicts.append(rank.reported)
        elif how < 0 and -how in self._forwarded:
            _say(f"rank {rank.rank} left before its first step, with nothing new to save; start the same command again")
            self.verdicts.append(Verdict(EXIT_STOPPED))  # told before it could catch the signal: nothing is broken
        elif how < 0 and self._told:
            return  # our own doing: what made us do it is in the verdict already
        else:
            by = f"was killed by {signal.Signals(-how).name}" if how < 0 else f"ended with {code}"
            self.verdicts.append(Verdict(code, error=f"rank {rank.rank} {by}"))
        verdict = self.verdicts[-1]
        if verdict.code == EXIT_STOPPED and (rank.reported is None or verdict.alone) and self.running:
            self.forward(signal.SIGTERM)  # they would wait for it until the time-out, and call it lost
        if verdict.code not in (EXIT_DONE, EXIT_STOPPED) and self._deadline is None and self.running:
            if rank.reported is None:  # else its own line says why, and is to be the log's last
                _say(f"rank {rank.rank} ended with {code}; the others get {self._patience:g} s to leave")
            self._deadline = time.monotonic() + self._patience

    def enforce(self) -> None:
        """End the ranks whose time is over: by SIGTERM, then by SIGKILL."""
        now = time.monotonic()
        for rank in self.running:
            if rank.overdue_at is not None and now >= rank.overdue_at:
                rank.kill_group(signal.SIGKILL)  # its verdict stands: only its teardown hangs
        if self._grace_ends is not None and now >= self._grace_ends and self.running and not self._told:
            late = ", ".join(str(rank.rank) for rank in self.running)
            _say(f"ranks {late} had not left {self._grace:g} s after the signal (checkpoint.grace_seconds): killed")
            self.verdicts.append(Verdict(EXIT_STOPPED))  # the newest complete checkpoint is what is saved
            self._told, self._deadline = True, now
        if self._deadline is None or now < self._deadline:
            return
        if self.running and not self._told:
            _say(f"ranks {', '.join(str(rank.rank) for rank in self.running)} are late: told to leave")
        for rank in self.running:
            if self._told:
                rank.kill_group(signal.SIGKILL)
            else:
                rank.kill(signal.SIGTERM)
        self._told, self._deadline = True, now + self._kill_after

    def wait_time(self) -> float | None:
        """Seconds until `enforce` has something to do; None: only a signal or a verdict will bring news."""
        moments = [rank.overdue_at for rank in self.running] + [self._deadline]
        moments += [] if self._told else [self._grace_ends]
        due = [moment for moment in moments if moment is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def verdict_fds(self) -> list[int]:
        return [rank.verdict_fd for rank in self.running if rank.reported is None and not rank.silent]

    def close(self) -> None:
        """Leave nothing behind: ranks that still run (only after an error of our own) and what ranks have started."""
        for rank in self.running:
            rank.kill_group(signal.SIGKILL)
        until = time.monotonic() + TIDY
        while _children() and time.monotonic() < until:
            time.sleep(0.02)
        for rank in self.ranks:
            rank.kill_group(signal.SIGKILL)
            os.close(rank.verdict_fd)
        self._output.finish(TIDY)


def _children() -> bool:
    """Reap what has ended; whether a child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass
    except ChildProcessError:
        return False
    return True


def _wait(wakeup: int, gang: _Gang) -> list[int]:
    """Wait for a signal, a verdict or the next deadline; returns the signals to forward, in order."""
    ready, _, _ = select.select([wakeup, *gang.verdict_fds()], [], [], gang.wait_time())
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


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"launcher: {line}", file=sys.stderr, flush=True)
