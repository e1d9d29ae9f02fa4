"""The lock of a checkpoint folder: one run at a time writes there, on whichever node.

Two things say that the folder is taken. The kernel's flock on `lock`, which a killed holder loses in the same instant,
across nodes too where the file system carries it (Lustre mounted with `flock`, NFS). And a lease in the same file, with
a beat that the holder moves on every few seconds: where flock ends at the node, or a node has died without the file
server's knowing, which keeps its flock for minutes, a beat that stands still says that nobody holds it.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from entrypoint.errors import CheckpointError, LockedError

LOCK = "lock"
BEAT = 3.0  # seconds between two beats
DEAD = 15.0  # seconds without a beat after which a holder on another machine is taken for dead
POLL = 0.2
UNREADABLE = "?"  # in the place of what a lease says
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Lock:
    """Held from `acquire` to `release`, or to the end of this process however it ends; on rank 0.

    Args:
        folder: of the run's checkpoints.
        patience: seconds to wait for a holder that may be about to leave: the pod before this one, still stopping.
        warn: takes a line.
    """

    def __init__(self, folder: Path, *, patience: float, warn: Callable[[str], None]) -> None:
        self.path = folder / LOCK
        self.patience = patience
        self.warn = warn
        self._lease = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": _machine(),
            "holder": secrets.token_hex(8),
        }
        self._file: int | None = None
        self._has_flock = True  # the file system
        self._stop, self._writing = threading.Event(), threading.Lock()

    def acquire(self) -> None:
        """Take the folder.

        Raises:
            LockedError: another run holds it and did not leave within `patience`.
        """
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        began = time.monotonic()
        told = False
        beat, since = self._read(), began
        while True:
            flocked, now = self._flock(), time.monotonic()
            if (seen := self._read()) != beat:
                beat, since = seen, now
            # Of a holder on this machine the kernel knows whether it is there; of another only its beat tells.
            far = bool(beat) and not (self._has_flock and beat["machine"] == self._lease["machine"])
            dead = far and now - since >= DEAD
            if flocked and (dead or not far):
                break
            if now - began >= self.patience + (DEAD if far else 0):
                if dead and beat["machine"] != UNREADABLE:
                    self.warn(
                        f"{self.path.parent}: {_holder(beat)} has given no sign for {now - since:.0f} s: taken for "
                        "dead, though the file system still keeps its lock"
                    )
                    break
                os.close(self._file)
                self._file = None
                raise LockedError(
                    f"{self.path.parent}: is held by another run, {_holder(beat)}; "
                    "give this run a checkpoint.path of its own, or end that one"
                )
            if not told:
                self.warn(
                    f"{self.path.parent}: is held by another run, {_holder(beat)}; waiting at most "
                    f"{self.patience:.0f} s for it to leave"
                )
                told = True
            time.sleep(POLL)  # flock can wait, but not with a bound
        self._write(0)
        threading.Thread(target=self._beat, name="checkpoint-lease", daemon=True).start()
        atexit.register(self.release)

    def check(self) -> None:
        """Whether the folder still is this run's: a process that stood still for long may have been taken for dead.

        Raises:
            CheckpointError: another run has taken it.
        """
        if (found := self._read()).get("holder") != self._lease["holder"]:
            raise CheckpointError(
                f"{self.path.parent}: was taken by another run, {_holder(found)}, while this one stood still; "
                "this one ends, and nothing of that one's was touched"
            )

    def release(self) -> None:
        """Leave the folder to the next run, without a wait for it."""
        self._stop.set()
        with self._writing:  # a beat that is under way would go to whatever file gets the number next
            if self._file is None:
                return
            if self._read().get("holder") == self._lease["holder"]:
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None
        atexit.unregister(self.release)

    def _flock(self) -> bool:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            if self._has_flock:
                self.warn(
                    f"{self.path.parent}: the file system has no flock ({error.strerror}), so a second run that is "
                    "started in the same seconds would not be noticed; mount it with flock"
                )
            self._has_flock = False
        return True

    def _beat(self) -> None:
        number = 0
        while not self._stop.wait(BEAT):
            number += 1
            try:
                with self._writing:
                    if not self._stop.is_set():
                        self.check()
                        self._write(number)
            except (OSError, CheckpointError):
                continue  # a full disk, or taken: the next save finds out and says so

    def _write(self, beat: int) -> None:
        assert self._file is not None
        content = json.dumps({**self._lease, "beat": beat}).encode()
        os.pwrite(self._file, content.ljust(512) + b"\n", 0)  # one length, so that no reader meets a mixture
        os.fsync(self._file)  # NFS keeps what is written for half a minute, and a holder unheard of is taken for dead

    def _read(self) -> dict[str, Any]:
        """The lease as it stands; empty: nobody's."""
        content = self.path.read_bytes() if self.path.exists() else b""
        try:
            found: dict[str, Any] = json.loads(content) if content else {}
        except ValueError:  # caught while it is written, or by a full disk
            found = dict.fromkeys(("host", "pid", "since", "machine", "holder"), UNREADABLE) | {"beat": content.hex()}
        return found


def _holder(lease: dict[str, Any]) -> str:
    return f"process {lease['pid']} on {lease['host']} since {lease['since']}" if lease else "which has not said who"


def _machine() -> str:
    """What two processes have in common if and only if one kernel runs both, whatever their containers are called."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
