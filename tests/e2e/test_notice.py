"""A notice at any moment: the run leaves with 75 in time, keeps what it has, and ends as if nothing had been."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from entrypoint.launch.topology import free_port
from tests.e2e import traces
from tests.e2e.runs import TINY_RUN, maths
from tests.faults.hits import catches
from tests.faults.life import Life, Start
from tests.faults.zygote import Zygote

pytestmark = pytest.mark.slow

STEPS = 12
SLACK = 60.0  # seconds on a busy machine: from a notice to the end, half of what the launcher would kill after
LOST = 20  # train.collective_timeout, seconds


@dataclass(frozen=True)
class Scene:
    """The run of this module: an evaluation after each step, and forward passes of a response each."""

    folder: Path
    zygote: Zygote
    words: tuple[str, ...]

    def life(self, name: str, *more: str, ranks: int = 2) -> Life:
        folder = self.folder / name
        folder.mkdir()
        places = f"checkpoint.path={folder / 'checkpoints'}", f"output.path={folder / 'out'}"
        words = {word.partition("=")[0]: word for word in (*self.words, *places, *more)}
        return Life(self.zygote, folder, ranks, fsdp=False, words=words)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Scene:
    folder = tmp_path_factory.mktemp("notice")
    lake = traces.write_hive(folder / "lake", traces.learnable())
    words = (
        "method=dpo",
        f"data.path={lake}",
        f"model.path={zygote.model}",
        f"train.max_steps={STEPS}",
        "checkpoint.save_every=5",
        "train.eval_steps=1",
        *TINY_RUN,
        "train.micro_batch_tokens=1",
        f"train.collective_timeout={LOST}",
    )
    return Scene(folder, zygote, words)


@pytest.fixture(autouse=True)
def nothing_stays(zygote: Zygote) -> Iterator[None]:
    """A run that a failed test leaves behind would train on."""
    yield
    zygote.kill_all()


def events(life: Life, name: str) -> list[dict[str, Any]]:
    """Those of this name in the story so far."""
    lines = (life.checkpoints / "story.jsonl").read_text().splitlines() if life.events(name) else []
    return [line for line in map(json.loads, lines) if line["event"] == name]


Moment = Callable[[Start], bool]


def starting(start: Start) -> bool:
    """As soon as the launcher catches SIGTERM."""
    return catches(start.process.pid)


def importing(start: Start) -> bool:
    return len(start.ranks()) == 2


def preparing(start: Start) -> bool:
    return start.phase() != "start"


def in_the_reference_pass(start: Start) -> bool:
    """The model is loaded between this start's first event and the pass."""
    return start.known


def after(step: int) -> Moment:
    """In a later step or its evaluation, which takes longer."""
    return lambda start: start.reached >= step


def tell_the_launcher(start: Start) -> None:
    start.process.send_signal(signal.SIGTERM)


def tell_one_rank(start: Start) -> None:
    start.ranks()[1].send_signal(signal.SIGTERM)


def tell_twice(start: Start) -> None:
    start.process.send_signal(signal.SIGTERM)
    start.process.send_signal(signal.SIGTERM)


def test_a_run_told_to_stop_again_and_again_ends_as_if_it_had_not_been(scene: Scene) -> None:
    straight = scene.life("straight").start().end()
    assert straight.code == 0, straight.err
    assert straight.record["story"]["starts"] == 1
    assert "a notice to stop costs no more than the step under way" in straight.out

    life = scene.life("told")
    for moment, tell in (
        (starting, tell_the_launcher),
        (importing, tell_the_launcher),
        (preparing, tell_one_rank),
        (in_the_reference_pass, tell_the_launcher),
        (after(2), tell_one_rank),
        (after(7), tell_twice),
    ):
        start = life.start(real=moment in (starting, importing))
        assert start.wait_for(partial(moment, start)), start.end().err
        told = time.monotonic()
        tell(start)
        ended = start.end()
        seconds = time.monotonic() - told
        assert ended.code == 75, f"{moment}: {ended.err}"
        assert "Traceback" not in ended.err
        assert "start the same command again" in ended.last_word, f"{moment}: {ended.err}"
        assert seconds <= SLACK, moment

    again = life.start().end()
    assert again.code == 0, again.err
    assert maths(again) == maths(straight)  # each value, of each step and evaluation, to the last bit
    assert again.record["files"] == straight.record["files"]
    said = again.record["story"]
    assert (said["crashes"], said["lost"], said["steps_repeated"]) == (0, 0, 0)
    assert said["interruptions"] == said["starts"] - 1 >= 2
    assert said["resumes"] >= 2
    assert again.lines[-2]["metrics"]["story/interruptions"] == said["interruptions"]


def test_the_node_that_was_told_leaves_first_and_the_other_holds(scene: Scene) -> None:
    meet = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared = scene.life("nodes")
    places = shared.words["checkpoint.path"], shared.words["output.path"]
    nodes = [
        scene.life(f"node-{node}", *places, "checkpoint.hold_seconds=600", "train.max_steps=400", ranks=1)
        for node in range(2)
    ]
    for node, life in enumerate(nodes):
        life.env = {**meet, "NODE_RANK": str(node)}
    first, second = [life.start() for life in nodes]
    assert first.wait_for(lambda: shared.events("ready") > 0), first.end().err
    second.process.send_signal(signal.SIGTERM)
    told = second.end()
    assert first.wait_for(lambda: "this node holds, for up to 600 s" in first.logs[1].read_text()), first.end().err
    first.process.send_signal(signal.SIGTERM)  # as a scheduler does, once the other has ended
    held = first.end(60)
    assert (told.code, held.code) == (75, 75), told.err + held.err
    assert "holds" not in told.err
    (notice,) = events(shared, "notice")
    assert (shared.checkpoints / f"step-{notice['step']:08d}" / "manifest.json").exists()


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, 137), (signal.SIGSTOP, 76)])
def test_a_rank_that_is_lost_ends_the_run_in_a_bounded_time_as_a_crash(
    scene: Scene, how: signal.Signals, code: int
) -> None:
    """What a stopped one gets from the launcher after that is cut short: tests/test_launcher.py has it."""
    life = scene.life(how.name, "train.max_steps=4000")
    start = life.start(patience=1.0 if how == signal.SIGSTOP else None)  # of a kill it knows: it would end the other
    assert start.wait_for(lambda: start.reached >= 2), start.end().err
    other, victim = start.ranks()
    victim.send_signal(how)
    other.wait(LOST + SLACK)
    ended = start.end()
    assert ended.code == code, ended.err
    *_, end = events(life, "end")  # the launcher's; rank 0 writes one before it where its watch ends it
    assert (end["code"], end["node"]) == (code, 0)
    assert ("rank 1 was killed by SIGKILL" in end["error"]) == (how == signal.SIGKILL)
