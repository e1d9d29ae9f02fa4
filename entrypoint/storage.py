"""Storage: one way to open, copy and write, local or S3, and one line that explains why it failed.

A failure that may pass by itself, and has outlasted the attempts of `entrypoint.s3`, ends with 75, whatever was done:
the same command may well succeed later. Everything else is refused with 64.
Credentials come from the usual AWS chain and are never an argument.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from entrypoint.errors import RunError, StorageDownError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from entrypoint.s3 import S3

BLOCK = 1 << 20

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}  # s3fs's own have a cause or no number
CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role (in EKS, the account's Pod Identity association)"
BAD_CREDENTIALS = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "XAdminUserNotFound",  # versitygw's InvalidAccessKeyId
}
TEMPORARY_CODES = {  # beside those that come with a status of 429 or 5xx
    "BadDigest",  # what arrived is not what was sent
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
}
# Told by name: importing these libraries takes a second, and may fail where the disk does.
BROKEN_OFF = {
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.ConnectionError",  # refused, no such host, connect timeout
    "botocore.exceptions.HTTPClientError",  # broken off, read timeout
    "botocore.parsers.ResponseParserError",
    "http.client.IncompleteRead",
}
STORAGE_ERRORS = BROKEN_OFF | {"botocore.exceptions.BotoCoreError", "botocore.exceptions.ClientError"}


class Unavailable(ConnectionError):
    """A request that failed at each of its attempts in a way that may pass by itself; the last failure is its cause."""


def is_s3(url: str) -> bool:
    """Whether `url` names an S3 bucket rather than a local path."""
    return url.startswith(("s3://", "s3a://"))


def local_path(url: str) -> Path:
    """The local path that `url` (a path or file://) names."""
    return Path(unquote(urlsplit(url).path)) if url.startswith("file://") else Path(url)


def filesystem(url: str, endpoint_url: str | None = None) -> AbstractFileSystem:
    """The fsspec file system that `url` lives on; on S3 with bounded timeouts and retries.

    Args:
        url: a local path, file:// or s3://.
        endpoint_url: S3 endpoint, where it is not AWS's own; ignored for local paths.
    """
    if not is_s3(url):
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem()
    return s3(endpoint_url)


def s3(endpoint_url: str | None) -> S3:
    """S3 at this endpoint, or AWS's own; nothing is asked of it yet."""
    from entrypoint.s3 import S3

    return S3(endpoint_url)


def explain(error: BaseException, url: str) -> str:
    """One line: where, what was refused and what to do, for a failure of s3fs, botocore or the local disk."""
    code, message = error_code(error), " ".join(str(error).split()) or type(error).__name__
    name = type(error).__name__
    number = error.errno if isinstance(error, OSError) else None
    if code in BAD_CREDENTIALS:
        return f"{url}: the storage refused the credentials ({code}); check {CREDENTIALS}"
    if name in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"):
        return f"{url}: no AWS credentials found ({message}); give {CREDENTIALS}"
    if code == "NoSuchBucket":
        return f"{url}: no such bucket; create it, or check the name and endpoint_url"
    if temporary(error):
        return (
            f"{url}: the storage can't be reached ({message}); check endpoint_url and the network, then start the same "
            "command again"
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{url}: the disk is full ({message}); free space or name another folder"
    if number == errno.EROFS:
        return f"{url}: the file system is read-only ({message}); name another folder"
    if isinstance(error, PermissionError) or code in ("AccessDenied", "403"):
        who = "these AWS credentials" if is_s3(url) else f"user {os.getuid()}"
        return f"{url}: permission denied to {who} ({message}); grant access or name another location"
    if isinstance(error, FileNotFoundError):
        return f"{url}: not found ({message}); check the path" + (" and endpoint_url" if is_s3(url) else "")
    return f"{url}: {name}: {message}" + (f" ({code})" if code else "")


def temporary(error: BaseException) -> bool:
    """Whether the same request may well succeed later: an unreachable, overloaded or broken server, a torn answer."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if (code := error_code(error)) in TEMPORARY_CODES:
        return True
    if code:
        return (status := _status(error)) == 429 or (status >= 500 and status != 501)
    kinds = _kinds(error)
    if "botocore.exceptions.SSLError" in kinds and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    return not kinds.isdisjoint(BROKEN_OFF)


@contextmanager
def explained(url: str, kind: type[RunError], *, local: Path | None = None) -> Iterator[None]:
    """Turn a storage failure inside the block into `kind` with one line; programming errors pass as they are.

    Args:
        url: where the block reads or writes.
        local: for a copy from or to S3, the local end: a full or closed disk is told by its name.

    Raises:
        RunError: of the given kind; StorageDownError where the failure may pass by itself.
    """
    try:
        yield
    except Exception as error:
        if not _is_storage_error(error):
            raise
        on_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS and error.__cause__ is None
        if temporary(error):
            kind = StorageDownError
        raise kind(explain(error, str(local) if local and on_disk else url)) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, fsync, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")  # pids of containers repeat
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def note(path: Path, content: bytes, warn: Callable[[str], None]) -> None:
    """Write what a later start could find out again: where the disk takes nothing, a warning says so."""
    try:
        write_atomically(path, content)
    except OSError as error:
        warn(f"not kept, so the next start finds it out again: {explain(error, str(path))}")


def sync(path: Path) -> None:
    """fsync a file or a folder, so that its bytes, or the names in it, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a local file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def error_code(error: BaseException) -> str:
    """The S3 error code, or "": s3fs keeps botocore's ClientError as the cause of its OSError."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int:
    """The HTTP status of S3's answer, or 0."""
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _response(error: BaseException) -> dict[str, Any]:
    for link in _chain(error):
        response: Any = getattr(link, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _is_storage_error(error: BaseException) -> bool:
    return isinstance(error, OSError) or not _kinds(error).isdisjoint(STORAGE_ERRORS)


def _kinds(error: BaseException) -> set[str]:
    """Names of the error's classes, with their modules'."""
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
