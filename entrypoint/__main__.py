"""`python -m entrypoint`: the launcher unless WORLD_SIZE is set; with it, one rank of the run."""

from __future__ import annotations

import os
import sys

from entrypoint.config import load
from entrypoint.errors import RunError
from entrypoint.launcher import launch, report_verdict


def main(argv: list[str]) -> int:
    """Compose and check the configuration, then launch the ranks or be one; returns the documented exit code."""
    try:
        run = load(argv)
        if "WORLD_SIZE" not in os.environ:
            return launch(argv, os.environ)
        from entrypoint.run import run_rank  # imports torch: only once the configuration stands

        run_rank(run)
    except RunError as error:
        print(f"entrypoint: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    report_verdict(code)
    sys.exit(code)
