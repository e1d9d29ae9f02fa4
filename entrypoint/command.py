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
    try:
        run = load(argv)
        from entrypoint.run import run_rank  # imports torch: only once the configuration stands

        run_rank(run, watch)
        verdict = Verdict(EXIT_DONE)
    except RunError as error:
        explain(error)
        verdict = Verdict(error.exit_code, hold=error.hold, error=str(error))
    except Exception as error:
        traceback.print_exc()
        verdict = Verdict(1, error=f"{type(error).__name__}: {error}")
    watch.close()
    report(verdict)
    leave(verdict.code, TIDY)


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
