"""The launcher, with toy ranks as real processes: verdicts, signals, output, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from entrypoint.errors import ConfigError
from entrypoint.launch.topology import cuda_devices, free_port, read_topology, visible_devices
from entrypoint.launch.verdict import Verdict, combine, report
from entrypoint.story import Story

DEADLINE = 60.0
ROOT = Path(__file__).parent.parent
DRIVER = (
    "import os, sys\nfrom pathlib import Path\nfrom entrypoint.launch.launcher import launch\n"
    "from entrypoint.errors import RunError\nfrom entrypoint.launch.restarts import Restarts\n"
    "from entrypoint.story import Story\n"
    "patience, *argv = sys.argv[1:]\n"
    "count = os.environ.get('RESTART_COUNT')\n"
    "restarts = Restarts(Story(Path(argv[0]), 'toy'), 3, int(count) if count else None)\n"
    "more = {name: float(os.environ.get(name, 60)) for name in ('grace', 'hold')}\n"
    "try: code = launch(argv, os.environ, module='tests.toy_rank', restarts=restarts, patience=float(patience), "
    "kill_after=0.3, **more)\n"
    "except RunError as error: print(error, file=sys.stderr); code = error.exit_code\n"
    "assert 'torch' not in sys.modules\nsys.exit(code)\n"
)
Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start the launcher as a process of its own; what is still there at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(
        *scripts: str,
        ranks: int | None = None,
        patience: float = 30.0,
        stdout: int | IO[str] = subprocess.PIPE,
        **environ: str,
    ) -> subprocess.Popen[str]:
        base = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")}
        size = {} if ranks is None else {"LOCAL_WORLD_SIZE": str(ranks)}
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(patience), str(tmp_path), *scripts],
            cwd=ROOT,
            env={**base, "CUDA_VISIBLE_DEVICES": "", **size, **environ},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=DEADLINE)
    return process.returncode, out, err


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until, f"{what} never came"
        time.sleep(0.01)


def files(folder: Path, *names: str) -> None:
    wait_for(lambda: all((folder / name).exists() for name in names), f"one of {names}")


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def wait_dead(pid: int) -> None:
    wait_for(lambda: not alive(pid), f"the end of process {pid}")


def wait_reaped(pid: int) -> None:
    """A zombie would still be listed."""
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), f"the end of process {pid}")


def pid_of(folder: Path, rank: int) -> int:
    return int(json.loads((folder / f"started.{rank}").read_text())["pid"])


def test_verdicts_combine_as_refusal_then_first_crash_then_stop_then_done() -> None:
    """64 beats all; the first crash beats later ones, and a lost rank, and 75 and 0; 75 beats 0."""

    def code(*codes: int) -> int:
        return combine(map(Verdict, codes)).code

    assert code(0, 0) == 0
    assert code(0, 75, 0) == 75
    assert code(75, 1, 0, 139) == 1
    assert code(139, 1) == 139
    assert code(76, 137) == 137
    assert code(0, 76, 75) == 76
    assert code(1, 75, 64) == 64
    left, lost, killed = Verdict(75, alone=True), Verdict(76), Verdict(137)
    assert combine([left, lost]).code == combine([lost, left]).code == 75
    assert combine([left, lost, killed]).code == 137


def test_a_node_holds_only_where_none_of_its_ranks_was_told() -> None:
    hold, told = Verdict(75, hold=True), Verdict(75)
    assert [combine(both).hold for both in ((hold, hold), (hold, told), (told, told), (hold, Verdict(0)))] == [
        *(True, False, False, True)
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("exit=0", "exit=0"), 0),
        (("exit=0", "exit=75"), 75),
        (("exit=75", "exit=75"), 75),
        (("exit=75", "exit=64"), 64),
        (("exit=0", "crash=3"), 3),
        (("exit=75", "crash=1"), 1),
        (("crash=1", "exit=64"), 64),
        (("die=SEGV", "exit=75"), 139),
        (("exit=0", "die=KILL"), 137),
        (("verdict=0,die=ABRT", "exit=0"), 0),
        (("verdict=75,die=ABRT", "exit=75"), 75),
        (("verdict=64,die=ABRT", "exit=0"), 64),
        (("verdict=0,crash=1", "exit=75"), 75),
    ],
)
def test_two_ranks_give_one_verdict(launch: Launch, words: tuple[str, str], expected: int) -> None:
    assert end(launch(f"0:{words[0]}", f"1:{words[1]}", ranks=2))[0] == expected


@pytest.mark.parametrize(("word", "expected"), [("exit=0", 0), ("crash=7", 7), ("exit=64", 64), ("die=ABRT", 134)])
def test_one_rank_is_the_default_and_a_rank_like_any_other(
    launch: Launch, tmp_path: Path, word: str, expected: int
) -> None:
    assert end(launch(f"0:{word}"))[0] == expected
    env = json.loads((tmp_path / "started.0").read_text())["env"]
    assert {
        key: env[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "NNODES")
    } == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "NODE_RANK": "0",
        "NNODES": "1",
    }
    assert env["MASTER_ADDR"] == "127.0.0.1"
    assert "OMP_NUM_THREADS" not in env


def test_the_first_crash_counts_when_its_siblings_crash_because_of_it(launch: Launch, tmp_path: Path) -> None:
    process = launch("0:wait=go,crash=1", "1:die=SEGV", ranks=2)
    files(tmp_path, "started.0", "started.1")
    wait_reaped(pid_of(tmp_path, 1))
    (tmp_path / "go").touch()
    assert end(process)[0] == 139


def test_eight_ranks_know_who_they_are(launch: Launch, tmp_path: Path) -> None:
    process = launch(
        "*:print=hello,exit=0", ranks=8, NNODES="3", NODE_RANK="2", MASTER_ADDR="node-0", MASTER_PORT="1234"
    )
    code, out, _ = end(process)
    assert code == 0
    assert sorted(out.splitlines()) == sorted(f"[rank {rank}] hello" for rank in range(16, 24))
    for rank in range(16, 24):
        env = json.loads((tmp_path / f"started.{rank}").read_text())["env"]
        assert env["LOCAL_RANK"] == str(rank - 16)
        assert (env["WORLD_SIZE"], env["MASTER_ADDR"], env["MASTER_PORT"]) == ("24", "node-0", "1234")
        assert int(env["OMP_NUM_THREADS"]) >= 1


def test_arguments_reach_the_ranks_as_they_are(launch: Launch, tmp_path: Path) -> None:
    odd = "2:a b 'c' \"d\" $HOME \n é"
    assert end(launch("0:exit=0", odd))[0] == 0
    assert json.loads((tmp_path / "started.0").read_text())["argv"][2] == odd


def test_a_rank_that_leaves_with_75_or_0_leaves_its_siblings_alone(launch: Launch, tmp_path: Path) -> None:
    """With no patience at all: rank 0 still works on after both others are gone, and ends by itself."""
    process = launch("0:wait=go,exit=75", "1:exit=75", "2:exit=0", ranks=3, patience=0.0)
    files(tmp_path, "started.0", "started.1", "started.2")
    for rank in (1, 2):
        wait_reaped(pid_of(tmp_path, rank))
    assert process.poll() is None
    (tmp_path / "go").touch()
    code, _, err = end(process)
    assert code == 75
    assert "to leave" not in err


@pytest.mark.parametrize(("word", "expected"), [("crash=9", 9), ("exit=64", 64), ("die=SEGV", 139)])
def test_after_a_crash_or_a_refusal_the_others_get_a_bounded_time(
    launch: Launch, tmp_path: Path, word: str, expected: int
) -> None:
    """Rank 1 hangs and heeds SIGTERM, rank 2 ignores it: both are gone, and neither changes the verdict."""
    process = launch(
        f"0:wait=go,{word}", "1:wait=never", "2:ignore=TERM,child,touch=go,wait=never", ranks=3, patience=0.2
    )
    code, _, err = end(process)
    assert code == expected
    announced = f"rank 0 ended with {expected}; the others get 0.2 s to leave" in err
    assert announced == (expected != 64)  # who refuses has said why: that line is the last where the others leave too
    assert "ranks 1, 2 are late: told to leave" in err
    assert not alive(int((tmp_path / "child.2").read_text()))


def test_a_rank_that_hangs_after_its_verdict_is_ended_and_its_verdict_counts(launch: Launch) -> None:
    assert end(launch("0:ignore=TERM,verdict=75,wait=never", "1:exit=0", ranks=2, patience=0.2))[0] == 75


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_stop_signal_reaches_every_rank_once(launch: Launch, tmp_path: Path, name: str) -> None:
    process = launch(f"*:catch,until={name},wait=go,exit=75", ranks=2)
    files(tmp_path, "ready.0", "ready.1")
    number = signal.Signals[f"SIG{name}"]
    process.send_signal(number)
    files(tmp_path, "signals.0", "signals.1")
    process.send_signal(number)
    process.send_signal(signal.SIGUSR1)  # comes after the second one: once it is there, the second one was dealt with
    wait_for(lambda: all("10" in (tmp_path / f"signals.{r}").read_text().split() for r in (0, 1)), "SIGUSR1")
    (tmp_path / "go").touch()
    assert end(process)[0] == 75
    for rank in (0, 1):
        assert (tmp_path / f"signals.{rank}").read_text().split().count(str(int(number))) == 1


def test_sigusr1_is_forwarded_and_the_run_goes_on(launch: Launch, tmp_path: Path) -> None:
    process = launch("*:catch,until=USR1,wait=go,exit=0", ranks=2)
    files(tmp_path, "ready.0", "ready.1")
    process.send_signal(signal.SIGUSR1)
    files(tmp_path, "signals.0", "signals.1")
    assert process.poll() is None
    (tmp_path / "go").touch()
    assert end(process)[0] == 0


def test_sigusr1_before_a_rank_can_catch_it_harms_nothing(launch: Launch, tmp_path: Path) -> None:
    process = launch("0:wait=go,exit=0")
    files(tmp_path, "started.0")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    (tmp_path / "go").touch()
    assert end(process)[0] == 0


def test_sigterm_before_a_rank_can_catch_it_is_a_stop_not_a_crash(launch: Launch, tmp_path: Path) -> None:
    process = launch("*:wait=never", ranks=2)
    files(tmp_path, "started.0", "started.1")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75


@pytest.mark.parametrize("word", ["alone", "crash=75"])
def test_a_notice_to_one_rank_that_leaves_alone_is_one_to_all(launch: Launch, tmp_path: Path, word: str) -> None:
    """Before the ranks have met the others can't know: they would wait for it until the time-out."""
    process = launch("0:catch,until=TERM,exit=75", f"1:wait=ready.0,{word}", ranks=2, patience=1000.0)
    assert end(process)[0] == 75


