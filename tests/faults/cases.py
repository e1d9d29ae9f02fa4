"""The cases: each makes a run, breaks it as its number and the seed say, and has it judged."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.e2e.runs import Ended
from tests.faults.aim import aim
from tests.faults.judge import CRASH, LOST, STOPPED, Broken, Verdict, Wrong, check, exact, finish, told
from tests.faults.life import COURSE, ENDED, PHASES, Life, Start
from tests.faults.scene import SAVE_EVERY, SHAPES, STEPS, TIMEOUT, Scene, Shape
from tests.servers.faults import FAULTS, HOLE, FaultProxy, fault_proxy

BREAKS = 3  # faults in the life of one run
REAL_EVERY = 7  # each seventh case begins with the real command
SLACK = 20  # seconds on a busy machine
KILLED, TERMINATED = 128 + signal.SIGKILL, 128 + signal.SIGTERM

Case = Callable[[Scene, str, int, random.Random], Verdict]
Hit = Callable[[Start, random.Random], tuple[int, ...]]  # does it, and returns the exit codes that may follow


# kill -9 -------------------------------------------------------------------------------------------------------------


def kill(scene: Scene, name: str, number: int, dice: random.Random) -> Verdict:
    """A lost machine, or one rank killed, at moments of the whole run; now and then the disk is lost with it."""
    shape, verdict = SHAPES[number % len(SHAPES)], Verdict()
    straight = scene.straight(shape)
    with mirrored(scene, name, shape, on=number // len(SHAPES) % 2 == 0) as life:
        real = number % REAL_EVERY == 0 and not shape.fsdp
        for index, phase in enumerate(moments(life, dice, real=real)):
            start = life.start(real=real and index == 0)
            what = dice.choice(("machine", "machine", "rank"))
            fault = strike(start, phase, straight.seconds, dice, kill_rank if what == "rank" else lose, what)
            fault.how = CRASH if what == "rank" else LOST
            verdict.faults.append(fault)
            if start.done:
                break
        if life.words.get("checkpoint.mirror") and dice.random() < 0.5:
            from_the_mirror(life, straight.ended)
        else:
            finish(life, straight.ended, verdict)
    return verdict


def lose(start: Start, dice: random.Random) -> tuple[int, ...]:
    start.lose()
    return (-signal.SIGKILL,)


def kill_rank(start: Start, dice: random.Random) -> tuple[int, ...]:
    """One rank; a verdict that it has given already stands."""
    for victim in dice.sample(all_ranks(start), 1):
        victim.send_signal(signal.SIGKILL)
    return (KILLED, 0)


def from_the_mirror(life: Life, straight: Ended) -> None:
    """The disk is lost: the run goes on from its newest copy, and ends the same."""
    shutil.rmtree(life.checkpoints)
    start = life.start()
    ended = start.end()
    check(ended.code, (0,), start, ended)
    resumed = [line for line in ended.out.splitlines() if line.startswith("resuming from ")]
    since = int(resumed[0].rpartition("step-")[2]) + 1 if resumed else 0
    exact(ended, straight, since=since if ended.lines else STEPS + 1)  # none: it was done before the disk was lost


# SIGTERM -------------------------------------------------------------------------------------------------------------


def term(scene: Scene, name: str, number: int, dice: random.Random) -> Verdict:
    """Notices to the launcher, to one rank, to all, and twice."""
    shape, verdict = SHAPES[number % len(SHAPES)], Verdict()
    straight = scene.straight(shape)
    with mirrored(scene, name, shape, on=number // len(SHAPES) % 2 == 0) as life:
        real = number % REAL_EVERY == 0 and not shape.fsdp
        for index, phase in enumerate(moments(life, dice, real=real)):
            start = life.start(real=real and index == 0)
            what = dice.choice((*TOLD,))
            fault = strike(start, phase, straight.seconds, dice, TOLD[what], what)
            fault.repeat = 1
            verdict.faults.append(fault)
            if start.done:
                break
        finish(life, straight.ended, verdict)
    return verdict


def tell_launcher(start: Start, dice: random.Random) -> tuple[int, ...]:
    heard = catches(start.process.pid)
    start.process.send_signal(signal.SIGTERM)
    return (75, 0) if heard else (75, 0, -signal.SIGTERM)


def tell_rank(start: Start, dice: random.Random) -> tuple[int, ...]:
    return tell(start, dice.sample(all_ranks(start), 1))


def tell_ranks(start: Start, dice: random.Random) -> tuple[int, ...]:
    return tell(start, all_ranks(start))


def tell_twice(start: Start, dice: random.Random) -> tuple[int, ...]:
    first = tell_launcher(start, dice)
    until = time.monotonic() + dice.uniform(0, 0.5)
    start.wait_for(lambda: time.monotonic() >= until)
    return first + (tell_launcher if dice.random() < 0.5 else tell_ranks)(start, dice)


TOLD: dict[str, Hit] = {"launcher": tell_launcher, "one rank": tell_rank, "all ranks": tell_ranks, "twice": tell_twice}


def tell(start: Start, ranks: list[psutil.Process]) -> tuple[int, ...]:
    """SIGTERM to these ranks themselves; one whose Python has not begun yet can't catch it, and is a killed rank."""
    heard = all(catches(rank.pid) for rank in ranks)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(signal.SIGTERM)
    return (75, 0) if heard else (75, 0, TERMINATED)


