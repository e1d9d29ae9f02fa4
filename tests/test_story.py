"""The story of a run: how a start ended, what counts as a crash in a row, and what restarts have cost, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from entrypoint.attempts import crashes_in_a_row
from entrypoint.errors import RunError
from entrypoint.launch.restarts import Restarts
from entrypoint.story import STORY, Story

Line = dict[str, Any]


def start(launch: str, at: float = 0, resume: int = 0, **more: Any) -> Line:
    return {"event": "start", "launch": launch, "time": at, "resume_step": resume, "attempt": 1, **more}


def end(launch: str, code: int, **more: Any) -> Line:
    return {"event": "end", "launch": launch, "code": code, **more}


def launch(name: str, **more: Any) -> Line:
    return {"event": "launch", "launch": name, **more}


def told(folder: Path, *lines: Line) -> Story:
    """A ledger of these lines."""
    text = "".join(json.dumps({"run": "this", "time": 0, "launch": "", **line}) + "\n" for line in lines)
    (folder / STORY).write_text(text)
    return Story(folder, "this")


def test_how_a_start_ended(tmp_path: Path) -> None:
    story = told(
        tmp_path,
        end("a", 1, node=0, error="ImportError"),  # before it had looked at the checkpoints
        start("b"),
        end("b", 76, node=0),
        end("b1", 137, node=1, error="rank 1 was killed by SIGKILL"),  # another node's launcher
        start("c"),
        {"event": "notice", "launch": "c", "step": 3},  # killed while it saved
        start("d"),
        end("d", 75),
        end("d", 75, node=0),
        end("e", 1, node=0, told=True),  # a crash that a notice made
        start("e2"),
        end("e3", 1, node=1, error="a bug"),  # at which the scheduler ends the other pods
        end("e2", 76, node=0, told=True),
        start("f"),
        end("f", 76, node=0),
        start("g"),  # cut off
        start("h"),
        end("h", 64),
        start("x") | {"run": "another"},
    )
    with (tmp_path / STORY).open("a") as file:
        file.write('{"event": "start", "ru')
    hows = ["crash", "crash", "stopped", "stopped", "stopped", "crash", "lost", "lost", "refused"]
    assert [attempt.how for attempt in story.attempts()] == hows
    story.append("end", code=0)  # a torn line harms neither the one before nor the one after
    assert [attempt.how for attempt in story.attempts()][-1] == "done"


@pytest.mark.parametrize(("silent", "how"), [(0, "lost"), (1, "lost"), (2, "lost"), (None, "crash")])
def test_ranks_that_nccl_has_aborted_have_lost_a_machine_where_a_node_left_no_word(
    tmp_path: Path, silent: int | None, how: str
) -> None:
    """Where every node has written an end, no machine is lost: they abort by themselves, which is a crash."""
    killed = {"error": "rank 3 was killed by SIGABRT"}
    ends = [end(f"a{node}", 134, node=node, **killed) for node in range(3) if node != silent]
    assert told(tmp_path, launch("a0", nodes=3), start("a0"), *ends).attempts()[0].how == how


def test_an_abort_beside_a_silent_node_hides_no_other_crash(tmp_path: Path) -> None:
    launched = launch("a", nodes=3)
    ends = end("a", 134, node=0), end("b", 1, node=1, error="a bug")
    assert told(tmp_path, launched, *ends).attempts()[0].how == "crash"
    assert told(tmp_path, launched | {"nodes": 1}, end("a", 134, node=0)).attempts()[0].how == "crash"


def test_whether_the_start_before_this_one_broke_off(tmp_path: Path) -> None:
    """A crash, or no word at all, which may have been a kill for want of memory; a notice is neither."""
    for ends, broke_off in (([], True), ([end("a", 1, node=0)], True), ([end("a", 75)], False)):
        assert told(tmp_path, start("a"), *ends, start("b")).broke_off() == broke_off
    assert not told(tmp_path, start("a")).broke_off()


def test_a_container_killed_before_it_has_looked_at_the_checkpoints_is_lost(tmp_path: Path) -> None:
    """Nine of them are a refusal; a run that is told so, or finds its output complete, leaves an end."""
    launched = [launch(name) for name in "abcdefghi"]
    assert [attempt.how for attempt in told(tmp_path, *launched).attempts()] == ["lost"] * 9
    with pytest.raises(RunError, match="9 starts in a row crashed"):
        Restarts(told(tmp_path, *launched), 3, None).pause()
    assert Restarts(told(tmp_path, *launched, end("i", 0, node=0)), 3, None).pause() == (0.0, "")
    assert Restarts(told(tmp_path, *launched, end("i", 75, node=0)), 3, None).pause() == (0.0, "")


def test_a_second_run_on_the_folder_takes_no_line_of_the_first(tmp_path: Path) -> None:
    first, second = told(
        tmp_path,
        launch("a"),
        start("a"),
        launch("b"),
        {"event": "saved", "launch": "a", "step": 7},
        end("b", 64, node=0),
        end("a", 1, node=0, error="a bug"),
    ).attempts()
    assert (first.how, first.saved, first.error) == ("crash", 7, "a bug")
    assert (second.how, second.saved) == ("refused", 0)


def test_a_second_run_that_never_had_the_folder_leaves_the_first_ones_crashes_counted(tmp_path: Path) -> None:
    """Its 64 is no human's word on them: the next start of the run is the third crash's refusal."""
    locked = launch("r"), {"event": "locked", "launch": "r"}, end("r", 64, node=0)
    story = told(tmp_path, *crash("a"), *crash("b"), start("c"), *locked, end("c", 1, node=0, error="error of c"))
    assert [attempt.how for attempt in story.attempts()] == ["crash", "crash", "crash", "locked"]
    with pytest.raises(RunError, match=r"3 starts in a row crashed.*the first: error of a;"):
        Restarts(story, 3, None).pause()


def crash(name: str) -> tuple[Line, Line]:
    return start(name), end(name, 1, node=0, error=f"error of {name}")


def test_crashes_in_a_row(tmp_path: Path) -> None:
    """A notice between them changes nothing, a newer checkpoint and a refusal end the row, an older one does not."""
    stop = start("s"), end("s", 75)

    def row(*lines: Line) -> list[str]:
        return [attempt.error for attempt in crashes_in_a_row(told(tmp_path, *lines).attempts())]

    def saved(step: int) -> Line:
        return {"event": "saved", "step": step}

    assert row(*crash("a"), *stop, *crash("b")) == ["error of a", "error of b"]
    assert row(*crash("a"), start("b"), saved(7), end("b", 1, error="later")) == ["later"]
    again = start("b"), saved(7), end("b", 1, error="b"), start("c"), saved(7), end("c", 1, error="c")
    assert row(*crash("a"), *again) == ["b", "c"]
    assert row(*crash("a"), *crash("b"), end("r", 64, node=0), *crash("c")) == ["error of c"]


def test_a_node_that_crashes_before_node_0_is_there_crashes_once_and_in_that_start(tmp_path: Path) -> None:
    """Its end comes before the start's `launch`: neither a start of its own nor known to the decision on that start."""

    def broken(start: int, *nodes: int) -> list[Line]:
        return [end(f"{start}-{node}", 1, node=node, error=f"error of {start}-{node}") for node in nodes]

    first, second = (launch(f"{start}-0", nodes=3) for start in (1, 2))
    for lines in (
        [*broken(1, 2), first, *broken(1, 1, 0), *broken(2, 2), second],
        [first, *broken(1, 2, 0, 1), *broken(2, 2, 1), second],
    ):
        story = told(tmp_path, *lines)
        assert [len(attempt.ends) for attempt in story.attempts()] == [3, len(lines) - 5]
        story.launch = "2-0"
        assert [attempt.error for attempt in story.earlier()] == ["error of 1-2"]
        assert Restarts(story, 2, None).pause() == (2.0, "error of 1-2")
    story = told(tmp_path, first, *broken(1, 2, 0), *broken(2, 2), *broken(3, 2), {**first, "launch": "4-0"})
    story.launch = "4-0"  # node 0 of the second start was never there
    assert [attempt.error for attempt in story.earlier()] == ["error of 1-2", "error of 2-2"]


