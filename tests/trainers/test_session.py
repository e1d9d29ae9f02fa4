"""What a session keeps beside its checkpoints: a damaged or a refused file costs a measurement, not the run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from entrypoint.session import BEFORE, Session
from entrypoint.storage import note


def before(folder: Path) -> dict[str, float] | None:
    session: Any = SimpleNamespace(loaded=SimpleNamespace(checkpoints=SimpleNamespace(folder=folder)))
    session._judged = lambda: {"pairs": 3}
    return Session._read_before(session)


def test_the_metrics_before_are_measured_again_where_they_cannot_be_read(tmp_path: Path) -> None:
    assert before(tmp_path) is None
    whole = json.dumps({"pairs": 3, "metrics": {"accuracy": 0.5}})
    for damaged in ("", whole[:-1], "[]", "{}", whole.replace("3", "4")):
        (tmp_path / BEFORE).write_text(damaged)
        assert before(tmp_path) is None
    (tmp_path / BEFORE).write_text(whole)
    assert before(tmp_path) == {"accuracy": 0.5}


def test_a_full_disk_costs_a_note_and_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    said: list[str] = []
    note(tmp_path / BEFORE, b"1", said.append)
    monkeypatch.setattr(os, "fsync", full)
    note(tmp_path / BEFORE, b"2", said.append)
    assert len(said) == 1
    assert said[0].startswith("not kept, so the next start finds it out again: ")
    assert f"{tmp_path / BEFORE}: the disk is full" in said[0]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(BEFORE, b"1")]