def test_ranks_that_do_not_leave_within_the_grace_are_killed(launch: Launch, tmp_path: Path) -> None:
    process = launch("0:catch,wait=never", "1:exit=75", ranks=2, grace="0.5")
    files(tmp_path, "ready.0", "started.1")
    wait_reaped(pid_of(tmp_path, 1))
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 75
    assert "ranks 0 had not left 0.5 s after the signal (checkpoint.grace_seconds): killed" in err


NODES = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1"}


def test_a_node_that_was_not_told_holds_and_then_leaves_by_itself(launch: Launch) -> None:
    """Node 1's ranks stop because node 0 was told."""
    begun = time.monotonic()
    told = launch("0:exit=75", **NODES, NODE_RANK="0", hold="3")
    held = launch("1:hold", **NODES, NODE_RANK="1", hold="3")
    code, _, err = end(told)
    assert (code, "holds" in err) == (75, False)
    code, _, err = end(held)
    assert code == 75
    assert "the reason to stop is another node's: this node holds, for up to 3 s" in err
    assert time.monotonic() - begun >= 3


def test_a_node_that_holds_leaves_as_soon_as_it_is_told(launch: Launch, tmp_path: Path) -> None:
    process = launch("1:hold", **NODES, NODE_RANK="1", hold="600")
    assert process.stderr is not None
    while "holds" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75


