"""`python -m entrypoint.preflight`: what a run needs, tried on an ordinary node before GPU nodes are asked for."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from entrypoint.command import leave_pipe
from entrypoint.config import load
from entrypoint.errors import EXIT_DONE, EXIT_REFUSED, EXIT_STOPPED, ConfigError, RunError
from entrypoint.kubernetes import in_cluster
from entrypoint.preflight.base_model import BaseModel
from entrypoint.preflight.places import check_checkpoint, check_mirror, check_output
from entrypoint.preflight.queue import check_queue
from entrypoint.preflight.traces import check_data
from entrypoint.storage import temporary

DEADLINE = 240.0  # seconds; Helm gives a hook 300, and those count from before the pod's image is there
CLEAN_UP = 5.0  # seconds beyond the deadline, for a check to remove what it has written
AGAIN = 0.01  # seconds: Python drops what a signal raises while an object is removed; then it is raised once more
CHECKS = ("config", "data", "model", "checkpoint", "mirror", "output")
USAGE = f"""\
Tries what a run needs before it is paid for. Nothing is trained; what it writes it removes.

  python -m entrypoint.preflight --config-dir /etc/run --config-name run                every check on the run's places
  python -m entrypoint.preflight … --checks data,model                                  only these
  python -m entrypoint.preflight … --queue training                                     waits first for a Volcano Queue

  --checks A,B,C           which of {", ".join(CHECKS)}; default all; `config` goes with any of them
  --queue NAME             wait until this Volcano Queue is Open, through the Kubernetes API as the pod's own account
  --gpus N                 that it must be able to hold
  --scheduler-config NS/N  Volcano's ConfigMap too, where the account may read it: can a gang start from zero nodes
  --deadline SECONDS       the end of all patience; default {DEADLINE:g}

A check prints one line; what a pod can't reach that has not the trainer's volumes is left out by --checks.
Keys are those of `python -m entrypoint --help`.
Exit codes: 0 all passed; 64 the last line says what must be mended; 75 it may pass later.
"""


@dataclass(frozen=True)
class Options:
    """The command line; `words` are the run's."""

    checks: tuple[str, ...]
    queue: str | None
    gpus: int
    scheduler_config: str | None
    deadline: float
    help: bool
    words: list[str]


class Ended(BaseException):
    """The deadline, or a signal: not an Exception, which a library on the way could take for its own."""


def main(argv: list[str]) -> int:
    """Run the checks that `argv` names; returns the documented exit code."""
    try:
        options = parse(argv)
        if options.help:
            print(USAGE, end="")
            return EXIT_DONE
        return Preflight(options).run()
    except RunError as error:
        say_failed("preflight", error)
        return error.exit_code
    except BrokenPipeError:  # `… | head` has seen enough
        leave_pipe()
        return EXIT_DONE


