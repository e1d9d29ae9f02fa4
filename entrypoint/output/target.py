"""Target: the few operations on a flat folder that is written for others to read, local or S3."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from entrypoint.storage import error_code, is_s3, local_path, s3, sync, write_atomically

if TYPE_CHECKING:
    from entrypoint.s3 import S3


class Target(Protocol):
    """A folder's top level. Every write is seen whole or not at all; failures are the storage's own."""

    url: str

    def sizes(self) -> dict[str, int]:
        """Names and bytes of the files; empty where the folder is not there."""

    def read(self, name: str) -> bytes | None:
        """A small file; None: it is not there."""

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""

    def put(self, path: Path) -> None:
        """Put a local file here by its own name; it may be moved."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def tidy(self) -> None:
        """Remove what a killed writer began and no listing shows."""

    def probe(self) -> None:
        """Fail where nothing can be written."""


def open_target(url: str, endpoint_url: str | None = None) -> Target:
    """The target at `url`; nothing is asked of the storage yet."""
    return S3Target(url, s3(endpoint_url)) if is_s3(url) else LocalTarget(local_path(url))


class LocalTarget:
    """A folder on a disk."""

    def __init__(self, folder: Path) -> None:
        self.url, self._folder = str(folder), folder

    def sizes(self) -> dict[str, int]:
        if not self._folder.exists():
            return {}
        return {entry.name: entry.stat().st_size for entry in os.scandir(self._folder) if entry.is_file()}

    def read(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        write_atomically(self._folder / name, content)

    def put(self, path: Path) -> None:
        goal, partial = self._folder / path.name, self._folder / f".{path.name}.partial"
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        try:
            os.replace(path, goal)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copyfile(path, partial)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, goal)
        sync(self._folder)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def tidy(self) -> None:
        for partial in self._folder.glob(".*.partial"):
            partial.unlink()

    def probe(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = _probe_name()
        self.write(name, b"x" * 4096)
        self.remove(name)


class S3Target:
    """A prefix of a bucket."""

    def __init__(self, url: str, fs: S3) -> None:
        self.url, self._fs = url.rstrip("/"), fs

    def sizes(self) -> dict[str, int]:
        try:
            entries = self._fs.ls(self.url, detail=True, refresh=True)
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries if entry["type"] == "file"}

    def read(self, name: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(f"{self.url}/{name}"))
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise
            return None

    def write(self, name: str, content: bytes) -> None:
        self._fs.pipe_file(f"{self.url}/{name}", content)

    def put(self, path: Path) -> None:
        self._fs.send(path, f"{self.url}/{path.name}")

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self.url}/{name}")

    def tidy(self) -> None:
        self._fs.abandon_uploads(self.url, re.compile(r"[^/]+"))

    def probe(self) -> None:
        name = _probe_name()
        self.write(name, b"x")
        with suppress(PermissionError):  # who may write but not delete leaves an empty name behind
            self.remove(name)


def _probe_name() -> str:
    return f".probe-{uuid.uuid4().hex[:12]}"
