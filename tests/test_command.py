"""A rank's last word."""

from __future__ import annotations

import signal
import subprocess
import sys

from tests.process import ROOT, scrubbed

# A library that is shut down for the end of the process, under a main thread that is in it.
PROGRAM = """
import atexit, threading, time
from entrypoint import command

shut = threading.Event()
atexit.register(time.sleep, 0.5)
atexit.register(shut.set)

def load(argv):
    print("ready", flush=True)
    shut.wait()
    raise ValueError("the interpreter is shutting down")

command.load = load
command.be_rank([])
"""


def test_what_breaks_because_the_process_is_ending_is_not_told() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=scrubbed({"WORLD_SIZE": "1", "RANK": "0"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "entrypoint: told to stop; start the same command again to go on\n")
