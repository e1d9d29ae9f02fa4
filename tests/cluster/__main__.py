"""A plane for people:  python -m tests.cluster up | down  (make cluster-up, make cluster-down)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from tests.cluster.machine import MachineError, check_machine
from tests.cluster.plane import start_plane
from tests.process import ROOT
from tests.servers.server import tail

FOLDER = ROOT / "out" / "cluster"
PID = FOLDER / "pid"
READY = FOLDER / "ready"
LOG = FOLDER / "plane.log"
SECONDS = 3600  # the first time the programs are built


def up() -> int:
    """Start a plane that outlives this command; prints how to reach it."""
    if _running() is not None:
        print(f"a plane runs already: export KUBECONFIG={FOLDER / 'kubeconfig'}")
        return 0
    try:
        check_machine()
    except MachineError as error:
        print(error, file=sys.stderr)
        return 1
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    with LOG.open("wb") as log:
        command = [sys.executable, "-m", "tests.cluster", "serve"]
        child = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    PID.write_text(str(child.pid))
    begun = time.monotonic()
    while not READY.exists():
        if child.poll() is not None or time.monotonic() > begun + SECONDS:
            print("\n".join(tail(LOG, 20)), file=sys.stderr)
            print(f"the plane did not start; its logs are in {FOLDER}", file=sys.stderr)
            return 1
        time.sleep(0.1)
    print(
        f"ready after {time.monotonic() - begun:.0f} s; logs of every program and pod are in {FOLDER}", file=sys.stderr
    )
    print(f"export KUBECONFIG={FOLDER / 'kubeconfig'}")
    return 0


def down() -> int:
    """End the plane; its logs stay until the next one."""
    pid = _running()
    if pid is None:
        print("no plane runs", file=sys.stderr)
        return 0
    os.kill(pid, signal.SIGTERM)
    while _running() is not None:
        time.sleep(0.1)
    return 0


def serve() -> int:
    """Be the plane, until SIGTERM."""
    ended = threading.Event()

    def end(signum: int, frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    with start_plane(FOLDER):
        READY.touch()
        ended.wait()
    return 0


def _running() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        pid = int(PID.read_text())
        if b"tests.cluster\0serve" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


COMMANDS = {"up": up, "down": down, "serve": serve}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m tests.cluster up | down; got {sys.argv[1:]}")
    sys.exit(COMMANDS[sys.argv[1]]())