def test_restarts_that_are_counted_tell_the_starts_apart(tmp_path: Path) -> None:
    """Node 1 left no line in the first, which was stopped: its crash is the second's, whose node 0 is yet to come."""
    stopped = launch("a", restart_count=0), start("a"), end("a", 75, node=0, restart_count=0)
    early = end("b", 1, node=1, error="a bug", restart_count=1)
    told_to_stop = end("c", 75, node=0, told=True, restart_count=1)
    story = told(tmp_path, *stopped, early, launch("c", restart_count=1), told_to_stop)
    assert [(attempt.how, attempt.error) for attempt in story.attempts()][1:] == [("crash", "a bug")]
    assert Restarts(story, 3, 2).pause() == (4.0, "a bug")
    story = told(tmp_path, *stopped, early, launch("d", restart_count=2))
    story.launch = "d"  # the second's node 0 was never there
    assert [attempt.how for attempt in story.earlier()] == ["stopped", "crash"]


def test_a_machine_that_was_taken_for_dead_ends_in_its_own_start(tmp_path: Path) -> None:
    """Its container goes on for a while, and writes when the next start is under way."""
    late = end("a2", 76, node=2, restart_count=3)
    crashed = end("b1", 1, node=1, error="a bug", restart_count=4), end("b", 76, node=0, restart_count=4)
    first, second = launch("a", restart_count=3), launch("b", restart_count=4)
    story = told(tmp_path, first, start("a"), second, start("b"), late, *crashed)
    assert [(attempt.how, len(attempt.ends)) for attempt in story.attempts()] == [("lost", 1), ("crash", 2)]


