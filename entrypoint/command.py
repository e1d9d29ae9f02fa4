"""The command: the launcher unless WORLD_SIZE is set; with it, one rank of the run."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

from entrypoint.config import load
from entrypoint.errors import EXIT_DONE, RunError
from entrypoint.launch.launcher import launch
from entrypoint.launch.restarts import Restarts
from entrypoint.launch.verdict import Verdict, leave, report
from entrypoint.watch import Watch

TIDY = 15.0  # seconds for what was registered for the end of a rank's process


def main(argv: list[str]) -> int:
    """Compose and check the configuration, then launch the ranks or be one; returns the documented exit code."""
    if "WORLD_SIZE" in os.environ:
        be_rank(argv)
    try:
        run = load(argv)
        checkpoint = run.checkpoint
        return launch(
            argv,
            os.environ,
            restarts=Restarts.of(run, os.environ),
            grace=checkpoint.grace_seconds,
            hold=checkpoint.hold_seconds,
        )
    except RunError as error:
        explain(error)
        return error.exit_code
    except BrokenPipeError:  # `… --help | head` has seen enough
        leave_pipe()
    return EXIT_DONE


def be_rank(argv: list[str]) -> NoReturn:
    """Be one rank, and end the process."""
    watch = Watch()
    watch.listen()
    failure = None
    try:
        run = load(argv)
        from entrypoint.run import run_rank  # imports torch: only once the configuration stands

        run_rank(run, watch)
    except Exception as error:
        failure = error
    watch.close()  # where the watch is ending the process, what breaks here is its doing, and its word the last
    verdict = said(failure)
    report(verdict)
    leave(verdict.code, TIDY)


def said(failure: Exception | None) -> Verdict:
    """The verdict of a rank that has ended so, and what the log says of it."""
    if failure is None:
        return Verdict(EXIT_DONE)
    if isinstance(failure, RunError):
        explain(failure)
        return Verdict(failure.exit_code, hold=failure.hold, error=str(failure))
    traceback.print_exception(failure)
    return Verdict(1, error=f"{type(failure).__name__}: {failure}")


def leave_pipe() -> None:
    """Nobody reads what is printed any more: what the interpreter still flushes at its end goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: RunError) -> None:
    """Say what ended the run, in one line that is the log's last; where rows were dropped, their table before it."""
    if error.by_all and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if table := getattr(error, "table", ""):
        print(table, flush=True)
    print(f"entrypoint: {error}", file=sys.stderr, flush=True)
