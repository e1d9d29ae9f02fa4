"""A notice at any moment: the run leaves with 75 in time, keeps what it has, and ends as if nothing had been."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e import traces
from tests.e2e.runs import TINY_RUN, TWO_RANKS, Ended, Start, maths, wait_until
from tests.servers.server import free_port

pytestmark = pytest.mark.slow

STEPS = 12
AT_ONCE = 5.0  # seconds from a notice to the end, where no step has to be finished
SLACK = 5.0  # on a busy machine
LOST = 30  # train.collective_timeout, seconds


@dataclass(frozen=True)
class Scene:
    """The run of this module: an evaluation after each step, and forward passes of a response each."""

    folder: Path
    words: tuple[str, ...]

    def start(self, name: str, *more: str) -> Start:
        return Start(self.folder / name, (*self.words, *more), TWO_RANKS)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Scene:
    folder = tmp_path_factory.mktemp("notice")
    lake = traces.write_hive(folder / "lake", traces.learnable())
    words = (
        "method=dpo",
        f"data.path={lake}",
        f"model.path={tiny}",
        f"train.max_steps={STEPS}",
        "checkpoint.save_every=5",
        "train.eval_steps=1",
        *TINY_RUN,
        "train.micro_batch_tokens=1",
        f"train.collective_timeout={LOST}",
    )
    return Scene(folder, words)


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The rank processes of a launcher, by their ranks."""
    found = {}
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.Error, KeyError):  # between fork and exec
            found[int(child.environ()["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def story(start: Start) -> list[dict[str, Any]]:
    path = start.folder / "checkpoints" / "story.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(start: Start, name: str) -> list[dict[str, Any]]:
    return [line for line in story(start) if line["event"] == name]


Moment = Callable[[Start, "subprocess.Popen[str]"], None]


def starting(start: Start, process: subprocess.Popen[str]) -> None:
    """As soon as the launcher catches SIGTERM."""

    def catches() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    wait_until(catches)


def importing(start: Start, process: subprocess.Popen[str]) -> None:
    wait_until(lambda: len(ranks(process)) == 2)


def preparing(start: Start, process: subprocess.Popen[str]) -> None:
    wait_until(lambda: (start.folder / "checkpoints" / "lock").exists())


def in_the_reference_pass(start: Start, process: subprocess.Popen[str]) -> None:
    """The model is loaded between this start's first event and the pass."""
    begun = len(events(start, "start"))
    wait_until(lambda: len(events(start, "start")) > begun)


def after(step: int) -> Moment:
    """In a later step or its evaluation, which takes longer."""
    return lambda start, process: start.wait_for_step(process, step)


def interrupted(start: Start, moment: Moment, tell: Callable[[subprocess.Popen[str]], None]) -> tuple[Ended, float]:
    """The end of a run that is told to stop at a moment, and the seconds until then."""
    with start.process() as process:
        moment(start, process)
        told = time.monotonic()
        tell(process)
        ended = start.ended(process)
    return ended, time.monotonic() - told


def tell_the_launcher(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)


def tell_one_rank(process: subprocess.Popen[str]) -> None:
    ranks(process)[1].send_signal(signal.SIGTERM)


def tell_twice(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)


def test_a_run_told_to_stop_again_and_again_ends_as_if_it_had_not_been(scene: Scene) -> None:
    straight = scene.start("straight").run()
    assert straight.code == 0, straight.err
    assert straight.record["story"]["starts"] == 1
    assert "a notice to stop costs no more than the step under way" in straight.out

    start = scene.start("told")
    for moment, tell in (
        (starting, tell_the_launcher),
        (importing, tell_the_launcher),
        (preparing, tell_one_rank),
        (in_the_reference_pass, tell_the_launcher),
        (after(2), tell_one_rank),
        (after(7), tell_twice),
    ):
        ended, seconds = interrupted(start, moment, tell)
        assert ended.code == 75, f"{moment}: {ended.err}"
        assert "Traceback" not in ended.err
        assert "start the same command again" in ended.last_word, f"{moment}: {ended.err}"
        assert seconds <= AT_ONCE + SLACK, moment

    again = start.run()
    assert again.code == 0, again.err
    assert maths(again) == maths(straight)  # each value, of each step and evaluation, to the last bit
    assert again.record["files"] == straight.record["files"]
    said = again.record["story"]
    assert (said["crashes"], said["lost"], said["steps_repeated"]) == (0, 0, 0)
    assert said["interruptions"] == said["starts"] - 1 >= 2
    assert said["resumes"] >= 2
    assert again.lines[-2]["metrics"]["story/interruptions"] == said["interruptions"]


def test_the_node_that_was_told_leaves_first_and_the_other_holds(scene: Scene) -> None:
    hold = 8
    meet = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "1"}
    places = [f"{key}={scene.folder / 'nodes' / name}" for key, name in PLACES]
    nodes = [
        Start(
            scene.folder / f"node-{node}",
            (*scene.words, *places, f"checkpoint.hold_seconds={hold}", "train.max_steps=400"),
            {**meet, "NODE_RANK": str(node)},
        )
        for node in range(2)
    ]
    shared = Start(scene.folder / "nodes", ())
    with nodes[0].process() as first, nodes[1].process() as second:
        wait_until(lambda: first.poll() is not None or bool(events(shared, "ready")))
        second.send_signal(signal.SIGTERM)
        told = nodes[1].ended(second)
        left = time.monotonic()
        assert first.poll() is None
        held = nodes[0].ended(first)
        seconds = time.monotonic() - left
    assert (told.code, held.code) == (75, 75), told.err + held.err
    assert "it holds, saved, for up to 8 s" in held.err
    assert "holds" not in told.err
    assert hold - 2 <= seconds <= hold + SLACK  # both ranks had saved before either left
    (notice,) = events(shared, "notice")
    assert (scene.folder / "nodes" / "checkpoints" / f"step-{notice['step']:08d}" / "manifest.json").exists()


PLACES = (("checkpoint.path", "checkpoints"), ("output.path", "out"))


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, 137), (signal.SIGSTOP, 76)])
def test_a_rank_that_is_lost_ends_the_run_in_a_bounded_time_as_a_crash(
    scene: Scene, how: signal.Signals, code: int
) -> None:
    start = scene.start(how.name, "train.max_steps=4000")
    with start.process() as process:
        start.wait_for_step(process, 2)
        other, victim = ranks(process)
        lost = time.monotonic()
        victim.send_signal(how)
        other.wait(LOST + 2 * SLACK)
        assert time.monotonic() - lost <= LOST + 2 * SLACK
        ended = start.ended(process)
    assert ended.code == code, ended.err
    *_, end = events(start, "end")  # the launcher's; rank 0 writes one before it where its watch ends it
    assert (end["code"], end["node"]) == (code, 0)
    assert ("rank 1 was killed by SIGKILL" in end["error"]) == (how == signal.SIGKILL)
