"""Finding checkpoints: the newest whole one of this run, and nothing lost on the way."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from entrypoint.checkpoint.find import differences
from entrypoint.checkpoint.manifest import MANIFEST, DamagedError, File, Manifest
from entrypoint.errors import CheckpointError, StorageDownError
from tests.checkpoint.states import RUN, State, checkpoints


def write(folder: Path, step: int, fingerprint: dict[str, Any] = RUN) -> Path:
    """A checkpoint by its manifest, of one file."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"x" * 10)
    sha256 = hashlib.sha256(b"x" * 10).hexdigest()
    Manifest(step, fingerprint, None, {"weights": File(10, sha256)}).write(path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_none_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "missing").find("auto") is None
    assert checkpoints(tmp_path).find("auto") is None
    with pytest.raises(CheckpointError, match=r"no complete checkpoint, expected one since checkpoint\.resume=must"):
        checkpoints(tmp_path).find("must")


def test_the_newest_is_by_step_and_not_by_time(tmp_path: Path) -> None:
    for at, step in enumerate((1000, 900, 200)):  # the newest in step is the oldest by every clock
        path = write(tmp_path, step)
        for file in (*path.iterdir(), path):
            os.utime(file, (1e9 + at, 1e9 + at))
    assert checkpoints(tmp_path).find("auto") == tmp_path / "step-00001000"


def test_another_runs_checkpoint_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    """Before its files are read: this one's are damaged, and that is not what is said."""
    other = write(tmp_path, 3, RUN | {"train.learning_rate": 2e-5})
    (other / "weights").write_bytes(b"y" * 10)
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
    assert names(tmp_path / "older.aside-1") == ["step-00000001", "step-00000002"]
    assert "2 older checkpoints were moved to" in capsys.readouterr().err
    write(tmp_path, 5)
    assert checkpoints(tmp_path).find("never") is None
    assert names(tmp_path / "older.aside-2") == ["step-00000005"]
    assert checkpoints(tmp_path).find("auto") is None


# Damage --------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit, in the middle of what the file says."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    os.truncate(path, 0)


FILES = ["__0_0.distcp", ".metadata", "scheduler.json", "trainer_state.json", MANIFEST]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2, as a run writes them."""
    folder = tmp_path_factory.mktemp("saved")
    run, store = State.fresh(), checkpoints(folder)
    for _ in range(2):
        run.step()
        run.save(store)
    store.wait()
    return folder


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
def test_a_damaged_one_is_set_aside_for_the_next_older(
    saved: Path, tmp_path: Path, file: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "run"))
    assert sorted(FILES) == names(folder / "step-00000002")
    damage(folder / "step-00000002" / file)
    assert checkpoints(folder).find("auto") == folder / "step-00000001"
    said = capsys.readouterr().err
    assert f"step-00000002: is damaged ({file}: " in said
    assert "it is now step-00000002.damaged-1, and the next older one is looked for" in said
    run = State.fresh().load(store := checkpoints(folder), folder / "step-00000001")
    assert torch.equal(run.weight, State.fresh().steps(1).weight)
    run.step()  # and the step that was damaged is saved anew
    run.save(store)
    store.wait()
    assert names(folder) == ["step-00000001", "step-00000002", "step-00000002.damaged-1"]
    assert checkpoints(folder).find("auto") == folder / "step-00000002"


@pytest.mark.parametrize("damage", [truncate, flip])
def test_damage_is_never_the_reason_for_a_start_at_step_0(
    saved: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "run"))
    for step in (1, 2):
        damage(folder / f"step-0000000{step}" / "__0_0.distcp")
    for _ in range(2):  # at the second start nothing has its name any more
        with pytest.raises(CheckpointError, match="holds no whole checkpoint, and 2 damaged ones are known") as refused:
            checkpoints(folder).find("auto")
        assert refused.value.exit_code == 64
    assert checkpoints(folder).find("never") is None
    assert checkpoints(folder).find("auto") is None  # a human has said so


def test_every_bit_of_a_manifest_counts(saved: Path, tmp_path: Path) -> None:
    """A flipped bit of the fingerprint must not look like another run's, nor one of `best` like another quality."""
    whole = Manifest.read(saved / "step-00000002")
    content = (saved / "step-00000002" / MANIFEST).read_bytes()
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        (tmp_path / MANIFEST).write_bytes(flipped)
        try:
            assert Manifest.read(tmp_path) == whole  # a blank between two values
        except DamagedError:
            continue


# The mirror ----------------------------------------------------------------------------------------------------------


class Above:
    """A mirror that holds one step, or can't be asked."""

    uploading = None

    def __init__(self, step: int | None, error: Exception | None = None) -> None:
        self.step, self.error = step, error
        self.submitted: list[Path] = []

    def newest(self, fingerprint: dict[str, Any]) -> int | None:
        if self.error:
            raise self.error
        return self.step

    def fetch(self, step: int, into: Path) -> Path:
        return write(into, step)

    def submit(self, folder: Path) -> None:
        self.submitted.append(folder)


@pytest.mark.parametrize(("above", "found"), [(None, 5), (4, 5), (5, 5), (6, 6)])
def test_the_mirror_is_asked_where_it_has_a_newer_one(tmp_path: Path, above: int | None, found: int) -> None:
    write(tmp_path, 5)
    assert checkpoints(tmp_path, mirror=Above(above)).find("auto") == tmp_path / f"step-{found:08d}"


def test_the_mirror_stands_in_for_a_damaged_and_for_a_lost_one(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (write(tmp_path, 5) / "weights").unlink()
    assert checkpoints(tmp_path, mirror=Above(5)).find("auto") == tmp_path / "step-00000005"
    assert "step-00000005.damaged-1" in names(tmp_path)
    assert checkpoints(tmp_path / "lost", mirror=Above(5)).find("must") == tmp_path / "lost" / "step-00000005"


def test_a_mirror_that_is_down_is_no_reason_to_begin_anew(tmp_path: Path) -> None:
    down = Above(None, StorageDownError("s3://b/c: can't be reached"))
    with pytest.raises(StorageDownError):
        checkpoints(tmp_path, mirror=down).find("auto")
    write(tmp_path, 3)
    assert checkpoints(tmp_path, mirror=down).find("auto") == tmp_path / "step-00000003"
    wrong = Above(None, CheckpointError("another run's"))
    with pytest.raises(CheckpointError, match="another run's"):
        checkpoints(tmp_path, mirror=wrong).find("auto")


def test_never_does_not_leave_a_mirror_that_a_later_restart_would_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.mirror: holds step 7 of this run"):
        checkpoints(tmp_path, mirror=Above(7)).find("never")