def parse(argv: list[str]) -> Options:
    """Take preflight's own options out of `argv`.

    Raises:
        ConfigError: an option without a value or with a wrong one.
    """
    given: dict[str, str] = {}
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        option, equals, value = word.partition("=")
        if option not in ("--checks", "--queue", "--gpus", "--scheduler-config", "--deadline"):
            words.append(word)
            continue
        value = value if equals else next(rest, "-")
        if option in given or value.startswith("-") or not (value or option == "--checks"):
            raise ConfigError(f"{option}: expected one value")
        given[option] = value
    checks = [name.strip() for name in given.get("--checks", ",".join(CHECKS)).split(",") if name.strip()]
    for name in checks:
        if name not in CHECKS:
            raise ConfigError(f"--checks: expected some of {', '.join(CHECKS)}, got {name!r}")
    if not checks and "--queue" not in given:
        raise ConfigError("--checks: names none, and there is no --queue to wait for; nothing is left to check")
    return Options(
        checks=tuple(name for name in CHECKS if name in checks),
        queue=given.get("--queue"),
        gpus=_count(given.get("--gpus", "0")),
        scheduler_config=given.get("--scheduler-config"),
        deadline=_seconds(given.get("--deadline", str(DEADLINE))),
        help=any(word in ("--help", "-h") for word in words),
        words=words,
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"--gpus: expected a whole number, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= threading.TIMEOUT_MAX:
        raise ConfigError(f"--deadline: expected a number of seconds > 0, got {text!r}")
    return value


class Preflight:
    """The checks of one start: each prints its line, or is among `failures` at the end."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.failures: list[tuple[str, RunError]] = []
        self.now = "preflight"  # the check that runs
        self.waits_for = ""  # what it is waiting for, in words

    def run(self) -> int:
        """Run every check; returns the exit code."""
        with self._bounded():
            try:
                self._run()
            except Ended as end:
                waits_for = f": {self.waits_for}" if self.waits_for else ""
                late = RunError(f"{end}{waits_for}")
                late.exit_code = EXIT_STOPPED
                self.failures.append((self.now, late))
        # What must be mended is said last, what may pass by itself before it.
        self.failures.sort(key=lambda failure: failure[1].exit_code == EXIT_REFUSED)
        for name, error in self.failures:
            say_failed(name, error)
        return self.failures[-1][1].exit_code if self.failures else EXIT_DONE

    def _run(self) -> None:
        queue = self.options.queue
        if queue is not None:
            gpus, place = self.options.gpus, self.options.scheduler_config
            self._check("queue", lambda: check_queue(in_cluster(), queue, gpus, place, self._wait, warn))
        loaded: list[Any] = []

        def config() -> str:
            loaded.append(load(self.options.words, look=False))
            return f"method={loaded[0].method.name}, output.path={loaded[0].output.path}"

        if not self.options.checks:
            return
        self._check("config", config)
        if not loaded:
            return
        (run,) = loaded
        model = BaseModel(run.model, run.data.endpoint_url)
        checks: dict[str, Callable[[], str]] = {
            "data": lambda: check_data(run, warn),
            "model": model.check,
            "checkpoint": lambda: check_checkpoint(run, model, warn),
            "mirror": lambda: check_mirror(run),
            "output": lambda: check_output(run),
        }
        for name, check in checks.items():
            if name in self.options.checks:
                self._check(name, check)

    def _check(self, name: str, check: Callable[[], str]) -> None:
        self.now, self.waits_for = name, ""
        try:
            print(f"preflight: {name}: ok, {check()}", flush=True)
        except RunError as error:
            if error.__cause__ is not None and temporary(error.__cause__):
                error.exit_code = EXIT_STOPPED
            self.failures.append((name, error))

    def _wait(self, words: str) -> None:
        self.waits_for = words

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """End the block at the deadline, or when told to; as process 1 it would not even hear SIGTERM otherwise."""
        deadline, why = self.options.deadline, ""

        def end(signum: int, frame: FrameType | None) -> None:
            nonlocal why
            by_clock = f"not done after {deadline:g} s"
            why = why or (by_clock if signum == signal.SIGALRM else "told to stop before it was done")
            raise Ended(why)

        def dropped(unraisable: sys.UnraisableHookArgs) -> None:
            if isinstance(unraisable.exc_value, Ended):
                signal.setitimer(signal.ITIMER_REAL, AGAIN)
            else:
                hook(unraisable)

        def give_up() -> None:
            say_failed(self.now, RunError(f"hangs, {deadline:g} s after its start"))
            os._exit(EXIT_STOPPED)

        # A call that hangs in the kernel hears no signal: then the process ends as it is.
        last = threading.Timer(deadline + CLEAN_UP, give_up)
        last.daemon = True
        before = {signum: signal.signal(signum, end) for signum in (signal.SIGALRM, signal.SIGTERM)}
        hook, sys.unraisablehook = sys.unraisablehook, dropped
        last.start()
        signal.setitimer(signal.ITIMER_REAL, deadline)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            last.cancel()
            sys.unraisablehook = hook
            for signum, handler in before.items():
                signal.signal(signum, handler)


def warn(line: str) -> None:
    """Print what is allowed and seldom meant."""
    print(f"entrypoint: warning: {line}", file=sys.stderr, flush=True)


def say_failed(name: str, error: RunError) -> None:
    """Say in one line what a check found; where rows were dropped, their table before it."""
    if table := getattr(error, "table", ""):
        print(table, flush=True)
    where = "preflight" if name == "preflight" else f"preflight: {name}"
    print(f"entrypoint: {where}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
