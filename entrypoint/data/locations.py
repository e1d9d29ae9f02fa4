"""`data.path` to an ordered list of Parquet files: a file, a folder, a glob or a list of these, local or s3://.

In a folder the files `*.parquet`, `*.parq` and `*.pq` count, at any depth; names that begin with `_` or `.` are Spark's
and Hadoop's own bookkeeping (`_SUCCESS`, `.part-0.crc`) and don't. A file that is named, or that a glob finds, counts
whatever its name. Folders called `key=value` are Hive partitions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from entrypoint.errors import DataError
from entrypoint.storage import explained, filesystem, is_s3, local_path

SUFFIXES = (".parquet", ".parq", ".pq")
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
BLOCK = 64 * 1024  # bytes; Parquet's footer, which addresses and bounds every column chunk, ends the file
SAMPLES = 64  # blocks that stand for a large local file
WHOLE = SAMPLES * BLOCK  # bytes; a file up to this size is hashed whole


@dataclass(frozen=True)
class TraceFile:
    """One Parquet file.

    Attributes:
        path: as messages show it: a local path or s3://bucket/key.
        size: bytes.
        identity: says whether the content is the same, wherever the file lies and whenever it was written.
        partitions: Hive keys of its folders; None where Hive wrote its mark for null.
    """

    path: str
    size: int
    identity: str
    partitions: Mapping[str, str | None]


def find_files(path: Any, endpoint_url: str | None = None) -> list[TraceFile]:
    """The files that `data.path` names, each once, in the order of their paths.

    Raises:
        DataError: nothing is there, or the storage refuses or can't be reached.
    """
    locations = [path] if isinstance(path, str | os.PathLike) else list(path or ())
    if not locations:
        raise DataError("data.path: got an empty list; expected a file, a folder or a glob of Parquet traces")
    found: dict[str, TraceFile] = {}
    for location in locations:
        text = os.fspath(location) if isinstance(location, str | os.PathLike) else repr(location)
        if not isinstance(location, str | os.PathLike) or not text.strip():
            raise DataError(
                f"data.path: got {text or repr(text)}; expected a file, a folder or a glob of Parquet traces"
            )
        for file in _find(text, endpoint_url):
            found[file.path] = file
    return [found[name] for name in sorted(found)]


class Opener:
    """Opens trace files for random reads, over one S3 connection pool, from any thread."""

    def __init__(self, endpoint_url: str | None = None) -> None:
        self._endpoint_url = endpoint_url
        self._s3: AbstractFileSystem | None = None
        self._lock = Lock()

    def __call__(self, file: TraceFile, *, whole: bool = False) -> Any:
        """A file for Parquet's reader; with `whole` an S3 object is fetched now, in one request."""
        if not is_s3(file.path):
            return pa.OSFile(file.path)  # reads without Python's lock
        with self._lock:
            self._s3 = self._s3 or filesystem(file.path, self._endpoint_url)
        if whole:
            return pa.BufferReader(self._s3.cat_file(file.path))
        # Without a cache S3 is asked for exactly what Parquet's reader wants: it joins its ranges itself.
        return self._s3.open(file.path, "rb", cache_type="none")


def partitions_of(path: str) -> dict[str, str | None]:
    """Hive partitions of a file's folders, values unquoted; the innermost of two equal keys wins."""
    found: dict[str, str | None] = {}
    for part in path.split("/")[:-1]:
        key, equals, value = part.partition("=")
        if equals and key:
            found[unquote(key)] = None if value == NULL_PARTITION else unquote(value)
    return found


def _find(location: str, endpoint_url: str | None) -> list[TraceFile]:
    if is_s3(location):
        location = location.replace("s3a://", "s3://", 1)
    elif location.startswith("file://"):
        location = str(local_path(location))
    elif "://" in location:
        scheme = location.split("://")[0]
        raise DataError(f"data.path: {location}: got scheme {scheme}://; expected a local path or s3://bucket/prefix")
    fs = filesystem(location, endpoint_url)
    with explained(location, DataError):
        entries = _entries(fs, location)
        files = [_trace_file(entry) for entry in entries if not _hidden(entry["name"], location)]
    if not files:
        others = f"{len(entries)} files, all hidden" if entries else "nothing"
        raise DataError(
            f"{location}: found {others}; expected Parquet files ({', '.join('*' + s for s in SUFFIXES)});"
            " check data.path, or name other files by a glob"
        )
    return files


def _entries(fs: AbstractFileSystem, location: str) -> list[dict[str, Any]]:
    """What a location holds: files as fsspec describes them. Raises FileNotFoundError where there is nothing."""
    if any(mark in location for mark in "*?[") and (is_s3(location) or not os.path.lexists(location)):
        matches = fs.glob(location, detail=True)
        if not matches:
            raise DataError(f"{location}: the glob matches nothing; expected Parquet files; check data.path")
        return [entry for match in matches.values() for entry in _expand(fs, match)]
    bucket = location.removeprefix("s3://").rstrip("/")
    if is_s3(location) and "/" not in bucket:
        return _expand(fs, {"name": bucket, "type": "directory"})
    return _expand(fs, fs.info(location.rstrip("/") or "/"))


def _expand(fs: AbstractFileSystem, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """A file as it is, a folder as the Parquet files below it."""
    if entry["type"] == "file":
        return [entry]
    if entry["type"] != "directory":
        raise DataError(f"{entry['name']}: got a {entry['type']}; expected a Parquet file or a folder of them")
    if isinstance(fs, LocalFileSystem):
        found = list(_walk(entry["name"]))
    else:
        found = [e for e in fs.find(entry["name"], detail=True).values() if e["type"] == "file"]
    chosen = [e for e in found if e["name"].lower().endswith(SUFFIXES)]
    names = sorted(Path(e["name"]).name for e in found)
    visible = [name for name in names if not name.startswith(("_", "."))]
    if not chosen and visible:
        raise DataError(
            f"{entry['name']}: found {len(visible)} files ({visible[0]}, …), none called"
            f" {', '.join('*' + s for s in SUFFIXES)}; if they are Parquet, name them by a glob: FOLDER/*"
        )
    return chosen


def _walk(folder: str) -> Iterator[dict[str, Any]]:
    """Every file below a local folder; a folder that can't be listed is an error, not an empty one."""

    def fail(error: OSError) -> None:
        raise error

    for root, _, names in os.walk(folder, onerror=fail, followlinks=True):
        for name in names:
            yield {"name": os.path.join(root, name), "type": "file"}


def _hidden(name: str, location: str) -> bool:
    """Whether a part of the path below `location` is hidden; what the user named outright never is."""
    base = location.removeprefix("s3://").rstrip("/")
    below = name[len(base) :] if name.startswith(base + "/") else Path(name).name if name != base else ""
    return any(part.startswith(("_", ".")) for part in below.split("/") if part)


def _trace_file(entry: dict[str, Any]) -> TraceFile:
    if "ETag" in entry:  # S3
        path, size = f"s3://{entry['name']}", int(entry["size"])
        return TraceFile(path, size, f"{entry['ETag']}:{size}".replace('"', ""), partitions_of(path))
    path = entry["name"]
    size = os.path.getsize(path)
    return TraceFile(path, size, f"{_fingerprint(path, size)}:{size}", partitions_of(path))


def _fingerprint(path: str, size: int) -> str:
    """sha256 of a small file, or of the footer and evenly spread blocks of a large one."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
            return digest.hexdigest()
        for number in range(SAMPLES):
            file.seek((size - BLOCK) * number // (SAMPLES - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()
