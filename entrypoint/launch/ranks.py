"""Ranks: those of one node, from their start to the last one's end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence

from entrypoint.errors import EXIT_DONE, EXIT_STOPPED
from entrypoint.launch.rank_process import STDERR, STDOUT, Output, RankProcess, start_rank
from entrypoint.launch.topology import Topology
from entrypoint.launch.verdict import Verdict

TIDY = 2.0  # seconds for what the ranks leave behind (such as Python's resource tracker) to leave by itself
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # each is forwarded once: a second one changes nothing


class Ranks:
    """The ranks of this node; owns all children of the process.

    Args:
        grace: seconds from a signal to stop until ranks that are still there are killed.
        patience: seconds that the others get after a crash or a 64, before SIGTERM.
        kill_after: seconds between that SIGTERM and SIGKILL.

    Attributes:
        verdicts: in the order of ending.
        told: whether the first signal to stop came before anything had broken here.
    """

    def __init__(self, grace: float, patience: float, kill_after: float) -> None:
        self.ranks: list[RankProcess] = []
        self.verdicts: list[Verdict] = []
        self.told = False
        self._grace, self._patience, self._kill_after = grace, patience, kill_after
        self._grace_ends: float | None = None  # monotonic seconds; set by a signal to stop
        self._output = Output()
        self._forwarded: set[int] = set()
        self._deadline: float | None = None  # monotonic seconds until those left are told to go
        self._told = False  # whether they were

    @property
    def running(self) -> list[RankProcess]:
        """Those that have not ended."""
        return [rank for rank in self.ranks if rank.ended is None]

    @property
    def stopping(self) -> bool:
        """Whether a signal said to stop."""
        return self._grace_ends is not None

    @property
    def killed_alone(self) -> bool:
        """Whether a rank was killed, or killed itself by a fault, and another was not."""
        killed = sum(verdict.code > 128 for verdict in self.verdicts)
        return 0 < killed < len(self.ranks)

    def start(self, module: str, argv: Sequence[str], environ: Mapping[str, str], topology: Topology) -> None:
        """Start `python -m module argv` for each rank of this node."""
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
            known = self._known()
            if self._grace_ends is None:
                self._grace_ends = time.monotonic() + self._grace
                self.told = not any(verdict.crashed for verdict in known)
            if waiting := [rank for rank in self.running if rank.reported is None]:  # else their line is the last
                told = f"{len(waiting)} ranks are told" if len(waiting) > 1 else "the rank is told"
                say(f"{signal.Signals(signum).name}: {told}; waiting for them to save and leave")
        for rank in self.running:
            rank.kill(signum)

    def _known(self) -> list[Verdict]:
        """The verdicts so far, and what the ranks that still run have reported."""
        for rank in self.running:
            rank.read_verdict()
        return [*self.verdicts, *(rank.reported for rank in self.running if rank.reported is not None)]

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
            say(f"rank {rank.rank} left before its first step, with nothing new to save; start the same command again")
            self.verdicts.append(Verdict(EXIT_STOPPED))  # before it could catch the signal: nothing is broken
        elif how < 0 and self._told:
            return  # our own doing: what made us do it is in the verdict already
        else:
            by = f"was killed by {signal.Signals(-how).name}" if how < 0 else f"ended with {code}"
            told = code == EXIT_STOPPED  # before its imports: later it would have reported
            self.verdicts.append(Verdict(code, told=told, error=f"rank {rank.rank} {by}"))
        verdict = self.verdicts[-1]
        if verdict.code == EXIT_STOPPED and (rank.reported is None or verdict.alone) and self.running:
            self.forward(signal.SIGTERM)  # they would wait for it until the time-out, and call it lost
        if verdict.code not in (EXIT_DONE, EXIT_STOPPED) and self._deadline is None and self.running:
            if rank.reported is None:  # else its own line says why, and is to be the log's last
                say(f"rank {rank.rank} ended with {code}; the others get {self._patience:g} s to leave")
            self._deadline = time.monotonic() + self._patience

    def enforce(self) -> None:
        """End the ranks whose time is over: by SIGTERM, then by SIGKILL."""
        now = time.monotonic()
        for rank in self.running:
            if rank.overdue_at is not None and now >= rank.overdue_at:
                rank.kill_group(signal.SIGKILL)  # its verdict stands: only its teardown hangs
        if self._grace_ends is not None and now >= self._grace_ends and self.running and not self._told:
            late = ", ".join(str(rank.rank) for rank in self.running)
            say(f"ranks {late} had not left {self._grace:g} s after the signal (checkpoint.grace_seconds): killed")
            self.verdicts.append(Verdict(EXIT_STOPPED))  # the newest complete checkpoint is what is saved
            self._told, self._deadline = True, now
        if self._deadline is None or now < self._deadline:
            return
        if self.running and not self._told:
            say(f"ranks {', '.join(str(rank.rank) for rank in self.running)} are late: told to leave")
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
        """Descriptors on which a rank may still report."""
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


def say(line: str) -> None:
    """A line of the launcher's own."""
    with contextlib.suppress(OSError, ValueError):
        print(f"launcher: {line}", file=sys.stderr, flush=True)
