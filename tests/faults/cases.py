"""The cases: each makes a run, breaks it as its number and the seed say, and has it judged."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tests.e2e.runs import Ended
from tests.faults.aim import moments, strike
from tests.faults.hits import TOLD, Hit, kill_rank, lose, standing_still, stop_rank, tell_launcher
from tests.faults.judge import CRASH, LOST, STOPPED, Broken, Verdict, Wrong, check, exact, finish, told
from tests.faults.life import COURSE, PATIENCE, Life, lease
from tests.faults.scene import SHAPES, STEPS, Scene, Shape
from tests.faults.storage import mirrored, on_s3

REAL_EVERY = 7  # each seventh case begins with the real command

Case = Callable[[Scene, str, int, random.Random], Verdict]


# Again and again, at moments of the whole run ------------------------------------------------------------------------

WAYS: dict[str, Hit] = {**TOLD, "machine": lose, "rank": kill_rank}


@contextmanager
def broken(
    scene: Scene, name: str, number: int, dice: random.Random, ways: Sequence[str]
) -> Iterator[tuple[Life, Ended, Verdict]]:
    """A life broken at several moments in some of WAYS, the straight run's end, and what has happened so far."""
    shape, verdict = SHAPES[number % len(SHAPES)], Verdict()
    straight = scene.straight(shape)
    with mirrored(scene, name, shape, on=number // len(SHAPES) % 2 == 0) as life:
        real = number % REAL_EVERY == 0 and not shape.fsdp
        for index, phase in enumerate(moments(life, dice, real=real)):
            start = life.start(real=real and index == 0)
            what = dice.choice(ways)
            verdict.faults.append(strike(start, phase, straight.seconds, dice, WAYS[what], what))
            if start.done:
                break
        yield life, straight.ended, verdict


def kill(scene: Scene, name: str, number: int, dice: random.Random) -> Verdict:
    """A lost machine, or one rank killed; now and then the disk is lost with it."""
    with broken(scene, name, number, dice, ("machine", "machine", "rank")) as (life, straight, verdict):
        for fault in verdict.faults:
            fault.how = CRASH if fault.what == "rank" else LOST
        if life.words.get("checkpoint.mirror") and dice.random() < 0.5:
            from_the_mirror(life, straight)
        else:
            finish(life, straight, verdict)
    return verdict


def term(scene: Scene, name: str, number: int, dice: random.Random) -> Verdict:
    """Notices to the launcher, to one rank, to all, and twice."""
    with broken(scene, name, number, dice, (*TOLD,)) as (life, straight, verdict):
        for fault in verdict.faults:
            fault.repeat = 1
        finish(life, straight, verdict)
    return verdict


def from_the_mirror(life: Life, straight: Ended) -> None:
    """The disk is lost: the run goes on from its newest copy, and ends the same."""
    shutil.rmtree(life.checkpoints)
    start = life.start()
    ended = start.end()
    check(ended.code, (0,), start, ended)
    resumed = [line for line in ended.out.splitlines() if line.startswith("resuming from ")]
    since = int(resumed[0].rpartition("step-")[2]) + 1 if resumed else 0
    exact(ended, straight, since=since if ended.lines else STEPS + 1)  # none: it was done before the disk was lost


# One rank of two -----------------------------------------------------------------------------------------------------


def rank(scene: Scene, name: str, number: int, dice: random.Random) -> Verdict:
    """A rank that is stopped or killed: the others leave in a bounded time."""
    shape, verdict = [shape for shape in SHAPES if shape.ranks > 1][number % 4], Verdict()
    straight = scene.straight(shape)
    life = scene.life(name, shape)
    start = life.start()
    stopped = number % 2 == 0
    phase = dice.choice(("reference pass", "step", "step", "save"))
    fault = strike(
        start, phase, straight.seconds, dice, stop_rank if stopped else kill_rank, "stop" if stopped else "kill"
    )
    fault.how = LOST if stopped else CRASH
    verdict.faults.append(fault)
    finish(life, straight.ended, verdict)
    return verdict


# Another number of ranks ---------------------------------------------------------------------------------------------


def world(scene: Scene, name: str, number: int, dice: random.Random) -> Verdict:
    """Cut off on one number of ranks, resumed on another."""
    ranks, others = ((1, 2), (2, 1), (2, 3))[number % 3]
    shape, verdict = Shape(("grpo", "dpo")[number // 3 % 2], ranks), Verdict()
    straight = scene.straight(shape)
    life = scene.life(name, shape)
    start = life.start()
    told_ = dice.random() < 0.5
    what = dice.choice((*TOLD,)) if told_ else "machine"
    fault = strike(start, "step", straight.seconds, dice, TOLD[what] if told_ else lose, what, last=STEPS // 2)
    fault.how = STOPPED if told_ else LOST
    verdict.faults.append(fault)
    finish(life, straight.ended, verdict, ranks=others)
    return verdict


# The storage ---------------------------------------------------------------------------------------------------------


def s3(scene: Scene, name: str, number: int, dice: random.Random) -> Verdict:
    """Traces, model, mirror and output on S3, where two requests of five fail; a kill or a notice in the midst."""
    shape, verdict = SHAPES[number % len(SHAPES)], Verdict()
    straight = scene.straight(shape)
    with on_s3(scene, name, shape, dice.randrange(1 << 30)) as (life, proxy):
        told_ = dice.random() < 0.5
        start = life.start()
        phase = dice.choice(("data preparation", *COURSE))
        fault = strike(start, phase, straight.seconds, dice, tell_launcher if told_ else lose, "storage")
        fault.how, fault.repeat = (STOPPED, 1) if told_ else (LOST, 2)
        verdict.faults.append(fault)
        finish(life, straight.ended, verdict)
        verdict.injected = sum(proxy.injected.values())
    return verdict


# Two runs, wrong clocks ----------------------------------------------------------------------------------------------


def two(scene: Scene, name: str, number: int, dice: random.Random) -> Verdict:
    """Two runs on one folder at once: one wins, the other says who holds it, and leaves with 64."""
    shape, verdict = SHAPES[number % 4], Verdict()
    straight = scene.straight(shape)
    life = scene.life(name, shape, "checkpoint.grace_seconds=1", f"train.collective_timeout={PATIENCE}")
    first = life.start()
    begun = time.monotonic() + dice.uniform(0, 0.5)
    first.wait_for(lambda: time.monotonic() >= begun)
    second = life.start()
    if not first.wait_for(lambda: bool(lease(life))):
        raise Wrong(f"{life.folder}: the first run has ended and nobody holds the folder: {first.end().err}")
    holder = int(lease(life)["pid"])
    winner, loser = sorted((first, second), key=lambda start: holder not in [rank.pid for rank in start.ranks()])
    with standing_still(winner.ranks()):  # else it might be done before the other has waited its second
        refused = loser.end()
    check(refused.code, (64,), loser, refused)
    said = f"entrypoint: {life.checkpoints}: is held by another run, process {holder} on "
    if not refused.last_word.startswith(said):
        raise Wrong(f"{life.folder}: the loser said {refused.last_word!r}, expected {said!r}")
    if life.events("locked") != 1:  # else its end would be taken for one of the winner's run
        raise Wrong(f"{life.folder}: {life.events('locked')} starts say that they never had the folder, expected 1")
    ended = winner.end()
    check(ended.code, (0,), winner, ended)
    exact(ended, straight.ended)
    verdict.faults.append(Broken("start", "", "second run", 64, counted=False, repeat=0, seconds=0.0))
    told(ended, verdict)
    return verdict


def clock(scene: Scene, name: str, number: int, dice: random.Random) -> Verdict:
    """After a kill the files' times lie, and so does the clock: what is newest is a matter of steps."""
    shape, verdict = SHAPES[number % len(SHAPES)], Verdict()
    straight = scene.straight(shape)
    life = scene.life(name, shape)
    verdict.faults.append(
        strike(
            life.start(), "save", straight.seconds, dice, lose, ("set back", "new times")[number % 2], last=STEPS // 2
        )
    )
    verdict.faults[0].how = LOST
    files = sorted(life.checkpoints.rglob("*"), reverse=True)  # the oldest step becomes the newest file
    day = 86_400.0
    for age, path in enumerate(files):
        at = time.time() + day + age if number % 2 == 0 else time.time() - day + age
        os.utime(path, (at, at))
    start = life.start(clock=-day if number % 2 == 0 else 0.0)
    ended = start.end()
    check(ended.code, (0,), start, ended)
    exact(ended, straight.ended)
    told(ended, verdict)
    return verdict