def test_another_nodes_crash_is_of_its_own_run_though_a_second_one_has_come(tmp_path: Path) -> None:
    second = launch("s", restart_count=0), {"event": "locked", "launch": "s"}, end("s", 64, node=0, restart_count=0)
    crashed = end("a1", 1, node=1, error="a bug", restart_count=3)
    story = told(tmp_path, launch("a", restart_count=3), start("a"), *second, crashed)
    assert [attempt.how for attempt in story.attempts()] == ["crash", "locked"]


def test_lost_machines_are_a_third_of_a_crash(tmp_path: Path) -> None:
    lost = [start(str(number)) for number in range(9)]
    assert Restarts(told(tmp_path, *lost[:8]), 3, None).pause() == (60, "the start was cut off without a word")
    with pytest.raises(RunError, match="9 starts in a row crashed"):
        Restarts(told(tmp_path, *lost), 3, None).pause()
    with pytest.raises(RunError, match="the first: error of a;"):
        Restarts(told(tmp_path, *crash("a"), *lost[:3], *crash("b")), 3, None).pause()
    assert Restarts(told(tmp_path, *lost[:2]), 3, 5).pause()[0] == 32  # the environment's count
    assert Restarts(told(tmp_path, *lost[:2], start("s"), end("s", 75)), 3, 5).pause() == (0.0, "")


def test_what_restarts_have_cost(tmp_path: Path) -> None:
    """Killed at step 9 at 50 s, resumed at 7, there again at 110 s; then told to stop at step 12, and nothing lost."""
    story = told(
        tmp_path,
        start("a", 10),
        {"event": "ready", "time": 20, "step": 0},
        {"event": "saved", "step": 7, "bytes": 100, "stall": 0.5, "seconds": 2.0},
        end("a", 137, node=0, error="rank 0 was killed by SIGKILL"),
        start("b", 70, resume=7, reached=9, reached_at=50),
        {"event": "ready", "time": 100, "step": 7},
        {"event": "caught_up", "time": 110, "step": 9},
        {"event": "notice", "step": 12},
        {"event": "saved", "step": 12, "bytes": 100, "stall": 0.25, "seconds": 3.0},
        end("b", 75),
        start("c", 200, resume=12, reached=12, reached_at=150),
        {"event": "ready", "time": 230, "step": 12},
    )
    said = story.summary()
    restarts = said.pop("restarts")
    assert said == {
        "starts": 3,
        "interruptions": 1,
        "crashes": 1,
        "lost": 0,
        "resumes": 2,
        "steps_repeated": 2,
        "seconds_lost": {"total": 140.0, "down": 70.0, "starting": 60.0, "repeating": 10.0},
        "checkpoints": {"count": 2, "bytes": 200, "seconds": 5.0, "stall": 0.75},
    }
    assert restarts == [
        {
            "how": "crash",
            "reached": 9,
            "resumed_at": 7,
            "steps_repeated": 2,
            "seconds_lost": {"down": 20.0, "starting": 30.0, "repeating": 10.0},
        },
        {
            "how": "stopped",
            "reached": 12,
            "resumed_at": 12,
            "steps_repeated": 0,
            "seconds_lost": {"down": 50.0, "starting": 30.0, "repeating": 0.0},
        },
    ]


def test_a_start_notes_what_the_one_before_it_reached(tmp_path: Path) -> None:
    first = Story(tmp_path, "this", "a")
    first.start(resume_step=0, world_size=2, restart_count=None)
    first.ready(0)
    for step in range(1, 10):
        first.reach(step)
    again = Story(tmp_path, "this", "b")
    again.start(resume_step=7, world_size=2, restart_count=4)
    again.ready(7)
    assert again.metrics()["story/steps_repeated"] == 2
    again.reach(8)
    again.reach(9)
    lines = [json.loads(line) for line in (tmp_path / STORY).read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "ready", "start", "ready", "caught_up"]
    assert {name: lines[2][name] for name in ("attempt", "reached", "resume_step", "restart_count")} == {
        "attempt": 2,
        "reached": 9,
        "resume_step": 7,
        "restart_count": 4,
    }


def test_a_ledger_that_cannot_be_written_costs_the_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    story = Story(tmp_path / "file", "this")
    story.append("ready", step=0)
    story.reach(1)
    assert capsys.readouterr().err.count("not written") == 1
