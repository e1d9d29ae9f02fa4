"""A storage that takes no more: training goes on where an older checkpoint is intact, and ends clearly where none is.

On a real tmpfs, mounted in a name space of the test's own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from entrypoint.checkpoint.find import newest
from entrypoint.launch.topology import free_port
from tests.checkpoint.states import RUN
from tests.process import ROOT, scrubbed

TMPFS = "mount -t tmpfs -o size=8m tmpfs {folder} && {ranks}"
RANK = "RANK={rank} LOCAL_RANK={rank} {python} -m tests.checkpoint.saving_rank {folder} {fault}"


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users may enter: pytest's own lie in one that only its owner may."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def save(folder: Path, fault: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    commands = [RANK.format(rank=rank, python=sys.executable, folder=folder, fault=fault) for rank in range(ranks)]
    script = " & ".join([*commands[1:], f"{commands[0]}; code=$?; wait; exit $code"])
    meet = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = ["sh", "-c", script]
    if not fault.endswith("permission"):
        words = [
            "unshare",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            TMPFS.format(folder=folder, ranks=f"{{ {script}; }}"),
        ]
    return subprocess.run(
        words, cwd=ROOT, env=scrubbed(meet), capture_output=True, text=True, timeout=900, check=False
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "ranks", "says"),
    [
        ("full", 1, "the disk is full"),
        ("full", 2, "the disk is full"),
        ("read-only", 1, "the file system is read-only"),
        ("permission", 1, "permission denied to user "),
    ],
)
def test_training_goes_on_with_the_older_checkpoint(shared: Path, fault: str, ranks: int, says: str) -> None:
    ended = save(shared / "disk", fault, ranks)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert [line for line in ended.stdout.splitlines() if "metrics" not in line] == [
        "1: step-00000001, newest 1",
        "2: step-00000001, newest 1",
        "3: step-00000001 step-00000003, newest 3",
    ]
    *metrics, warning = [line for line in ended.stderr.splitlines() if line.startswith("entrypoint: ")]
    if fault == "full":
        assert len(metrics) == 1
        assert metrics[0].startswith("entrypoint: warning: metrics are held back: ")
        assert "metrics of 1 2 3 4" in ended.stdout
    assert warning.startswith("entrypoint: warning: step 2 is not saved: ")
    assert says in warning
    assert warning.endswith("training goes on, and a crash would now go back to step 1")
    if fault == "permission":
        assert newest(shared / "disk", RUN, above=2, warn=print) == shared / "disk" / "step-00000003"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_can_save_nothing_ends_with_its_reason(shared: Path, ranks: int) -> None:
    ended = save(shared / "disk", "first-full", ranks)
    assert ended.returncode == 64, ended.stderr[-3000:]
    assert "step 1 can't be saved, and there is no older checkpoint: " in ended.stderr
    assert "the disk is full" in ended.stderr
    assert "Traceback" not in ended.stderr
