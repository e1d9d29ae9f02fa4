"""What the servers have in common: a child process with a log, waited for until it answers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

Probe = Callable[[], bool]
PR_SET_PDEATHSIG = 1  # of sys/prctl.h


@contextlib.contextmanager
def serve(
    command: Sequence[str | Path], *, env: Mapping[str, str], log: Path, ready: Probe, timeout: float
) -> Iterator[int]:
    """Run `command` until the block ends; yields its process id once `ready()` is true.

    Raises:
        RuntimeError: it ended or did not answer within `timeout` seconds; the message ends with its log.
    """
    with log.open("wb") as sink:
        # A session of its own: the servers' workers (MLflow's) are ended with them, and Ctrl-C reaches pytest alone.
        child = subprocess.Popen(
            [str(word) for word in command],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    try:
        _await(child, ready, timeout, log)
        yield child.pid
    finally:
        _end(child)


def end_with_parent() -> None:
    """For `preexec_fn`: the child ends with the thread that starts it, so that none is left behind (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _await(child: subprocess.Popen[bytes], ready: Probe, timeout: float, log: Path) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        ended = f"ended with {child.returncode}" if child.poll() is not None else ""
        if ended or time.monotonic() > deadline:
            said = "\n".join(tail(log))
            raise RuntimeError(f"{child.args!r} {ended or f'did not answer within {timeout:.0f} s'}:\n{said}")
        time.sleep(0.02)


def _end(child: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signum)  # start_new_session made it the leader of its own group
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
            if signum == signal.SIGTERM:
                continue  # its workers may outlive it by a moment: the second signal finds them, or nobody
    child.wait()


def tail(log: Path, lines: int = 40) -> list[str]:
    """The last lines of a log."""
    return log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
