"""A plane for people:  python -m tests.cluster up | down | check  (make cluster-up, make cluster-down)."""

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

from entrypoint.errors import ModelError
from tests.cluster.container import prepare_image
from tests.cluster.machine import MachineError, check_machine
from tests.cluster.plane import start_plane
from tests.cluster.programs import binaries
from tests.process import ROOT
from tests.servers.server import tail

FOLDER = ROOT / "out" / "cluster"
PID = FOLDER / "pid"
READY = FOLDER / "ready"
LOG = FOLDER / "plane.log"
SECONDS = 300


def up() -> int:
    """Start a plane that outlives this command; prints how to reach it."""
    if _running() is not None:
        print(f"a plane runs already, or starts (make cluster-down ends it); its logs are in {FOLDER}", file=sys.stderr)
        print(f"export KUBECONFIG={FOLDER / 'kubeconfig'}")
        return 0
    if check():
        return 1
    try:
        binaries()  # here, where one sees that they are built
        prepare_image()
    except (ModelError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    begun = time.monotonic()
    try:
        _start()
    except (RuntimeError, KeyboardInterrupt) as error:
        down()
        print(f"the plane did not start: {str(error) or 'interrupted'}; its logs are in {FOLDER}", file=sys.stderr)
        return 1
    print(
        f"ready after {time.monotonic() - begun:.0f} s; logs of every program and pod are in {FOLDER}", file=sys.stderr
    )
    print(f"export KUBECONFIG={FOLDER / 'kubeconfig'}")
    return 0


def _start() -> None:
    """Have a process of its own be the plane.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message is the end of its log.
    """
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    with LOG.open("wb") as log:
        command = [sys.executable, "-m", "tests.cluster", "serve"]
        child = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    PID.write_text(str(child.pid))
    deadline = time.monotonic() + SECONDS
    while not READY.exists():
        if child.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("\n".join(tail(LOG, 20)))
        time.sleep(0.1)


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
    """Be the plane, until SIGTERM, which also ends one that is not ready yet."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    with start_plane(FOLDER):
        READY.touch()
        threading.Event().wait()
    return 0


def _running() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        pid = int(PID.read_text())
        if b"tests.cluster\0serve" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def check() -> int:
    """Whether this machine can hold a plane; in one line where it can't."""
    try:
        check_machine()
    except MachineError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


COMMANDS = {"up": up, "down": down, "serve": serve, "check": check}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m tests.cluster up | down | check; got {sys.argv[1:]}")
    sys.exit(COMMANDS[sys.argv[1]]())
