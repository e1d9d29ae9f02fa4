"""Ranks that die, stand still, crash or are told to stop: the others leave in a bounded time, and say why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.process import ROOT, scrubbed
from tests.servers.server import free_port

pytestmark = pytest.mark.slow

DEADLINE = 240.0  # seconds for what takes ten on a quiet machine
TIMEOUT = 10  # of the ranks' collectives, seconds
SLACK = 15.0  # seconds on a busy machine
AT_ONCE = 5.0  # seconds from a notice to the end of the process

# Each rank comes to a place where it would stay for ever, unless its words say otherwise: reading a pipe (as in a query
# or a slow read), or waiting for a rank that does that.
PROGRAM = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from entrypoint.errors import RunError
from entrypoint.launch.verdict import leave
from entrypoint.watch import Watch
from entrypoint.world import joined

folder, timeout, word = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
watch = Watch()
watch.listen()

def stay():
    return (folder / "pipe").read_text()

code = 0
try:
    with joined(timeout, watch) as world:
        watch.patience = None if word == "collective" else watch.patience
        (folder / f"ready.{world.rank}").touch()
        if word == "once":
            world.once(stay)
        elif word == "each":
            world.each(stay if world.rank == 1 else lambda: 1)
        elif word == "collective":
            stay() if world.rank == 1 else dist.all_reduce(torch.ones(1))
        elif word == "crash" and world.rank == 1:
            raise ValueError("boom")
        elif word == "crash":
            stay()
except RunError as error:
    print(f"entrypoint: {error}", file=sys.stderr)
    code = error.exit_code
except ValueError as error:
    code = 1
watch.close()
leave(code, 5)
"""


@contextmanager
def two_ranks(folder: Path, word: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Both, where their words have brought them."""
    os.mkfifo(folder / "pipe")
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder), str(TIMEOUT), word],
            env=scrubbed({**meet, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        until(lambda: all((folder / f"ready.{rank}").exists() for rank in range(2)))
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def left(rank: subprocess.Popen[str], within: float) -> tuple[int, str]:
    """The code and the last line of a rank that leaves in time."""
    _, err = rank.communicate(timeout=within)
    return rank.returncode, (err.strip().splitlines() or [""])[-1]


@pytest.mark.parametrize("told", [0, 1])
def test_a_notice_ends_all_ranks_while_one_works_and_the_others_wait(tmp_path: Path, told: int) -> None:
    with two_ranks(tmp_path, "once") as ranks:
        ranks[told].send_signal(signal.SIGTERM)
        ends = [left(ranks[rank], AT_ONCE + SLACK / 3) for rank in (told, 1 - told)]
    assert [code for code, _ in ends] == [75, 75]
    assert ends[0 if told == 0 else 1][1] == "entrypoint: told to stop; start the same command again to go on"


@pytest.mark.parametrize(
    ("word", "victim", "how", "why"),
    [
        ("once", 0, signal.SIGSTOP, "the store of rank 0 has not answered for 9 s"),
        ("once", 0, signal.SIGKILL, "another rank is lost"),
        ("each", 1, signal.SIGKILL, "nothing was heard of rank 1 for 9 s"),
        ("collective", 1, signal.SIGSTOP, "nothing was heard of rank 1 for 9 s"),
        ("collective", 1, signal.SIGKILL, "another rank is lost"),
    ],
)
def test_a_lost_rank_is_not_waited_for_beyond_the_time_out(
    tmp_path: Path, word: str, victim: int, how: signal.Signals, why: str
) -> None:
    with two_ranks(tmp_path, word) as ranks:
        ranks[victim].send_signal(how)
        code, line = left(ranks[1 - victim], TIMEOUT + SLACK)
    assert code == 76, line
    assert why in line


def test_a_rank_that_works_for_long_is_waited_for(tmp_path: Path) -> None:
    """Longer than the time-out that would end it if it were lost."""
    with two_ranks(tmp_path, "once") as ranks:
        with pytest.raises(subprocess.TimeoutExpired):
            ranks[1].wait(TIMEOUT * 1.5)
        (tmp_path / "pipe").write_text("made")
        assert [left(rank, SLACK * 2) for rank in ranks] == [(0, ""), (0, "")]


def test_the_others_learn_of_a_crash_and_need_not_wait_for_the_time_out(tmp_path: Path) -> None:
    with two_ranks(tmp_path, "crash") as ranks:
        assert left(ranks[1], SLACK)[0] == 1
        assert left(ranks[0], SLACK) == (76, "entrypoint: rank 1 crashed: ValueError: boom; leaving")
