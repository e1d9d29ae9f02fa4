"""An S3 server with authentication on: versitygw, whose objects lie as plain files in a folder."""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import s3fs

from entrypoint.launch.topology import free_port
from tests.servers.server import serve

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class S3Server:
    """A running server; `root/<bucket>/<key>` is the object's file."""

    endpoint_url: str
    access_key: str
    secret_key: str
    root: Path

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment to reach the server through the usual AWS credential chain.

        The endpoint is not among it: that is `data.endpoint_url`'s task.
        """
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @functools.cached_property
    def _own(self) -> s3fs.S3FileSystem:
        return self.fs()

    def fs(self, *, key: str | None = None, secret: str | None = None, anon: bool = False) -> s3fs.S3FileSystem:
        """A file system on this server, not shared with other callers; other keys than the right ones on request."""
        keys: dict[str, Any] = {} if anon else {"key": key or self.access_key, "secret": secret or self.secret_key}
        return s3fs.S3FileSystem(
            anon=anon,
            endpoint_url=self.endpoint_url,
            skip_instance_cache=True,
            use_listings_cache=False,
            **keys,
        )

    def bucket(self, prefix: str = "bucket") -> str:
        """Create an empty bucket and return its name."""
        name = f"{prefix}-{secrets.token_hex(4)}"
        self._own.mkdir(name)
        return name

    def upload(self, folder: Path, bucket: str, prefix: str = "") -> str:
        """Copy a folder's files into a bucket; returns their common `s3://` address."""
        base = f"{bucket}/{prefix}".rstrip("/")
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self._own.put_file(str(file), f"{base}/{file.relative_to(folder).as_posix()}")
        return f"s3://{base}"


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Start a server on a free loopback port with random root keys; objects and log lie under `folder`."""
    binary = subprocess.run(
        [ROOT / ".ci/tools/build", "versitygw"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    port = free_port()
    access, secret = secrets.token_hex(10), secrets.token_hex(20)
    root = folder / "buckets"
    root.mkdir(parents=True)
    sidecar = folder / "metadata"  # file systems without extended attributes keep metadata here
    sidecar.mkdir()
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "ROOT_ACCESS_KEY": access,
        "ROOT_SECRET_KEY": secret,
    }
    command = [binary, "--port", f"127.0.0.1:{port}", "--health", "/health"]
    command += ["posix", "--sidecar", str(sidecar), str(root)]

    def ready() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    with serve(command, env=env, log=folder / "s3.log", ready=ready, timeout=30):
        yield S3Server(f"http://127.0.0.1:{port}", access, secret, root)