BOTH = "other nodes may have ended in the same instant: this node holds"
LOST = "a rank of another node crashed or is lost: this node holds"


@pytest.mark.parametrize(
    ("word", "code", "holds"),
    [
        ("fail=boom", 1, ["", f"{BOTH}, for up to 1 s"]),  # node i of n: i/n of the time
        ("die=SEGV", 139, ["", f"{BOTH}, for up to 1 s"]),
        ("exit=75", 75, ["", f"{BOTH}, for up to 1 s"]),  # not told: a storage that is away for all
        ("exit=76", 76, [f"{LOST}, for up to 0.5 s", f"{LOST}, for up to 1.5 s"]),  # between those
        ("exit=64", 64, ["", ""]),  # nobody starts it again
        ("exit=0", 0, ["", ""]),
    ],
)
def test_nodes_that_break_off_in_one_instant_end_one_after_another(
    launch: Launch, word: str, code: int, holds: list[str]
) -> None:
    nodes = [launch(f"*:{word}", **NODES, NODE_RANK=str(node), hold="2") for node in range(2)]
    for node, hold in zip(nodes, holds, strict=True):
        ended, _, err = end(node)
        assert ended == code
        assert [line for line in err.splitlines() if "holds" in line] == [f"launcher: {hold}"] * bool(hold)


