"""Mirror: complete checkpoints are copied to S3 in the background, and found there when the disk is lost.

Training never waits for it. While it can't be written it is warned about once and tried again, with the newest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entrypoint.checkpoint.manifest import MANIFEST, DamagedError
from entrypoint.checkpoint.remote import DAMAGED, Remote
from entrypoint.errors import CheckpointError, StorageDownError
from entrypoint.storage import explained

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0  # seconds before a copy that failed is tried again, doubled each time


class Mirror:
    """The copies of one run's checkpoints; made on rank 0 only.

    Args:
        url: s3:// prefix of this run's own.
        endpoint_url: S3 endpoint, where it is not AWS's own.
        keep: how many of the newest complete copies stay; the best of all that were copied stays as well.
        warn: told in one line what went wrong, from any thread.

    Attributes:
        uploading: the local checkpoint that is being read, which must stay; or None.
    """

    def __init__(self, url: str, endpoint_url: str | None, *, keep: int, warn: Callable[[str], None]) -> None:
        self.url, self.keep, self.warn = url.rstrip("/"), keep, warn
        self.uploading: Path | None = None
        self._remote = Remote(url, endpoint_url)
        self._waiting: Path | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failing = self._tidy = self._cannot_remove = False

    # Up --------------------------------------------------------------------------------------------------------------

    def submit(self, folder: Path) -> None:
        """Have a complete checkpoint copied; returns at once. One that still waits gives way to it."""
        with self._changed:
            self._waiting = folder
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def finish(self, seconds: float) -> bool:
        """Wait at most so long for what is under way; whether all is up there."""
        with self._changed:
            self._changed.notify_all()  # a copy that waits to be tried again need not wait any more
            return self._changed.wait_for(lambda: self._waiting is None and self.uploading is None, seconds)

    def _work(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                folder, self._waiting = self._waiting, None
                self.uploading = folder
            assert folder is not None
            done = self._copied(folder)
            with self._changed:
                if not done and self._waiting is None:
                    self._waiting = folder
                if done:
                    self.uploading = None
                self._changed.notify_all()
                if done:
                    pause = FIRST_PAUSE
                else:
                    self._changed.wait(pause)  # or until a newer one comes, or the run ends
                    pause = min(2 * pause, LONGEST_PAUSE)

    def _copied(self, folder: Path) -> bool:
        """Copy one, or say once why not; True also where it is gone, since there are newer ones then."""
        try:
            with explained(self.url, CheckpointError, local=folder):
                if not self._tidy:
                    self._remote.abandon_uploads()
                    self._tidy = True
                self._remote.copy(folder)
            self._prune(folder.name)
        except Exception as error:  # whatever it is, training goes on
            if not folder.exists():
                return True
            if not self._failing:
                self.warn(f"{folder.name} is not in the mirror yet, which is tried again: {error}")
            self._failing = True
            return False
        if self._failing:
            self.warn(f"{self.url}: holds {folder.name}; the mirror is up to date again")
        self._failing = False
        return True

    def _prune(self, newest: str) -> None:
        try:
            with explained(self.url, CheckpointError):
                self._remote.prune(self.keep, newest)
        except (CheckpointError, StorageDownError) as error:  # the copy is there; the next one removes both
            if not self._cannot_remove:
                self.warn(f"older checkpoints stay in the mirror: {error}")
            self._cannot_remove = True
        else:
            self._cannot_remove = False

    # Down ------------------------------------------------------------------------------------------------------------

    def newest(self, fingerprint: dict[str, Any]) -> int | None:
        """The step of the newest complete copy; claims the prefix for this run by writing to it.

        Raises:
            CheckpointError: the prefix is another run's, or can't be read and written.
            StorageDownError: it can't be reached now.
        """
        with explained(self.url, CheckpointError):
            self._remote.claim(fingerprint)
            there = self._remote.list()
            for name in sorted((name for name in there if MANIFEST in there[name]), reverse=True):
                try:
                    self._remote.refuse_other(self._remote.manifest(name).fingerprint, fingerprint)
                    return int(name.removeprefix("step-"))
                except DamagedError as error:
                    self._set_aside(name, error)
        return None

    def damaged(self) -> list[str]:
        """The addresses of copies that turned out to be damaged."""
        with explained(self.url, CheckpointError):
            return sorted(f"{self.url}/{name}" for name, files in self._remote.list().items() if DAMAGED in files)

    def fetch(self, step: int, into: Path) -> Path:
        """Copy one into the folder `into`, verified; it appears there whole or not at all.

        Raises:
            DamagedError: it is not what its manifest says; `newest` doesn't name it any more.
            CheckpointError: the disk or the storage refuses.
            StorageDownError: the storage can't be reached now.
        """
        name = f"step-{step:08d}"
        with explained(f"{self.url}/{name}", CheckpointError, local=into):
            try:
                return self._remote.fetch(name, into, self.warn)
            except DamagedError as error:
                self._set_aside(name, error)
                raise

    def _set_aside(self, name: str, why: DamagedError) -> None:
        self._remote.set_aside(name, why)
        self.warn(f"{self.url}/{name}: is damaged ({why}); the next older one is looked for")
