"""Ranks that die, stand still, crash or are told to stop: the others leave in a bounded time, and say why."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from entrypoint.launch.topology import free_port
from tests.process import scrubbed

pytestmark = pytest.mark.slow

DEADLINE = 240.0  # seconds for what takes ten on a quiet machine
TIMEOUT = 10  # of the ranks' collectives, seconds
SLACK = 60.0  # seconds on a busy machine; what would not end by itself never does

RANKS = multiprocessing.get_context("forkserver")  # a process of its own each, that need not import torch
RANKS.set_forkserver_preload(["entrypoint.world", "tests.test_lost_ranks"])


def be_rank(rank: int, environ: dict[str, str], folder: Path, word: str) -> None:
    """Come to a place where it would stay for ever, unless the word says otherwise.

    It reads a pipe (as in a query or a slow read), or waits for a rank that does that.
    """
    os.environ.clear()
    os.environ.update(environ)
    os.dup2(os.open(folder / f"stderr.{rank}", os.O_WRONLY | os.O_CREAT), 2)
    import torch
    import torch.distributed as dist

    from entrypoint.errors import RunError
    from entrypoint.launch.verdict import leave
    from entrypoint.watch import Watch
    from entrypoint.world import joined

    watch = Watch()
    watch.listen()

    def stay() -> str:
        return (folder / "pipe").read_text()

    code = 0
    try:
        with joined(TIMEOUT, watch) as world:
            watch.patience = None if word == "collective" else watch.patience
            (folder / f"ready.{world.rank}").touch()
            if word == "once":
                world.once(stay)
            elif word == "each":
                world.each(stay if world.rank == 1 else lambda: "")
            elif word == "collective":
                stay() if world.rank == 1 else dist.all_reduce(torch.ones(1))
            elif word == f"crash {world.rank}":
                raise ValueError("boom")
            else:
                stay()
    except RunError as error:
        print(f"entrypoint: {error}", file=sys.stderr)
        code = error.exit_code
    except ValueError:
        code = 1
    watch.close()
    leave(code, 5)


@contextmanager
def two_ranks(folder: Path, word: str) -> Iterator[list[BaseProcess]]:
    """Both, where their words have brought them."""
    os.mkfifo(folder / "pipe")
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks: list[BaseProcess] = []
    for rank in range(2):
        environ = scrubbed({**meet, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        ranks.append(RANKS.Process(target=be_rank, args=(rank, environ, folder, word), daemon=True))
        ranks[-1].start()
    try:
        until(lambda: all((folder / f"ready.{rank}").exists() for rank in range(2)))
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.join()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def send(process: BaseProcess, signum: int) -> None:
    assert process.pid is not None
    os.kill(process.pid, signum)


def left(folder: Path, ranks: list[BaseProcess], rank: int, within: float) -> tuple[int, str]:
    """The code and the last line of a rank that leaves in time."""
    ranks[rank].join(within)
    code = ranks[rank].exitcode
    assert code is not None, f"rank {rank} is there after {within:g} s"
    return code, ((folder / f"stderr.{rank}").read_text().strip().splitlines() or [""])[-1]


@pytest.mark.parametrize("told", [0, 1])
def test_a_notice_ends_all_ranks_while_one_works_and_the_others_wait(tmp_path: Path, told: int) -> None:
    with two_ranks(tmp_path, "once") as ranks:
        send(ranks[told], signal.SIGTERM)
        ends = [left(tmp_path, ranks, rank, SLACK) for rank in (told, 1 - told)]
    assert [code for code, _ in ends] == [75, 75]
    assert ends[0 if told == 0 else 1][1] == "entrypoint: told to stop; start the same command again to go on"


SILENT = "nothing was heard of rank {} for 9 s"
BROKEN = "another rank is lost"


@pytest.mark.parametrize(
    ("word", "victim", "how", "why"),
    [
        # Its last beat may be older than the store's last answer.
        ("once", 0, signal.SIGSTOP, ("the store of rank 0 has not answered for 9 s", SILENT.format(0))),
        ("once", 0, signal.SIGKILL, (BROKEN,)),
        ("each", 1, signal.SIGKILL, (SILENT.format(1),)),
        ("collective", 1, signal.SIGSTOP, (SILENT.format(1), BROKEN)),  # the collective's own time-out is a second more
        ("collective", 1, signal.SIGKILL, (BROKEN,)),
    ],
)
def test_a_lost_rank_is_not_waited_for_beyond_the_time_out(
    tmp_path: Path, word: str, victim: int, how: signal.Signals, why: tuple[str, ...]
) -> None:
    with two_ranks(tmp_path, word) as ranks:
        send(ranks[victim], how)
        code, line = left(tmp_path, ranks, 1 - victim, TIMEOUT + SLACK)
    assert code == 76, line
    assert any(text in line for text in why), line


def test_a_rank_that_works_for_long_is_waited_for(tmp_path: Path) -> None:
    """Longer than the time-out that would end it if it were lost."""
    with two_ranks(tmp_path, "once") as ranks:
        ranks[1].join(TIMEOUT * 1.5)
        assert all(process.is_alive() for process in ranks)
        (tmp_path / "pipe").write_text("made")
        assert [left(tmp_path, ranks, rank, SLACK) for rank in range(2)] == [(0, ""), (0, "")]


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_learn_of_a_crash_and_need_not_wait_for_the_time_out(tmp_path: Path, victim: int) -> None:
    """The one that crashes leaves as such: what it has announced itself is no news to it."""
    with two_ranks(tmp_path, f"crash {victim}") as ranks:
        assert left(tmp_path, ranks, victim, SLACK)[0] == 1
        assert left(tmp_path, ranks, 1 - victim, SLACK) == (
            *(76, f"entrypoint: rank {victim} crashed: ValueError: boom; leaving"),
        )
