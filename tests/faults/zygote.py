"""A process that has imported what a run imports, and forks runs: a start costs a tenth of a second, not fifteen.

What it forks is the program: the launcher in a session of its own, and as its ranks what `entrypoint.launch` makes of
them, with one function replaced: a rank is forked from its launcher where the real one executes Python anew. Signals,
exit codes, files, pipes and parent-death signals are the real ones. What differs: no time passes in imports, and the
order of a set of strings is the same in every start. A share of the cases starts the real command for that.

    python -m tests.faults.zygote MODEL    makes the tiny model there, since it has torch; then a `Request` a line on
                                           stdin, and {"pid"} and {"pid", "code"} on stdout
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.process import ROOT, scrubbed

PR_SET_PDEATHSIG = 1  # of sys/prctl.h
FORK_SAFE = "jemalloc_bg_thd"  # of pyarrow; jemalloc stops and starts it around a fork
LIBRARIES = (
    "entrypoint.__main__",
    "entrypoint.command",
    "entrypoint.run",
    "accelerate.utils.fsdp_utils",
    "fsspec.implementations.local",
    "s3fs",
    "safetensors.torch",
    "tests.trainers.fsdp_on_cpu",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
    "trl.trainer.dpo_trainer",
    "trl.trainer.grpo_trainer",
)


@dataclass(frozen=True)
class Request:
    """One start of the program.

    Attributes:
        fsdp: let FSDP2 run on CPU, which it does not by itself.
        clock: seconds by which the program's wall clock is wrong.
    """

    argv: list[str]
    env: dict[str, str]
    stdout: str
    stderr: str
    fsdp: bool = False
    clock: float = 0.0


# The zygote ----------------------------------------------------------------------------------------------------------


def serve(model: Path) -> None:
    """Fork what is asked for until stdin ends; one thread, so that a fork is safe."""
    _die_with_parent(signal.SIGKILL)
    for name in LIBRARIES:
        __import__(name)
    imported = time.process_time()
    if not (maker := os.fork()):  # it computes, which makes threads
        from tests.tiny import tiny_model

        os.dup2(2, 1)
        tiny_model(model)
        os._exit(0)
    os.waitpid(maker, 0)
    threads = [Path(f"/proc/self/task/{name}/comm").read_text().strip() for name in os.listdir("/proc/self/task")]
    _reply({"threads": sorted({*threads[1:]} - {FORK_SAFE}), "cpu": imported})
    running: set[int] = set()
    rest = b""
    while True:
        if select.select([0], [], [], 0.01 if running else None)[0]:
            block = os.read(0, 1 << 16)
            if not block:
                break
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                running.add(pid := _fork(Request(**json.loads(line))))
                _reply({"pid": pid})
        for pid in [*running]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                _reply({"pid": pid, "code": os.waitstatus_to_exitcode(status)})
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _reply(said: dict[str, Any]) -> None:
    os.write(1, (json.dumps(said) + "\n").encode())


def _fork(request: Request) -> int:
    """The pid of a launcher that does what is asked for."""
    if pid := os.fork():
        return pid
    try:
        _die_with_parent(signal.SIGKILL)
        os.setsid()
        for path, descriptor in ((os.devnull, 0), (request.stdout, 1), (request.stderr, 2)):
            opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(opened, descriptor)
        _close_all_but()
        os.chdir(ROOT)
        _become(request)
    except BaseException as error:
        os.write(2, f"zygote: {error!r}\n".encode())
    os._exit(1)


def _become(request: Request) -> None:
    """`python -m entrypoint <argv>`, to its end."""
    from entrypoint.__main__ import leave_early
    from entrypoint.command import main
    from entrypoint.launch import launcher

    def start_rank(
        module: str, argv: Sequence[str], environ: Mapping[str, str], rank: int, output: Any, inherited: Collection[int]
    ) -> Any:
        return _forked_rank(request, argv, environ, rank, output, inherited)

    launcher.start_rank = start_rank  # type: ignore[attr-defined]
    _set_environment(request.env)
    signal.signal(signal.SIGTERM, leave_early)
    signal.signal(signal.SIGINT, leave_early)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.argv = ["entrypoint", *request.argv]
    code = main(request.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _forked_rank(
    request: Request,
    argv: Sequence[str],
    environ: Mapping[str, str],
    rank: int,
    output: Any,
    inherited: Collection[int],
) -> Any:
    """As `entrypoint.launch.rank_process.start_rank`, without executing Python anew."""
    from entrypoint.__main__ import leave_early
    from entrypoint.launch.rank_process import STDERR, STDOUT, RankProcess
    from entrypoint.launch.verdict import VERDICT_VARIABLE

    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    pipes = {target: os.pipe() for target in (STDOUT, STDERR) if target not in inherited}
    launcher = os.getpid()
    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD)
    signal.pthread_sigmask(signal.SIG_BLOCK, caught)
    if not (pid := os.fork()):
        try:
            _die_with_parent(signal.SIGKILL)
            if os.getppid() != launcher:
                os._exit(137)
            os.setsid()
            for target, (_, end) in pipes.items():
                os.dup2(end, target)
            _close_all_but(writer)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, leave_early)
            signal.signal(signal.SIGINT, leave_early)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)
            _be_rank(request, argv, {**environ, VERDICT_VARIABLE: str(writer)})
        except BaseException as error:
            os.write(2, f"zygote: {error!r}\n".encode())
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)
    os.close(writer)
    for target, (end, inner) in pipes.items():
        os.close(inner)
        output.add(rank, end, target)
    return RankProcess(rank, pid, reader)


def _be_rank(request: Request, argv: Sequence[str], environ: Mapping[str, str]) -> None:
    from entrypoint.command import be_rank

    _set_environment(environ)
    if request.fsdp:
        from tests.trainers.fsdp_on_cpu import allow_fsdp_on_cpu

        allow_fsdp_on_cpu()
    if request.clock:
        right = time.time
        time.time = lambda: right() + request.clock
    be_rank([*argv])


def _set_environment(environ: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)


def _close_all_but(*kept: int) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _die_with_parent(signum: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)


# Who asks it ---------------------------------------------------------------------------------------------------------


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
            os.kill(self.pid, signum)


class Zygote:
    """The forking process, for use by any number of threads; ended by `close`.

    Args:
        model: where it makes the tiny model.

    Attributes:
        cpu: seconds of a core that its imports took: what those of a real start take too.
    """

    def __init__(self, model: Path) -> None:
        self._asking, self._replied = threading.Lock(), threading.Semaphore(0)
        self._pids: list[int] = []
        self._running: dict[int, Forked] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote", str(model)],
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


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