def test_a_node_whose_ranks_crashed_ends_its_hold_when_it_is_told(launch: Launch, tmp_path: Path) -> None:
    """As a scheduler tells it, once the first node has ended: the crash stands, and was no end by a notice."""
    process = launch("1:fail=boom", **NODES, NODE_RANK="1", hold="600")
    assert process.stderr is not None
    while BOTH not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 1
    (attempt,) = Story(tmp_path, "toy").attempts()
    assert (attempt.how, attempt.error) == ("crash", "boom")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("told", "exit=76"), 76),  # the rank alone was told, not the launcher
        (("told", "hold"), 75),
        (("alone", "alone"), 75),
        (("crash=75", "crash=75"), 75),  # told before its imports
        (("die=KILL", "exit=76"), 137),
        (("die=SEGV", "wait=never"), 139),
    ],
)
def test_a_node_with_a_reason_of_its_own_does_not_hold(launch: Launch, words: tuple[str, str], code: int) -> None:
    """A notice to one of its ranks, or a kill of one, is not what all nodes meet in one instant."""
    process = launch(f"2:{words[0]}", f"3:{words[1]}", **NODES, NODE_RANK="1", ranks=2, patience=0.2, hold="600")
    ended, _, err = end(process)
    assert (ended, "holds" in err) == (code, False)


def test_a_lone_node_does_not_hold(launch: Launch) -> None:
    for word, code in (("hold", 75), ("exit=76", 76), ("crash=1", 1)):
        assert end(launch(f"0:{word}", hold="600"))[0] == code


def test_an_abort_is_a_lost_machine_until_every_node_has_written_an_end(launch: Launch, tmp_path: Path) -> None:
    for node, how in enumerate(("lost", "crash")):
        assert end(launch("*:die=ABRT", **NODES, NODE_RANK=str(node), hold="0"))[0] == 134
        assert [attempt.how for attempt in Story(tmp_path, "toy").attempts()] == [how]


def test_a_node_of_which_nccl_aborted_one_rank_holds_since_the_others_may_meet_it_too(launch: Launch) -> None:
    node = launch("2:die=ABRT", "3:exit=76", **NODES, NODE_RANK="1", ranks=2, hold="1")
    code, _, err = end(node)
    assert (code, f"{BOTH}, for up to 0.5 s" in err) == (134, True)


