"""`Zygote`: asks a process that has all libraries for runs, each a fork of it; see `forking.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.process import ROOT, scrubbed


@dataclass(frozen=True)
class Request:
    """One start of the program.

    Attributes:
        fsdp: let FSDP2 run on CPU, which it does not by itself.
        clock: seconds by which the program's wall clock is wrong.
        patience: seconds that the launcher gives the other ranks after one's end, and again before SIGKILL, where those
            are not its own.
    """

    argv: list[str]
    env: dict[str, str]
    stdout: str
    stderr: str
    fsdp: bool = False
    clock: float = 0.0
    patience: float | None = None


@dataclass
class Forked:
    """A started launcher; what `subprocess.Popen` offers of one."""

    pid: int
    returncode: int | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code, -N for signal N.

        Raises:
            TimeoutError: it has not ended.
        """
        if not self.ended.wait(timeout):
            raise TimeoutError(f"process {self.pid} has not ended within {timeout:.0f} s")
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has ended, and its code is on the way
                os.kill(self.pid, signum)


class Zygote:
    """The forking process, for use by any number of threads; ended by `close`.

    Args:
        model: where it makes the tiny model.

    Attributes:
        model: the tiny model's folder.
        cpu: seconds of a core that its imports took: what those of a real start take too.
    """

    def __init__(self, model: Path) -> None:
        self.model = model
        self._asking, self._replied = threading.Lock(), threading.Semaphore(0)
        self._pids: list[int] = []
        self._running: dict[int, Forked] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forking", str(model)],
            env=scrubbed(),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        ready = json.loads(self._process.stdout.readline())
        if ready["threads"]:
            raise RuntimeError(f"the zygote has threads after its imports ({ready['threads']}): no fork of it is safe")
        self.cpu: float = ready["cpu"]
        threading.Thread(target=self._read, name="zygote", daemon=True).start()

    def start(self, request: Request) -> Forked:
        """Fork a launcher."""
        line = json.dumps(vars(request)) + "\n"
        assert self._process.stdin is not None
        with self._asking:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
            if not self._replied.acquire(timeout=120):
                raise RuntimeError("the zygote does not answer")
            return self._running[self._pids.pop()]

    def kill_all(self) -> None:
        """What it has forked and still runs; their ranks die with them."""
        for forked in [*self._running.values()]:
            forked.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End it, and what it has forked with it."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "code" in said:
                forked = self._running.pop(said["pid"])
                forked.returncode = said["code"]
                forked.ended.set()
            else:
                self._running[said["pid"]] = Forked(said["pid"])
                self._pids.append(said["pid"])
                self._replied.release()
