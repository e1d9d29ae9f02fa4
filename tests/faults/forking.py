"""A process that has imported what a run imports, and forks runs: a start costs no imports.

What it forks is the program: the launcher in a session of its own, and as its ranks what `entrypoint.launch` makes of
them, with one function replaced: a rank is forked from its launcher where the real one executes Python anew. Signals,
exit codes, files, pipes and parent-death signals are the real ones. What differs: no time passes in imports, and the
order of a set of strings is the same in every start. A share of the cases starts the real command for that.

    python -m tests.faults.forking MODEL    makes the tiny model there, since it has torch; then a `Request` a line on
                                            stdin, and {"pid"} and {"pid", "code"} on stdout
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import select
import signal
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.zygote import Request
from tests.process import ROOT

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
    from entrypoint import command
    from entrypoint.__main__ import leave_early
    from entrypoint.launch import ranks

    def start_rank(
        module: str, argv: Sequence[str], environ: Mapping[str, str], rank: int, output: Any, inherited: Collection[int]
    ) -> Any:
        return _forked_rank(request, argv, environ, rank, output, inherited)

    ranks.start_rank = start_rank  # type: ignore[attr-defined]
    if (seconds := request.patience) is not None:
        command.launch = functools.partial(command.launch, patience=seconds, kill_after=seconds)  # type: ignore[attr-defined]
    _set_environment(request.env)
    signal.signal(signal.SIGTERM, leave_early)
    signal.signal(signal.SIGINT, leave_early)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.argv = ["entrypoint", *request.argv]
    code = command.main(request.argv)
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


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
