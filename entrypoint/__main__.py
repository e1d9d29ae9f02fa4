"""`python -m entrypoint`: see `command`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from entrypoint.errors import EXIT_STOPPED


def leave_early(number: int, frame: FrameType | None) -> None:
    """A notice before anything has begun."""
    os.write(2, b"entrypoint: told to stop; start the same command again to go on\n")
    os._exit(EXIT_STOPPED)


if __name__ == "__main__":
    # Before the imports, which take a second: process 1 of a container never gets a signal that it doesn't catch.
    signal.signal(signal.SIGTERM, leave_early)
    signal.signal(signal.SIGINT, leave_early)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    from entrypoint.command import main

    sys.exit(main(sys.argv[1:]))
