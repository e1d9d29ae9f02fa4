"""Finding checkpoints: the newest complete one of this run, and nothing lost on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from entrypoint.errors import CheckpointError
from entrypoint.training.checkpoint import MANIFEST, Checkpoints, differences, is_complete
from tests.trainers.builders import ALONE

RUN = {"train.learning_rate": 1e-5, "train.seed": 42}


def write(folder: Path, step: int, fingerprint: dict[str, Any] = RUN) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"x" * 10)
    manifest = {"step": step, "fingerprint": fingerprint, "files": {"weights": 10}}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder, keep=keep, fingerprint=RUN, world=ALONE)


def test_none_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "missing").find("auto") is None
    assert checkpoints(tmp_path).find("auto") is None
    with pytest.raises(CheckpointError, match=r"no complete checkpoint, expected one since checkpoint\.resume=must"):
        checkpoints(tmp_path).find("must")


def test_the_newest_is_by_step_and_not_by_time(tmp_path: Path) -> None:
    write(tmp_path, 200)
    write(tmp_path, 1000)
    write(tmp_path, 900)
    assert checkpoints(tmp_path).find("auto") == tmp_path / "step-00001000"


@pytest.mark.parametrize("damage", ["partial name", "no manifest", "short file", "file gone", "torn manifest"])
def test_an_incomplete_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    if damage == "partial name":
        bad.rename(tmp_path / "step-00000002.partial")
    elif damage == "no manifest":
        (bad / MANIFEST).unlink()
    elif damage == "short file":
        (bad / "weights").write_bytes(b"x")
    elif damage == "file gone":
        (bad / "weights").unlink()
    else:
        (bad / MANIFEST).write_text('{"step": 2, "fil')
    assert checkpoints(tmp_path).find("auto") == good
    assert is_complete(good)
    assert not is_complete(bad)


def test_another_runs_checkpoint_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    write(tmp_path, 3, RUN | {"train.learning_rate": 2e-5})
    with pytest.raises(CheckpointError) as refused:
        checkpoints(tmp_path).find("auto")
    assert "train.learning_rate (2e-05 there, 1e-05 here)" in str(refused.value)
    assert "train.seed" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_differences_name_keys_of_either_side() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 2}) == ""
    assert differences({"a": 1}, {"b": None, "c": 3}) == "a (1 there, None here), c (None there, 3 here)"


def test_never_sets_the_older_ones_aside_and_loses_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    assert checkpoints(tmp_path).find("never") is None
    assert sorted(p.name for p in (tmp_path / "older.aside-1").iterdir()) == ["step-00000001", "step-00000002"]
    assert "2 older checkpoints were moved to" in capsys.readouterr().err
    write(tmp_path, 5)
    assert checkpoints(tmp_path).find("never") is None
    assert (tmp_path / "older.aside-2" / "step-00000005").is_dir()
    assert checkpoints(tmp_path).find("auto") is None


def test_a_damaged_one_is_kept_by_name_when_its_step_comes_again(tmp_path: Path) -> None:
    damaged = write(tmp_path, 2)
    (damaged / "weights").unlink()
    partial = tmp_path / "step-00000002.partial"
    partial.mkdir()
    (partial / "weights").write_bytes(b"new")
    checkpoints(tmp_path)._seal(partial, damaged, 2)
    assert checkpoints(tmp_path).find("must") == damaged
    assert (tmp_path / "step-00000002.damaged-1" / MANIFEST).exists()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write(tmp_path, step)
    (tmp_path / "step-00000002" / "weights").unlink()  # incomplete: not counted, and left for a person to look at
    checkpoints(tmp_path, keep=2)._prune()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003", "step-00000010"]