def test_three_crashes_in_a_row_end_with_64_and_the_first_error(launch: Launch, tmp_path: Path) -> None:
    """A pause of 2 s and one of 4 s between them; then a human has the word: the next start is a new beginning."""
    words = ("fail=ValueError: boom", "die=KILL", "crash=3")
    errs = []
    for word, code in zip(words, (1, 137, 3), strict=True):
        ended, _, err = end(launch(f"0:{word}"))
        assert ended == code
        errs.append(err)
    assert "starting again" not in errs[0]
    assert "launcher: the last start crashed (ValueError: boom); starting again in 2 s" in errs[1]
    assert "launcher: the last start crashed (rank 0 was killed by SIGKILL); starting again in 4 s" in errs[2]
    (tmp_path / "started.0").unlink()
    code, _, err = end(launch("0:exit=0"))
    assert (code, err.count("\n")) == (64, 1)
    assert err.startswith(f"{tmp_path}: 3 starts in a row crashed without a newer checkpoint ")
    assert "(checkpoint.max_crashes=3); the first: ValueError: boom; mend that and start again" in err
    assert not (tmp_path / "started.0").exists()
    assert end(launch("0:exit=0"))[0] == 0


def test_the_pause_grows_with_the_restart_count_and_a_notice_ends_it(launch: Launch, tmp_path: Path) -> None:
    assert end(launch("0:crash=1"))[0] == 1
    (tmp_path / "started.0").unlink()
    process = launch("0:exit=0", RESTART_COUNT="9")
    assert process.stderr is not None
    assert "starting again in 60 s" in process.stderr.readline()
    process.send_signal(signal.SIGUSR1)  # says nothing about stopping
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75
    assert not (tmp_path / "started.0").exists()
    crashed, stopped = Story(tmp_path, "toy").attempts()
    assert (crashed.how, stopped.how) == ("crash", "stopped")
    assert [line["restart_count"] for line in (*stopped.events, *stopped.ends)] == [9, 9]  # it tells starts apart


def test_a_crash_after_a_notice_is_none(launch: Launch, tmp_path: Path) -> None:
    process = launch("0:catch,until=TERM,crash=1")
    files(tmp_path, "ready.0")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 1
    assert "starting again" not in end(launch("0:exit=0"))[2]


def test_a_crash_before_the_notice_is_one(launch: Launch, tmp_path: Path) -> None:
    """A scheduler tells a node to stop because another has ended, before its last rank has."""
    process = launch("0:fail=boom", "1:catch,until=TERM,exit=75", ranks=2)
    files(tmp_path, "started.0", "ready.1")
    wait_reaped(pid_of(tmp_path, 0))
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 1
    assert "the last start crashed (boom)" in end(launch("0:exit=0"))[2]


def test_ranks_die_with_a_launcher_that_is_killed(launch: Launch, tmp_path: Path) -> None:
    process = launch("*:ignore=TERM,wait=never", ranks=3)
    files(tmp_path, "ready.0", "ready.1", "ready.2")
    pids = [pid_of(tmp_path, rank) for rank in range(3)]
    process.kill()
    for pid in pids:
        wait_dead(pid)


def test_orphans_are_reaped_and_children_of_ranks_do_not_stay(launch: Launch, tmp_path: Path) -> None:
    process = launch("0:orphan,wait=go,child,exit=0")
    wait_for(lambda: (tmp_path / "orphan").exists() and (tmp_path / "orphan").read_text().endswith(" "), "the orphan")
    orphan = int((tmp_path / "orphan").read_text())
    # Its parent may be about to leave.
    wait_for(lambda: parent(orphan) == process.pid, "the orphan's adoption")
    (tmp_path / "orphan-may-leave").touch()
    wait_reaped(orphan)
    (tmp_path / "go").touch()
    assert end(process)[0] == 0
    child = int((tmp_path / "child.0").read_text())
    wait_dead(child)


