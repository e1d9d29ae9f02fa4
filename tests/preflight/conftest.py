"""Runs whose places a test can spoil one by one, and preflight over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from entrypoint.preflight.__main__ import main
from tests.data.traces import group, write
from tests.servers.s3 import S3Server


@dataclass(frozen=True)
class Said:
    """What preflight ended with; `last` is the log's last line."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return (self.err.strip().splitlines() or self.out.strip().splitlines())[-1]

    def line(self, check: str) -> str:
        """The line of a check that passed."""
        (found,) = [line for line in self.out.splitlines() if line.startswith(f"preflight: {check}: ok, ")]
        return found


Preflight = Callable[..., Said]


@pytest.fixture
def words(tiny: Path, tmp_path: Path) -> list[str]:
    """The words of a DPO run: three groups, of which one makes no pair."""
    rows = [*group("A", 0.9, 0.7, 0.4, 0.2), *group("B", 0.8, 0.3), *group("C", 0.6, 0.55)]
    write(tmp_path / "lake/part.parquet", rows)
    return [
        "method=dpo",
        f"data.path={tmp_path}/lake",
        "data.held_out_share=1e-9",
        f"model.path={tiny}",
        f"checkpoint.path={tmp_path}/checkpoints",
        f"output.path={tmp_path}/out",
    ]


@pytest.fixture
def preflight(words: list[str], capfd: pytest.CaptureFixture[str]) -> Preflight:
    """`python -m entrypoint.preflight`, in this process; of two words for one key the later counts."""

    def run(*more: str) -> Said:
        keys = {word.partition("=")[0]: word for word in (*words, *(word for word in more if word[0] != "-"))}
        options = [word for word in more if word[0] == "-"]
        code = main([*keys.values(), *options])
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture
def keys(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's credentials, in the environment."""
    for name, value in {**s3.env, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