def catches(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM; one that is gone needs none."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return True


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


def stop_rank(start: Start, dice: random.Random) -> tuple[int, ...]:
    """SIGSTOP to one; the other leaves by the time-out, and the launcher ends the stopped one."""
    ranks = all_ranks(start)
    if not ranks:
        return (0,)
    victim, other = dice.sample(ranks, 2)
    victim.send_signal(signal.SIGSTOP)
    try:
        other.wait(TIMEOUT + SLACK)
    except psutil.TimeoutExpired as error:
        raise Wrong(f"{start.life.folder}: a rank is there {TIMEOUT + SLACK} s after another was stopped") from error
    return (76, 0)


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


@contextmanager
def on_s3(scene: Scene, name: str, shape: Shape, seed: int) -> Iterator[tuple[Life, FaultProxy]]:
    """A life that has nothing but its checkpoints on disk, behind a proxy that breaks two requests of five."""
    bucket = scene.s3.bucket("faults")

    def weather(n: int, method: str, path: str) -> str | None:
        dice = random.Random(f"{seed}/{n}")
        share = dice.random()
        return dice.choice(FAULTS) if share < 0.4 else HOLE if share < 0.403 else None

    with fault_proxy(scene.s3.endpoint_url) as proxy:
        life = scene.life(
            name,
            shape,
            f"data.path={scene.s3.upload(scene.lake, bucket, 'lake')}/",
            f"data.endpoint_url={proxy.endpoint_url}",
            f"model.path={scene.s3.upload(scene.tiny, bucket, 'base')}",
            f"model.cache_path={scene.folder / name / 'models'}",
            f"checkpoint.mirror=s3://{bucket}/mirror",
            "checkpoint.save_every=1",
            f"output.path=s3://{bucket}/out",
        )
        life.env, life.output = {**scene.s3.env, "AWS_MAX_ATTEMPTS": "10"}, scene.s3.root / bucket / "out"
        life.uploading = watch_uploads(proxy, weather)
        yield life, proxy


@contextmanager
def mirrored(scene: Scene, name: str, shape: Shape, *, on: bool) -> Iterator[Life]:
    """A life on disk, `on`: with a mirror, whose proxy breaks nothing and knows when a copy is under way."""
    if not on:
        yield scene.life(name, shape)
        return
    with fault_proxy(scene.s3.endpoint_url) as proxy:
        mirror = f"checkpoint.mirror=s3://{scene.s3.bucket('faults')}/mirror"
        life = scene.life(name, shape, mirror, f"data.endpoint_url={proxy.endpoint_url}")
        life.env, life.uploading = scene.s3.env, watch_uploads(proxy, lambda n, method, path: None)
        yield life


def watch_uploads(proxy: FaultProxy, plan: Callable[[int, str, str], str | None]) -> Callable[[], bool]:
    """Whether a checkpoint's copy has begun and its manifest was not sent yet; faults come by `plan`."""
    under_way = [False]

    def watch(n: int, method: str, path: str) -> str | None:
        if method in ("PUT", "POST") and "/mirror/step-" in path:
            under_way[0] = not path.endswith("/manifest.json")
        return plan(n, method, path)

    proxy.plan = watch
    return lambda: under_way[0]


# Two runs, wrong clocks ----------------------------------------------------------------------------------------------


def two(scene: Scene, name: str, number: int, dice: random.Random) -> Verdict:
    """Two runs on one folder at once: one wins, the other says who holds it, and leaves with 64."""
    shape, verdict = SHAPES[number % 4], Verdict()
    straight = scene.straight(shape)
    life = scene.life(name, shape, "checkpoint.grace_seconds=1")
    starts = [life.start()]
    begun = time.monotonic() + dice.uniform(0, 0.5)
    starts[0].wait_for(lambda: time.monotonic() >= begun)
    starts.append(life.start())
    holders = [next(iter(all_ranks(start)), start.process).pid for start in starts]
    ended = [start.end() for start in starts]
    codes = [end.code for end in ended]
    if sorted(codes) != [0, 64]:
        raise Wrong(f"{life.folder}: two runs ended with {codes}, expected 0 and 64: {ended[0].err} {ended[1].err}")
    winner, loser = codes.index(0), codes.index(64)
    check(64, (64,), starts[loser], ended[loser])
    said = f"entrypoint: {life.checkpoints}: is held by another run, process {holders[winner]} on "
    if not ended[loser].last_word.startswith(said):
        raise Wrong(f"{life.folder}: the loser said {ended[loser].last_word!r}, expected {said!r}")
    exact(ended[winner], straight.ended)
    verdict.faults.append(Broken("start", "", "second run", 64, counted=False, repeat=0, seconds=0.0))
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


# What they share -----------------------------------------------------------------------------------------------------


def moments(life: Life, dice: random.Random, *, real: bool) -> list[str]:
    """BREAKS phases in the order in which a run that is started again comes through them.

    A `real` first start is broken in its imports: that is what the others don't have.
    """
    phases = [phase for phase in PHASES if phase != "upload" or "checkpoint.mirror" in life.words]
    chosen = ["start"] * real + dice.choices(phases, k=BREAKS - real)
    return sorted(chosen, key=lambda phase: min(PHASES.index(phase), PHASES.index("step")) + (phase == "final write"))


def strike(
    start: Start,
    phase: str,
    longest: dict[str, float],
    dice: random.Random,
    hit: Hit,
    what: str,
    *,
    last: int = STEPS - 1,
) -> Broken:
    """Break a start at a moment (see `aim`) and wait for its end; "ended" where the run was faster."""
    at = aim(start, phase, longest, dice, last)
    begun = time.monotonic()
    codes: tuple[int, ...] = (0,) if at == ENDED else hit(start, dice)
    ended = start.end()
    seconds = time.monotonic() - begun
    check(ended.code, codes, start, ended)
    if ended.code == 0 and not start.done:
        raise Wrong(f"{start.life.folder}: start {start.life.starts} ended with 0 and without run.json")
    return Broken(
        phase=at,
        how=STOPPED,
        what=what,
        code=ended.code,
        counted=start.known and not start.done,
        # Training goes on while a checkpoint is written: one that was under way is lost too.
        repeat=2 * SAVE_EVERY,
        seconds=seconds,
        real=start.real,
    )


def all_ranks(start: Start) -> list[psutil.Process]:
    """The ranks, once all of them are there; none where the run has ended."""
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = start.ranks()
        return len(found) == start.life.ranks

    start.wait_for(there)
    return found
