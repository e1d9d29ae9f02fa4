"""Checkpoints in an S3 prefix of one run's own: what is there, one up, one down.

owner.json                      the run's fingerprint: whose prefix this is
step-00000100/…                 a checkpoint's files as they lie on disk
step-00000100/manifest.json     copied last, removed first: whoever sees it sees every file that it names
step-00000100/manifest.damaged  in its place where a download was not what the manifest says
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint.checkpoint.find import best_of, differences, free_name, kept
from entrypoint.checkpoint.manifest import MANIFEST, DamagedError, File, Manifest
from entrypoint.errors import CheckpointError
from entrypoint.storage import error_code, file_sha256, s3, sync, write_atomically

if TYPE_CHECKING:
    from entrypoint.s3 import S3

OWNER = "owner.json"
DAMAGED = "manifest.damaged"
OURS = re.compile(r"step-\d{8}/[^/]+")
FILES = 2  # copied at once, each in several parts


class Remote:
    """The checkpoints below `url`; failures are the storage's own."""

    def __init__(self, url: str, endpoint_url: str | None) -> None:
        self.url = url.rstrip("/")
        self._endpoint_url = endpoint_url
        self._sent: set[Path] = set()  # of the checkpoint that is being copied: a second try goes on after them

    @cached_property
    def _fs(self) -> S3:
        return s3(self._endpoint_url)

    def claim(self, fingerprint: dict[str, Any]) -> None:
        """Make the prefix this run's, which proves that it can be written.

        Raises:
            CheckpointError: it is another run's.
        """
        url, found = f"{self.url}/{OWNER}", None
        try:
            found = json.loads(self._fs.cat_file(url))
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise
        except ValueError as error:
            raise CheckpointError(f"{url}: can't be read as JSON; empty the prefix or name another") from error
        if found is not None:
            self.refuse_other(found, fingerprint)
        self._fs.pipe_file(url, json.dumps(fingerprint, indent=1, default=str).encode())

    def refuse_other(self, found: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        """Refuse what another run has put here.

        Raises:
            CheckpointError: it is another run's.
        """
        if differ := differences(found, json.loads(json.dumps(fingerprint, default=str))):
            raise CheckpointError(
                f"{self.url}: is another run's mirror, it differs in {differ}; "
                "give this run a checkpoint.mirror of its own"
            )

    def list(self) -> dict[str, dict[str, int]]:
        """Checkpoints, complete or not: name to file to bytes."""
        self._fs.invalidate_cache()
        there: dict[str, dict[str, int]] = {}
        prefix = self.url.partition("://")[2]
        for path, entry in self._fs.find(self.url, detail=True).items():
            key = path.removeprefix(prefix).strip("/")
            if OURS.fullmatch(key):
                name, _, file = key.partition("/")
                there.setdefault(name, {})[file] = int(entry["size"])
        return there

    def manifest(self, name: str) -> Manifest:
        """A checkpoint's manifest.

        Raises:
            DamagedError: it is not as it was written.
        """
        from botocore.exceptions import FlexibleChecksumError

        with tempfile.TemporaryDirectory() as folder:
            try:
                write_atomically(Path(folder) / MANIFEST, self._fs.cat_file(f"{self.url}/{name}/{MANIFEST}"))
            except (FlexibleChecksumError, FileNotFoundError) as error:
                raise DamagedError(f"{MANIFEST}: {error}") from error
            return Manifest.read(Path(folder))

    # Up --------------------------------------------------------------------------------------------------------------

    def copy(self, folder: Path) -> None:
        """Copy a complete checkpoint up, manifest last; does nothing where it is there already.

        Raises:
            DamagedError: `folder` is no complete checkpoint.
            CheckpointError: what arrived is not what was sent.
        """
        manifest, name = Manifest.read(folder), folder.name
        content, there = (folder / MANIFEST).read_bytes(), self.list()
        url = f"{self.url}/{name}/{MANIFEST}"
        if MANIFEST in there.get(name, {}):
            if self._fs.cat_file(url) == content and not unlike(manifest.files, there[name]):
                return
            self._fs.rm_file(url)  # of a copy that is not this one
        self._sent = {path for path in self._sent if path.parent == folder}
        with ThreadPoolExecutor(FILES) as pool:
            for _ in pool.map(self._send, (folder / file for file in manifest.files)):
                pass
        if why := unlike(manifest.files, self.list().get(name, {})):
            self._sent.clear()
            raise CheckpointError(f"{self.url}/{name}: {why}")
        self._fs.pipe_file(url, content)

    def _send(self, path: Path) -> None:
        if path not in self._sent:
            self._fs.send(path, f"{self.url}/{path.parent.name}/{path.name}")
            self._sent.add(path)

    def prune(self, keep: int, spare: str) -> None:
        """Remove all but the newest `keep`, the best and `spare`, and what killed runs have left half copied."""
        there = self.list()
        best = {name: best_of(self.manifest, name) for name in there if MANIFEST in there[name]}
        for name in {*there} - {*kept(best, keep), spare}:
            for file in sorted(there[name], key=lambda file: file != MANIFEST):
                self._fs.rm_file(f"{self.url}/{name}/{file}")

    def abandon_uploads(self) -> None:
        """End the uploads in parts that a killed run began."""
        self._fs.abandon_uploads(self.url, OURS)

    def set_aside(self, name: str, why: DamagedError) -> None:
        """Mark a copy as damaged: it is no complete one any more."""
        self._fs.pipe_file(f"{self.url}/{name}/{DAMAGED}", str(why).encode())
        self._fs.rm_file(f"{self.url}/{name}/{MANIFEST}")

    # Down ------------------------------------------------------------------------------------------------------------

    def fetch(self, name: str, into: Path, warn: Callable[[str], None]) -> Path:
        """Copy one into the folder `into`, verified; it appears there whole or not at all.

        A download that was cut off goes on with the files that are still missing.

        Raises:
            DamagedError: it is not what its manifest says.
            CheckpointError: the disk has no room for it.
        """
        partial, final = into / f"mirror-{name}.partial", into / name
        for other in {*into.glob("mirror-*.partial")} - {partial}:
            shutil.rmtree(other)
        manifest = self.manifest(name)
        if why := unlike(manifest.files, self.list().get(name, {})):
            raise DamagedError(why)
        partial.mkdir(parents=True, exist_ok=True)
        _check_room(manifest, partial)
        with ThreadPoolExecutor(FILES) as pool:
            for _ in pool.map(lambda file: self._receive(name, file, manifest.files[file], partial), manifest.files):
                pass
        manifest.write(partial)
        sync(partial)
        if final.exists():  # damaged, or nobody would ask for a copy
            aside = final.rename(free_name(final, "damaged"))
            warn(f"{final}: is damaged; it is now {aside.name}, and the mirror's copy is taken")
        partial.rename(final)
        sync(into)
        return final

    def _receive(self, name: str, file: str, said: File, folder: Path) -> None:
        from botocore.exceptions import FlexibleChecksumError

        path = folder / file
        for attempt in range(3):  # the first finds what an earlier download has left
            if attempt:
                with suppress(FlexibleChecksumError):  # the sum that S3 keeps says what ours says next
                    self._fs.receive(f"{self.url}/{name}/{file}", path, said.size)
            if path.exists() and path.stat().st_size == said.size and file_sha256(path) == said.sha256:
                sync(path)
                return
        path.unlink(missing_ok=True)
        raise DamagedError(f"{file}: has another SHA-256 than the manifest says")


def unlike(files: Mapping[str, File], there: Mapping[str, int]) -> str | None:
    """What is wrong with the first file that is missing or has another size."""
    wrong: Iterable[str] = (
        f"{name}: has {there.get(name)} bytes there, expected {file.size}"
        for name, file in files.items()
        if there.get(name) != file.size
    )
    return next(iter(wrong), None)


def _check_room(manifest: Manifest, partial: Path) -> None:
    need = sum(file.size for name, file in manifest.files.items() if not (partial / name).exists())
    if need > (free := shutil.disk_usage(partial).free):
        raise CheckpointError(
            f"{partial.parent}: {free / 1e9:.1f} GB free, the checkpoint in the mirror needs {need / 1e9:.1f} GB; "
            "free space or name another checkpoint.path"
        )
