"""Rank process: one rank started so that it can't outlive its launcher, and its output told from the others'."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from entrypoint.launch.verdict import LONGEST, VERDICT_VARIABLE, Verdict, parse

LAUNCH_VARIABLE = "ENTRYPOINT_LAUNCH"  # tells one start of this node's ranks from another
STDOUT, STDERR = 1, 2
LONGEST_LINE = 1 << 16  # bytes; a longer one is cut into lines of its own

# Becomes the rank by exec, which keeps the parent-death signal: no code runs between fork and exec in the launcher's
# copy (preexec_fn can deadlock). SIGUSR1 ("save now, go on") must not kill a rank that has no handler for it yet.
_GUARD = """
import ctypes, os, signal, sys
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    os._exit(137)  # the launcher died before the line above
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass
class RankProcess:
    """A started rank; `pid` is also its process group and session."""

    rank: int
    pid: int
    verdict_fd: int
    silent: bool = False  # whether it can't report any more: its end of the pipe is closed
    reported: Verdict | None = None  # what the rank itself says of its end
    overdue_at: float | None = None  # monotonic seconds; set once it has reported
    ended: int | None = None  # how the process ended: exit code, or -N for signal N

    def read_verdict(self) -> None:
        """Take what the rank has reported so far, without waiting."""
        with contextlib.suppress(BlockingIOError):
            text = os.read(self.verdict_fd, LONGEST)
            self.silent = not text
            self.reported = self.reported or parse(text.decode(errors="replace"))

    def kill(self, signum: int) -> None:
        """Send a signal to the rank alone; it is its business what its own children are told."""
        if self.ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def kill_group(self, signum: int) -> None:
        """Send a signal to the rank and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)


def start_rank(
    module: str, argv: Sequence[str], environ: Mapping[str, str], rank: int, output: Output, inherited: Collection[int]
) -> RankProcess:
    """Start `python -m module argv` as one rank.

    Args:
        environ: the rank's whole environment.
        output: where the lines of STDOUT and STDERR go that are not inherited.
        inherited: which of the two the rank writes to itself, so that a progress bar on a terminal is one.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    command = [sys.executable, "-m", module, *argv]
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), *command]
    process = subprocess.Popen(
        command,
        env={**environ, VERDICT_VARIABLE: str(writer)},
        pass_fds=(writer,),
        stdin=subprocess.DEVNULL,
        stdout=None if STDOUT in inherited else subprocess.PIPE,
        stderr=None if STDERR in inherited else subprocess.PIPE,
        start_new_session=True,
    )
    os.close(writer)
    process.returncode = 0  # the launcher reaps by itself: Popen must neither wait for it nor warn
    for pipe, target in ((process.stdout, STDOUT), (process.stderr, STDERR)):
        if pipe is not None:
            output.add(rank, os.dup(pipe.fileno()), target)
            pipe.close()
    return RankProcess(rank, process.pid, reader)


class Output:
    """Copies ranks' lines whole to stdout and stderr, those of rank N > 0 behind `[rank N] `.

    In a thread, so that a reader who does not read delays no signal.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._copy, name="rank-output", daemon=True)

    def add(self, rank: int, source: int, target: int) -> None:
        """Copy the descriptor `source` of a rank to `target`; before `start`."""
        self._selector.register(
            source, selectors.EVENT_READ, _Stream(f"[rank {rank}] ".encode() if rank else b"", target)
        )

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout: float) -> None:
        """Wait for the last lines, at most `timeout` seconds: a stray process may hold a pipe open for ever."""
        self._thread.join(timeout)

    def _copy(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                block = os.read(key.fd, LONGEST_LINE)
                key.data.feed(block)
                if not block:
                    self._selector.unregister(key.fd)
                    os.close(key.fd)


@dataclass
class _Stream:
    prefix: bytes
    target: int
    rest: bytes = b""

    def feed(self, block: bytes) -> None:
        """Write the whole lines of `block`; an empty block is the end and flushes what is left."""
        *lines, self.rest = (self.rest + block).split(b"\n")
        if self.rest and (not block or len(self.rest) >= LONGEST_LINE):
            lines, self.rest = [*lines, self.rest], b""
        content = b"".join(self.prefix + line + b"\n" for line in lines)
        with contextlib.suppress(OSError):  # nobody reads any more: the ranks must not be held up by it
            while content:
                content = content[os.write(self.target, content) :]