def test_rank_0_writes_as_it_is_and_the_others_behind_their_number(launch: Launch, tmp_path: Path) -> None:
    """To a file: of a full pipe that nobody reads for two seconds the launcher drops the rest."""
    words = "0:print=zero,complain=alas,exit=0", "1:print=one,complain=oh,flood=300,exit=0"
    with (tmp_path / "stdout").open("w") as stdout:
        code, _, err = end(launch(*words, ranks=2, stdout=stdout))
    assert code == 0
    assert err.splitlines() == ["alas", "[rank 1] oh"] or err.splitlines() == ["[rank 1] oh", "alas"]
    lines = (tmp_path / "stdout").read_text().splitlines()
    assert "zero" in lines
    assert [line for line in lines if line != "zero"] == [  # no line is cut by another rank's
        "[rank 1] one",
        *(f"[rank 1] {number:06d}" + "x" * 500 for number in range(300)),
    ]


def test_rank_0_keeps_the_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "30", str(tmp_path), "*:exit=0"],
        cwd=ROOT,
        env={**os.environ, "LOCAL_WORLD_SIZE": "2"},
        stdout=theirs,
        stderr=theirs,
    )
    assert process.wait(timeout=DEADLINE) == 0
    os.close(theirs)
    os.close(ours)
    assert json.loads((tmp_path / "started.0").read_text())["tty"]
    assert not json.loads((tmp_path / "started.1").read_text())["tty"]


def test_a_reader_that_went_away_harms_no_rank(launch: Launch, tmp_path: Path) -> None:
    process = launch("0:exit=0", "1:wait=go,flood=2000,touch=written,exit=0", ranks=2)
    files(tmp_path, "started.1")
    assert process.stdout is not None
    process.stdout.close()
    (tmp_path / "go").touch()
    assert process.wait(timeout=DEADLINE) == 0
    assert (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE='two' must be an integer of at least 1"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 must be an integer of at least 1"),
        ({"NNODES": "-1"}, "NNODES=-1"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "node-0"}, "NNODES=2 needs NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "node-0"}, "NODE_RANK=2 must be below NNODES=2"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 must be below NNODES=1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 must be an integer from 1 to 65535"),
        ({"MASTER_PORT": "29500.0"}, "MASTER_PORT='29500.0'"),
        ({"NNODES": "--1"}, "NNODES='--1'"),
    ],
)
def test_a_bad_environment_is_refused_in_one_line(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_topology({"CUDA_VISIBLE_DEVICES": "", **environ})
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_refused_environment_exits_64(launch: Launch) -> None:
    code, out, err = end(launch("*:exit=0", NNODES="2"))
    assert (code, out, err.count("\n")) == (64, "", 1)


def test_several_nodes_meet_at_torchs_port_and_one_node_at_a_free_one() -> None:
    several = read_topology({"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "node-0", "LOCAL_WORLD_SIZE": "8"})
    assert (several.world_size, several.port) == (24, 29500)
    assert several.environ(3)["RANK"] == "11"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


def test_cuda_visible_devices_counts_as_cuda_does() -> None:
    """CUDA stops at the first invalid entry; a machine without a driver has none whatever the variable says."""
    assert [visible_devices(text) for text in ("0", "0,1", "", "-1", "0,-1,2", "GPU-1,MIG-2", " 3 , 4 ")] == [
        *(1, 2, 0, 0, 1, 2, 2)
    ]
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": ""}) == 0


def test_reporting_a_verdict_outside_a_launcher_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    try:
        report(Verdict(1))
        monkeypatch.setenv("ENTRYPOINT_VERDICT", str(writer))
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        report(Verdict(1))
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    finally:
        os.close(reader)
        os.close(writer)


def test_after_a_ranks_last_word_the_launcher_has_none_for_it(launch: Launch) -> None:
    """It has said how the run is to be gone on with, and stays the log's last; its teardown is no longer waited for."""
    code, _, err = end(launch("0:verdict=75,touch=reported,wait=never", "1:wait=reported,alone", ranks=2))
    assert (code, err) == (75, "")
