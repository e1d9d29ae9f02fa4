"""The lock: one run a folder; a dead one's is free at once on its machine, and after a while on another."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from entrypoint.checkpoint import lock as module
from entrypoint.checkpoint.lock import LOCK, Lock
from entrypoint.errors import CheckpointError, LockedError
from tests.e2e.runs import wait_until

FORK = multiprocessing.get_context("fork")  # a child that starts in no time


def taken(folder: Path, patience: float = 0.0, said: list[str] | None = None) -> Lock:
    lock = Lock(folder, patience=patience, warn=(said if said is not None else []).append)
    lock.acquire()
    return lock


def hold(folder: Path, word: Connection) -> None:
    """A run that takes the folder, says so and is there until it is killed or told to leave."""
    lock = taken(folder)
    word.send("taken")
    word.recv()
    lock.release()
    word.send("left")


@contextmanager
def another(folder: Path) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    word, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(folder, theirs), daemon=True)
    process.start()
    try:
        assert word.recv() == "taken"
        yield process, word
    finally:
        process.kill()
        process.join()


def test_the_second_run_says_who_holds_the_folder_and_leaves(tmp_path: Path) -> None:
    said: list[str] = []
    with another(tmp_path) as (process, _):
        for _ in range(3):
            with pytest.raises(LockedError) as refused:
                taken(tmp_path, 0.5, said)
            assert refused.value.exit_code == 64
            text = str(refused.value)
            assert text.startswith(f"{tmp_path}: is held by another run, process {process.pid} on ")
            assert f" on {socket.gethostname()} since 20" in text
            assert text.endswith("give this run a checkpoint.path of its own, or end that one")
        assert len(said) == 3
        assert said[0].endswith("waiting at most 0 s for it to leave")
        assert process.is_alive()


def test_a_killed_holder_is_no_obstacle(tmp_path: Path) -> None:
    with another(tmp_path) as (process, _):
        process.kill()
        process.join()
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
        said: list[str] = []
        taken(tmp_path, 0, said).release()
        assert said == []  # not even that it waits


def test_a_run_that_is_leaving_is_waited_for(tmp_path: Path) -> None:
    with another(tmp_path) as (_, word):
        word.send("leave")
        taken(tmp_path, patience=30).release()
        assert word.recv() == "left"


def elsewhere(folder: Path, beat: int) -> None:
    """The lease of a run on another machine, whose flock is not seen here."""
    lease = {"host": "node-7", "pid": 8, "since": "2026-01-01", "machine": "other", "holder": "h", "beat": beat}
    (folder / LOCK).write_text(json.dumps(lease))


def test_a_machine_that_died_is_no_obstacle_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEAD", 0.6)
    elsewhere(tmp_path, 41)
    os.utime(tmp_path / LOCK, (1e9, 1e9))  # whatever its file's time is
    began = time.monotonic()
    taken(tmp_path).release()
    assert time.monotonic() - began >= 0.6


def test_a_lease_that_can_t_be_read_may_be_somebodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEAD", 0.6)
    (tmp_path / LOCK).write_text('{"host": "no')
    began = time.monotonic()
    taken(tmp_path).release()
    assert time.monotonic() - began >= 0.6


def test_a_run_that_lives_on_another_machine_is_not_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where flock ends at the machine."""
    monkeypatch.setattr(module, "DEAD", 0.6)
    beat = itertools.count()
    elsewhere(tmp_path, next(beat))
    monkeypatch.setattr(time, "sleep", lambda seconds: elsewhere(tmp_path, next(beat)))
    with pytest.raises(CheckpointError, match="process 8 on node-7 since 2026-01-01"):
        taken(tmp_path, 0.2)
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "node-7"


def test_a_run_that_was_taken_for_dead_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.01)
    lock = taken(tmp_path)
    lock.check()
    wait_until(lambda: json.loads((tmp_path / LOCK).read_text())["beat"] > 1)
    looks: list[int] = []

    def look() -> None:
        """The beat's own; the folder is taken before one, since between a look and its beat nobody would notice."""
        looks.append(len(looks))
        if len(looks) == 1:
            elsewhere(tmp_path, 0)
        Lock.check(lock)

    monkeypatch.setattr(lock, "check", look)
    wait_until(lambda: len(looks) > 1)
    with pytest.raises(CheckpointError, match="was taken by another run, process 8 on node-7"):
        Lock.check(lock)
    lock.release()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "node-7"  # it is that one's now


def keep_flock(folder: Path, word: Connection) -> None:
    """A file server that still keeps the flock of a node which is gone."""
    with (folder / LOCK).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        word.send("kept")
        word.recv()


def test_a_lost_node_whose_flock_the_file_server_keeps_is_no_end_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEAD", 0.6)
    elsewhere(tmp_path, 41)
    word, theirs = FORK.Pipe()
    server = FORK.Process(target=keep_flock, args=(tmp_path, theirs), daemon=True)
    server.start()
    try:
        assert word.recv() == "kept"
        said: list[str] = []
        began = time.monotonic()
        lock = taken(tmp_path, 0.4, said)
        assert time.monotonic() - began >= 1.0  # the patience too: a holder that is there would have moved
        assert "process 8 on node-7 since 2026-01-01 has given no sign for " in said[1]
        lock.check()
        lock.release()
    finally:
        server.kill()
        server.join()


def test_without_flock_a_run_on_the_same_machine_is_known_by_its_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(module, "DEAD", 1.0)
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(fcntl, "flock", no_flock)
    first = taken(tmp_path)
    said: list[str] = []
    pause = threading.Event()

    def until_the_next_beat(seconds: float) -> None:
        """However long a disk or a core lets it wait: one that is late would be taken for dead."""
        before, until = (tmp_path / LOCK).read_bytes(), time.monotonic() + 60
        while (tmp_path / LOCK).read_bytes() == before and time.monotonic() < until:
            pause.wait(0.005)

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", until_the_next_beat)
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} on "):
            taken(tmp_path, 0.5, said)
    assert ["has no flock" in line for line in said] == [True, False]
    first.release()
    taken(tmp_path).release()


def test_a_file_is_not_closed_under_a_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write to whatever file gets the number next."""
    monkeypatch.setattr(module, "BEAT", 0.01)
    lock, beats, goes_on = taken(tmp_path), threading.Event(), threading.Event()

    def held(descriptor: int) -> None:
        beats.set()
        goes_on.wait(60)

    monkeypatch.setattr(os, "fsync", held)
    assert beats.wait(60)
    leaving = threading.Thread(target=lock.release)
    leaving.start()
    leaving.join(0.3)
    assert leaving.is_alive()
    goes_on.set()
    leaving.join(60)
    assert (tmp_path / LOCK).read_text() == ""
