"""What the tests of this folder share: the server's keys, and pauses that cost milliseconds."""

from __future__ import annotations

import pytest

import entrypoint.s3
from tests.servers.s3 import S3Server

ATTEMPTS = 10
READ_TIMEOUT = 1  # seconds


@pytest.fixture(autouse=True)
def impatient(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's keys, small parts, short pauses: a fault costs milliseconds."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", str(ATTEMPTS))
    for constant, number in {
        "FIRST_PAUSE": 0.001,
        "LONGEST_PAUSE": 0.01,
        "READ_TIMEOUT": READ_TIMEOUT,
        "BODIES": ATTEMPTS,
        "PART": 1 << 18,
    }.items():
        monkeypatch.setattr(entrypoint.s3, constant, number)
