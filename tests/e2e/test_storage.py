"""A run that lives on S3 through a network that breaks, with a disk that is lost: it ends as the straight run did."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import traces
from tests.e2e.runs import TINY_RUN, Ended, sha256
from tests.faults.life import Life
from tests.faults.zygote import Zygote
from tests.servers.faults import FAULTS, HOLE, FaultProxy, at_random, every, fault_proxy
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY = 12, 3
COURSE = ("method=grpo", f"train.max_steps={STEPS}", f"checkpoint.save_every={SAVE_EVERY}", *TINY_RUN)
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Scene:
    """One run on S3, started again and again, and the straight one on disk."""

    straight: Ended
    life: Life
    bucket: Path  # its objects as files
    proxy: FaultProxy

    def mirrored(self) -> list[int]:
        """Steps of the complete checkpoints in the mirror."""
        return sorted(int(path.parent.name[5:]) for path in self.bucket.glob("mirror/step-*/manifest.json"))

    def lose_the_disk(self) -> None:
        for name in ("checkpoints", "models"):
            shutil.rmtree(self.life.folder / name)


@dataclass(frozen=True)
class Told:
    """What happened, start after start."""

    outage: Ended
    mirrored: list[int]
    after_the_loss: str  # stdout of the start that found an empty disk
    published: list[str]  # what was at output.path when that start was killed there
    unwritten: Ended
    evaluated: list[int]  # the steps whose evaluation was written down when that start had ended
    last: Ended
    faults: int


def life(zygote: Zygote, folder: Path, *words: str) -> Life:
    """A run of one process."""
    folder.mkdir()
    places = f"checkpoint.path={folder / 'checkpoints'}", f"output.path={folder / 'out'}"
    return Life(zygote, folder, 1, False, {word.partition("=")[0]: word for word in (*COURSE, *places, *words)})


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote, s3: S3Server) -> Iterator[Scene]:
    folder, bucket = tmp_path_factory.mktemp("storage"), s3.bucket("e2e")
    lake, tiny = traces.write_hive(folder / "lake", traces.learnable()), zygote.model
    straight = life(zygote, folder / "straight", f"data.path={lake}", f"model.path={tiny}").start().end()
    assert straight.code == 0, straight.err
    with fault_proxy(s3.endpoint_url) as proxy:
        broken = life(
            zygote,
            folder / "run",
            f"data.path={s3.upload(lake, bucket, 'lake')}/",
            f"data.endpoint_url={proxy.endpoint_url}",
            f"model.path={s3.upload(tiny, bucket, 'base')}",
            f"model.cache_path={folder / 'run' / 'models'}",
            f"checkpoint.mirror=s3://{bucket}/mirror",
            f"output.path=s3://{bucket}/out",
        )
        yield Scene(straight, broken, s3.root / bucket, proxy)
        zygote.kill_all()


@pytest.fixture(scope="module")
def told(scene: Scene, s3: S3Server) -> Told:
    proxy, run = scene.proxy, scene.life
    weather = at_random(7, 0.2, FAULTS)

    def held(n: int, method: str, path: str) -> str | None:
        """The weather, in which no run can end: its output hangs at the weights."""
        return HOLE if method == "PUT" and path.endswith(f"/out/{WEIGHTS}") else weather(n, method, path)

    proxy.plan = every(1, ["503"])
    run.env = {**s3.env, "AWS_MAX_ATTEMPTS": "2"}
    outage = run.start().end()

    proxy.plan = held
    run.env = {**s3.env, "AWS_MAX_ATTEMPTS": "8"}
    start = run.start()
    assert start.wait_for(lambda: len(scene.mirrored()) > 1), start.end().err
    start.lose()
    start.end()
    mirrored = scene.mirrored()
    scene.lose_the_disk()

    # Killed where its output hangs, as the one before may have been.
    before = proxy.injected[HOLE]
    start = run.start()
    assert start.wait_for(lambda: proxy.injected[HOLE] > before), start.end().err
    start.lose()
    after_the_loss = start.end().out
    published = sorted(path.name for path in (scene.bucket / "out").iterdir())

    proxy.plan = lambda n, method, path: (
        "503" if method == "PUT" and path.endswith(f"/out/{WEIGHTS}") else weather(n, method, path)
    )
    unwritten = run.start().end()
    evaluated = [*unwritten.curve("held_out/accuracy")]
    proxy.plan = weather
    last = run.start(real=True).end()  # the command itself, with all that it imports on the way
    return Told(outage, mirrored, after_the_loss, published, unwritten, evaluated, last, sum(proxy.injected.values()))


def test_an_outage_at_the_start_ends_with_75_in_one_line(told: Told) -> None:
    assert told.outage.code == 75, told.outage.err
    assert "the storage can't be reached (2 attempts" in told.outage.last_word
    assert told.outage.last_word.endswith("start the same command again")
    assert "Traceback" not in told.outage.err


def test_a_lost_disk_costs_nothing_but_the_download(told: Told) -> None:
    newest = told.mirrored[-1]
    assert newest >= 2 * SAVE_EVERY
    assert f"step-{newest:08d}" in told.after_the_loss
    assert "resuming from" in told.after_the_loss


def test_a_result_that_was_cut_off_is_not_seen_and_not_lost(told: Told) -> None:
    """Killed while it wrote the weights, then refused for longer than it tries: 75, and no run.json."""
    assert "run.json" not in told.published
    assert ".run.json.unfinished" in told.published
    assert told.unwritten.code == 75, told.unwritten.err
    assert "the final model was not written" in told.unwritten.last_word
    assert "Traceback" not in told.unwritten.err
    assert told.evaluated[-1] == STEPS  # a kill after run.json is too late to write it


def test_the_end_is_the_straight_runs(told: Told, scene: Scene) -> None:
    last, straight = told.last, scene.straight
    assert last.code == 0, last.err
    files = {path.name: sha256(path) for path in (scene.bucket / "out").iterdir()}
    assert files.pop("run.json")
    assert files == {name: said["sha256"] for name, said in straight.record["files"].items()}  # to the last bit
    assert told.faults > 40
