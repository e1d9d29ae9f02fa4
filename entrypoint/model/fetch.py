"""Model files: the base model as a local, checked folder; from S3 it is fetched once a node.

The node's local rank 0 fetches under a partial name and renames; the others wait for the rename, outside of any
collective and its timeout, for as long as bytes keep arriving. Old versions are not removed: a cache is a folder that
its owner may empty at any time between runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoint.errors import EXIT_STOPPED, ModelError, RunError, StorageDownError
from entrypoint.launch.rank_process import LAUNCH_VARIABLE
from entrypoint.model.folder import INDEX, PARTS, base_dtype, check_model, check_names, model_identity, weight_names
from entrypoint.storage import explained, is_s3, local_path, s3, sync, write_atomically

if TYPE_CHECKING:
    from entrypoint.s3 import S3

__all__ = ["base_dtype", "check_model", "fetch_model", "list_model", "model_identity"]

STALL = 300.0  # seconds without a new byte after which the others give up on local rank 0
POLL = 0.2  # seconds


def fetch_model(
    path: str,
    endpoint_url: str | None,
    cache_path: str | None,
    environ: Mapping[str, str],
    *,
    stall: float = STALL,
) -> Path:
    """The base model as a local folder, checked.

    Args:
        path: a folder, or s3://bucket/prefix.
        endpoint_url: S3 endpoint, where it is not AWS's own.
        cache_path: folder for models from S3, on each node; None: <system's temporary folder>/models.
        environ: LOCAL_RANK 0 (or unset) fetches, the others wait for it.
        stall: seconds without a new byte after which the others give up.

    Raises:
        ModelError: the model can't be used or not be fetched.
        StorageDownError: the storage can't be reached now.
    """
    if not is_s3(path):
        folder = local_path(path)
        check_model(folder, path)
        return folder
    url = path.rstrip("/")
    cache = Path(cache_path) if cache_path else Path(tempfile.gettempdir()) / "models"
    with explained(url, ModelError, local=cache):
        fs = s3(endpoint_url)
        remote = _list(fs, url, endpoint_url)
        launch = environ.get(LAUNCH_VARIABLE, str(os.getppid()))
        place = _Place(cache, f"{url.rsplit('/', 1)[-1]}-{remote.key}", launch)
        if not remote.complete(place.folder):
            if environ.get("LOCAL_RANK", "0") == "0":
                _fetch(fs, remote, place)
            else:
                _wait(remote, place, stall)
    check_model(place.folder, url)
    return place.folder


def list_model(fs: S3, url: str, endpoint_url: str | None) -> dict[str, int]:
    """The files of the model at `url`, an s3:// prefix without a slash at its end, and their bytes.

    Raises:
        ModelError: one that makes a model is missing.
    """
    return _list(fs, url, endpoint_url).sizes


@dataclass(frozen=True)
class _Remote:
    """What is to be fetched."""

    url: str
    sizes: dict[str, int]  # name to bytes
    key: str  # changes when any of the files does

    def complete(self, folder: Path) -> bool:
        """Whether `folder` holds every file at its size; its name says the rest."""
        return all(_size(folder / name) == size for name, size in self.sizes.items())


@dataclass(frozen=True)
class _Place:
    """Where a model goes in the node's cache, and the names beside it."""

    cache: Path
    name: str
    launch: str  # tells this start's failure from an earlier one's

    @property
    def folder(self) -> Path:
        return self.cache / self.name

    @property
    def partial(self) -> Path:
        return self.cache / f".{self.name}.partial"

    @property
    def failed(self) -> Path:
        return self.cache / f".{self.name}.{self.launch}.failed"


def _list(fs: S3, url: str, endpoint_url: str | None) -> _Remote:
    entries = {entry["name"].rsplit("/", 1)[-1]: entry for entry in fs.ls(url, detail=True) if entry["type"] == "file"}
    check_names(entries, url)
    index = None
    if INDEX in entries:
        try:
            index = json.loads(fs.cat_file(f"{url}/{INDEX}"))
        except ValueError as error:
            raise ModelError(f"{url}/{INDEX}: can't be read as JSON ({error}); upload it again") from error
    names = {name for name in entries if PARTS.fullmatch(name)} | weight_names(entries, index, url)
    sizes = {name: int(entries[name]["size"]) for name in sorted(names)}
    versions = [[name, size, str(entries[name].get("ETag"))] for name, size in sizes.items()]
    key = hashlib.sha256(json.dumps([url, endpoint_url, versions]).encode()).hexdigest()[:16]
    return _Remote(url, sizes, key)


def _fetch(fs: S3, remote: _Remote, place: _Place) -> None:
    """Fetch what is missing; on failure leave a note, so that the other ranks of this node need not wait."""
    place.cache.mkdir(parents=True, exist_ok=True)
    try:
        with explained(remote.url, ModelError, local=place.cache), _locked(place.cache / f".{place.name}.lock"):
            if remote.complete(place.folder):
                return  # another run on this node was faster
            _check_room(remote, place)
            _download(fs, remote, place.partial)
            shutil.rmtree(place.folder, ignore_errors=True)  # damaged since: it was not complete
            os.rename(place.partial, place.folder)
            sync(place.cache)
    except BaseException as error:
        with suppress(OSError):
            code = error.exit_code if isinstance(error, RunError) else None
            write_atomically(place.failed, json.dumps({"error": str(error), "exit_code": code}).encode())
        raise


def _download(fs: S3, remote: _Remote, partial: Path) -> None:
    """Fetch each file under a name of its own and rename it: an interrupted fetch goes on where it was."""
    partial.mkdir(exist_ok=True)
    for name, size in remote.sizes.items():
        if _size(partial / name) == size:
            continue
        fs.receive(f"{remote.url}/{name}", partial / f".{name}", size)
        if (got := _size(partial / f".{name}")) != size:
            raise ModelError(
                f"{remote.url}/{name}: got {got} bytes, expected {size}; "
                "it changed while it was fetched: start again when it is still"
            )
        sync(partial / f".{name}")
        os.rename(partial / f".{name}", partial / name)
    for stray in {entry.name for entry in partial.iterdir()} - set(remote.sizes):
        (partial / stray).unlink()


def _check_room(remote: _Remote, place: _Place) -> None:
    held = sum(_size(place.partial / name) or 0 for name in remote.sizes)
    need, free = sum(remote.sizes.values()) - held, shutil.disk_usage(place.cache).free
    if need > free:
        raise ModelError(
            f"{place.cache}: {free / 1e9:.1f} GB free, {remote.url} needs {need / 1e9:.1f} GB; "
            "free space or name another folder in model.cache_path"
        )


def _wait(remote: _Remote, place: _Place, stall: float) -> None:
    """Wait until the model is there; gives up on a note of failure and when nothing arrives any more."""
    arrived, since = -1, time.monotonic()
    while not remote.complete(place.folder):
        with suppress(FileNotFoundError):
            said = json.loads(place.failed.read_bytes())
            raise (StorageDownError if said["exit_code"] == EXIT_STOPPED else ModelError)(said["error"])
        now = _arrived(place.partial)
        if now != arrived:
            arrived, since = now, time.monotonic()
        if time.monotonic() - since > stall:
            raise StorageDownError(
                f"{remote.url}: nothing arrived in {place.cache} for {stall:g} s; "
                "local rank 0 fetches it there: see its messages"
            )
        time.sleep(POLL)


def _arrived(partial: Path) -> int:
    with suppress(OSError):
        return sum(_size(entry) or 0 for entry in partial.iterdir())
    return 0


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock: two runs on one node share the cache; the kernel drops it with its holder."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
