"""The manifest of a checkpoint: which files it is made of, with size and SHA-256 each, and of which run it is.

It is written last and carries a sum of its own, so a folder that agrees with its manifest is whole, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from entrypoint.storage import write_atomically

MANIFEST = "manifest.json"
BLOCK = 1 << 22  # bytes read at a time
READERS = 8  # files read at once: a shared file system gives more to several readers


class DamagedError(Exception):
    """A checkpoint is not what its manifest says; the message is one line: which file, what was got and expected."""


@dataclass(frozen=True)
class File:
    """One file of a checkpoint: bytes and hexadecimal SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: steps done, whose it is, how good (`best`, None: not evaluated at this step), its files."""

    step: int
    fingerprint: dict[str, Any]
    best: float | None
    files: Mapping[str, File]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    def write(self, folder: Path) -> None:
        """Write it into the folder, fsynced."""
        content = asdict(self)
        write_atomically(folder / MANIFEST, json.dumps({**content, "sha256": _sum(content)}, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The folder's manifest.

        Raises:
            DamagedError: there is none, or not as it was written.
        """
        try:
            content = json.loads((folder / MANIFEST).read_bytes())
            said = content.pop("sha256")
            if said != _sum(content):
                raise DamagedError(f"{MANIFEST}: is not as it was written (its own SHA-256 differs)")
            files = {name: File(**file) for name, file in content.pop("files").items()}
            return cls(**content, files=files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{MANIFEST}: can't be read ({type(error).__name__})") from error

    def check_sizes(self, folder: Path) -> None:
        """Look at every file without reading it.

        Raises:
            DamagedError: one is missing or has another size.
        """
        for name, file in self.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                raise DamagedError(f"{name}: {error.strerror}") from error
            if size != file.size:
                raise DamagedError(f"{name}: has {size:,} bytes, expected {file.size:,}")

    def verify(self, folder: Path) -> None:
        """Read every file once, several at a time, and compare it with its SHA-256.

        Raises:
            DamagedError: one differs, or can't be read.
        """
        self.check_sizes(folder)
        given_up = threading.Event()
        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
            sums = {pool.submit(_file_sum, folder / name, given_up): name for name in self.files}
            try:
                for done in as_completed(sums):
                    name = sums[done]
                    if (found := done.result()) != self.files[name].sha256:
                        raise DamagedError(
                            f"{name}: has the SHA-256 {found[:12]}…, expected {self.files[name].sha256[:12]}…"
                        )
            except OSError as error:
                raise DamagedError(f"{error.filename}: {error.strerror}") from error
            finally:
                given_up.set()  # a signal or a damaged file need not wait for the others to be read
                pool.shutdown(cancel_futures=True)


def _file_sum(path: Path, given_up: threading.Event) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while (read := file.readinto(buffer)) and not given_up.is_set():
            digest.update(buffer[:read])
    return digest.hexdigest()


def _sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
