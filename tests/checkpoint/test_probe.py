"""The probe: ranks that see one folder, and ranks that don't."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from entrypoint.checkpoint.probe import check_shared
from entrypoint.errors import ConfigError, RefusedElsewhere, RunError
from entrypoint.world import World


def probe(folders: list[Path]) -> list[RunError | None]:
    """What each rank makes of its folder."""
    store = dist.HashStore()
    for folder in folders:
        folder.mkdir(exist_ok=True)

    def rank(number: int) -> RunError | None:
        try:
            check_shared(folders[number], World(number, len(folders), store))
        except RunError as error:
            return error
        return None

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(rank, range(len(folders))))


def test_one_folder_is_seen_by_all_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / ".probe-of-a-start-that-was-killed").mkdir()
    assert probe([tmp_path] * 3) == [None] * 3
    assert not [*tmp_path.iterdir()]


def test_a_rank_with_a_folder_of_its_own_ends_the_run_on_all(tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    said = probe([shared, shared, own])
    assert isinstance(said[2], ConfigError)
    assert "checkpoint.path: rank 2 on " in str(said[2])
    assert f"does not see in {own} what rank 0 on " in str(said[2])
    assert "expected one folder that all ranks see: name a file system that every node mounts" in str(said[2])
    assert isinstance(said[0], RefusedElsewhere)
    assert [error.exit_code for error in said if error] == [64] * 3


def test_a_rank_whose_writes_stay_its_own_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as over a lower folder that is shared: it reads what rank 0 writes."""
    plain = Path.write_text

    def write_text(path: Path, text: str, *more: object) -> int:
        return plain(path.with_name("elsewhere") if path.name == "1" else path, text)

    monkeypatch.setattr(Path, "write_text", write_text)
    said = probe([tmp_path] * 2)
    assert f"rank 0 does not see in {tmp_path} what rank 1 wrote there" in str(said[0])
