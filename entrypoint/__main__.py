"""`python -m entrypoint`: the launcher unless WORLD_SIZE is set; with it, one rank of the run."""

from __future__ import annotations

import os
import sys

from entrypoint.config import load
from entrypoint.errors import RunError
from entrypoint.launch.launcher import launch, report_verdict


def main(argv: list[str]) -> int:
    """Compose and check the configuration, then launch the ranks or be one; returns the documented exit code."""
    try:
        run = load(argv)
        if "WORLD_SIZE" not in os.environ:
            return launch(argv, os.environ)
        from entrypoint.run import run_rank  # imports torch: only once the configuration stands

        run_rank(run)
    except RunError as error:
        explain(error)
        return error.exit_code
    except BrokenPipeError:  # `… --help | head` has seen enough
        leave_pipe()
    return 0


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


if __name__ == "__main__":
    code = main(sys.argv[1:])
    report_verdict(code)
    sys.exit(code)
