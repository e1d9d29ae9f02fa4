"""S3: s3fs whose every request is bounded, and tried again for as long as its failure may pass by itself.

One mechanism for listing, reading and writing: it sits where s3fs asks botocore, whose own retries are off. What is
still refused after the last attempt is an `Unavailable`, and no loop above tries it again. A black hole costs at most
about `ATTEMPTS` times `READ_TIMEOUT` and the pauses between (four minutes), a closed port the pauses alone (under one).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import s3fs

from entrypoint.errors import ConfigError
from entrypoint.storage import Unavailable, error_code, temporary

CONNECT_TIMEOUT = 5  # seconds
READ_TIMEOUT = 20  # seconds without a byte
SLOWEST = 1 << 20  # bytes a second that an upload makes at least
ATTEMPTS = 8  # of one request, where AWS_MAX_ATTEMPTS doesn't say otherwise
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between two attempts: doubled each time, then up to half taken off
BODIES = 6  # how often s3fs asks again for a body that breaks off
PART = 32 << 20  # bytes fetched in one request
AT_ONCE = 8  # requests of one file on their way

# Whoever awaits a request learns of its failure; the task in which aiohttp sends the body would tell the log once more,
# with a traceback.
logging.getLogger("asyncio").addFilter(lambda said: not said.getMessage().startswith("Task exception was never retr"))


class S3(s3fs.S3FileSystem):  # type: ignore[misc]
    """An s3fs file system with patience."""

    cachable = False  # a shared instance's listings would hide what another process wrote since

    def __init__(self, endpoint_url: str | None) -> None:
        super().__init__(
            endpoint_url=endpoint_url or None,
            max_concurrency=1,  # of reads: one request is one object
            config_kwargs={
                "connect_timeout": CONNECT_TIMEOUT,
                "read_timeout": READ_TIMEOUT,
                "retries": {"mode": "standard", "total_max_attempts": 1},
            },
        )
        self.retries = BODIES
        self.attempts = _attempts()

    async def set_session(self, refresh: bool = False, kwargs: dict[str, Any] | None = None) -> Any:
        """botocore's client, its one way to ask made patient; s3fs calls this before each request."""
        client = await super().set_session(refresh, kwargs or {})
        if not hasattr(client, "patient"):
            client.patient = True
            client._make_api_call = self._patient(client._make_api_call)
        return client

    def _patient(self, ask: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(operation: str, parameters: dict[str, Any]) -> Any:
            begin, pause = time.monotonic(), FIRST_PAUSE
            body = parameters.get("Body")
            limit = CONNECT_TIMEOUT + READ_TIMEOUT + (len(body) if isinstance(body, bytes) else 0) / SLOWEST
            for attempt in range(1, self.attempts + 1):
                try:
                    # aiohttp's timeouts don't cover a body that nobody takes off the wire. A copy: botocore puts a
                    # file in the place of the body, and after one attempt that file is at its end.
                    return await asyncio.wait_for(ask(operation, dict(parameters)), limit)
                except Exception as error:
                    if not temporary(error):
                        raise
                    if attempt == self.attempts:
                        message = " ".join(str(error).split()) or type(error).__name__
                        raise Unavailable(
                            f"{attempt} attempts in {time.monotonic() - begin:.0f} s, the last: {message}"
                        ) from error
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE)

        return call

    def send(self, path: Path, url: str) -> None:
        """Copy a local file to `url`, in parts where it is large; it is there whole or not at all."""
        for last in (False, True):
            try:
                self.put_file(str(path), url, max_concurrency=AT_ONCE)
                return
            except FileNotFoundError as error:
                # The answer to an upload's last request was lost: asked again, the server knows the upload no more.
                if error_code(error) != "NoSuchUpload" or last:
                    raise

    def receive(self, url: str, path: Path, size: int) -> None:
        """Copy an object of `size` bytes to a local file, in ranges where it is large; on failure a torn one stays."""
        with open(path, "wb") as file:
            if size <= PART:
                file.write(self.cat_file(url))
                return

            def fetch(start: int) -> None:
                os.pwrite(file.fileno(), self.cat_file(url, start=start, end=min(start + PART, size)), start)

            with ThreadPoolExecutor(AT_ONCE) as pool:
                try:
                    for _ in pool.map(fetch, range(0, size, PART)):
                        pass
                finally:
                    pool.shutdown(cancel_futures=True)

    def abandon_uploads(self, url: str, ours: re.Pattern[str]) -> None:
        """End uploads in parts that a killed writer began: nobody sees them, and they are paid for.

        Args:
            url: a prefix; below it
            ours: says in full which names are this writer's.
        """
        bucket, prefix, _ = self.split_path(url.rstrip("/") + "/")
        with suppress(PermissionError):  # who may not look leaves them to the bucket's lifecycle rule
            found = self.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
            for upload in found.get("Uploads", []):
                if ours.fullmatch(upload["Key"].removeprefix(prefix)):
                    key, number = upload["Key"], upload["UploadId"]
                    with suppress(FileNotFoundError):
                        self.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=number)


def _attempts() -> int:
    said = os.environ.get("AWS_MAX_ATTEMPTS") or str(ATTEMPTS)
    if not said.isdecimal() or int(said) < 1:
        raise ConfigError(f"AWS_MAX_ATTEMPTS: expected a whole number of attempts >= 1, got {said!r}")
    return int(said)
