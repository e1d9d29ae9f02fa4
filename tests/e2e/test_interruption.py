"""A run that is cut off goes on where it was, on any number of processes; nobody else's run goes on from there."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.e2e import traces
from tests.e2e.oracle import assert_same_course, assert_same_weights
from tests.e2e.runs import TINY_RUN, TWO_RANKS, Ended, Start, contents, kill, maths, run_all

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY = 40, 7
AFTER_A_CHECKPOINT = 9  # a step of epoch 2 (four steps an epoch), two after the checkpoint of step 7


@dataclass(frozen=True)
class Scene:
    """The one run that all tests here start, cut off, start again and compare with."""

    folder: Path
    words: tuple[str, ...]
    straight: Ended

    def start(self, name: str, *more: str) -> Start:
        return Start(self.folder / name, (*self.words, *more))

    def copy(self, of: Path, name: str) -> Path:
        """A run's folder under another name, as it is."""
        return Path(shutil.copytree(of, self.folder / name))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Scene:
    folder = tmp_path_factory.mktemp("interruption")
    lake = traces.write_hive(folder / "lake", traces.learnable())
    words = (
        "method=grpo",
        f"data.path={lake}",
        f"model.path={tiny}",
        f"train.max_steps={STEPS}",
        f"checkpoint.save_every={SAVE_EVERY}",
        "train.eval_steps=10",
        *TINY_RUN,
    )
    straight = Start(folder / "straight", words).run()
    assert straight.code == 0, straight.err
    assert [*straight.curve("loss")] == list(range(1, STEPS + 1))
    return Scene(folder, words, straight)


@pytest.fixture(scope="module")
def killed(scene: Scene) -> Path:
    """The folder of a run that was killed in epoch 2."""
    start = scene.start("killed", "checkpoint.keep=9")  # else the one that is waited for is there for half a second
    with start.process() as process:
        start.wait_for_step(process, AFTER_A_CHECKPOINT, saved=SAVE_EVERY)
        kill(process)
    assert process.returncode == -signal.SIGKILL
    assert not (start.folder / "out" / "run.json").exists()
    return scene.copy(start.folder, "killed-on-two")  # before anything goes on in the first


def test_two_processes_take_the_same_course_as_one(scene: Scene) -> None:
    start = scene.start("two", "train.micro_batch_tokens=512")
    two = replace(start, env=TWO_RANKS).run()
    assert two.code == 0, two.err
    assert two.record["training"]["world_size"] == 2
    assert_same_course(two, scene.straight)
    assert_same_weights(two, scene.straight)


def test_a_killed_run_ends_exactly_as_if_it_had_not_been(scene: Scene, killed: Path) -> None:
    again = scene.start("killed").run()
    assert again.code == 0, again.err
    assert "resuming from" in again.out
    assert maths(again) == maths(scene.straight)  # each value, of each step, to the last bit
    assert again.record["files"] == scene.straight.record["files"]  # SHA-256 of the weights among them
    for name in ("fingerprint", "counts", "metrics"):
        assert again.record[name] == scene.straight.record[name]


def test_a_run_killed_on_one_process_goes_on_on_two(scene: Scene, killed: Path) -> None:
    again = Start(killed, (*scene.words, "train.micro_batch_tokens=512"), TWO_RANKS).run()
    assert again.code == 0, again.err
    assert "resuming from" in again.out
    assert_same_course(again, scene.straight)
    assert_same_weights(again, scene.straight)


def test_a_run_told_to_stop_on_two_processes_saves_leaves_with_75_and_goes_on_on_one(scene: Scene) -> None:
    start = scene.start("told")
    two = replace(start, env=TWO_RANKS)
    with two.process() as process:
        two.wait_for_step(process, 2)
        process.send_signal(signal.SIGTERM)
        stopped = two.ended(process)
    assert stopped.code == 75, stopped.err
    assert f"of {STEPS}, saved in {stopped.checkpoints}; start the same command again to go on" in stopped.err
    assert "Traceback" not in stopped.err
    assert not (stopped.output / "run.json").exists()
    last = max(stopped.curve("loss"))
    assert (stopped.checkpoints / f"step-{last:08d}" / "manifest.json").exists()

    again = start.run()
    assert again.code == 0, again.err
    assert f"resuming from {stopped.checkpoints}/step-{last:08d}" in again.out
    assert_same_course(again, scene.straight)
    assert_same_weights(again, scene.straight)


def test_a_finished_run_started_again_has_nothing_to_do(scene: Scene) -> None:
    straight = scene.straight
    before = contents(straight.output), contents(straight.checkpoints)
    starts = (straight.checkpoints / "story.jsonl").read_text()
    again = scene.start("straight", "train.eval_pairs=5", "checkpoint.keep=1").run()  # neither makes it another run
    assert again.code == 0, again.err
    assert again.out.strip() == f"{straight.output}: holds this run's complete output already; nothing to do"
    after = contents(straight.output), contents(straight.checkpoints)
    for noted in ("lock", "story.jsonl"):  # who held the folder, and that there was one more start
        assert before[1].pop(noted)
        assert after[1].pop(noted)
    assert after == before
    assert (straight.checkpoints / "story.jsonl").read_text().startswith(starts)


@pytest.fixture(scope="module")
def others(scene: Scene) -> dict[str, Ended]:
    """Runs that differ, at places where something of the straight run is; none has a step to do but the last."""
    straight, other = scene.straight, "train.learning_rate=2e-3"
    for name in ("its checkpoints", "set aside"):
        scene.copy(straight.checkpoints, f"{name}/checkpoints")
    return run_all(
        {
            "its output": scene.start("its output", other, f"output.path={straight.output}"),
            "its checkpoints": scene.start("its checkpoints", other, "train.seed=7"),
            "no checkpoint": scene.start("no checkpoint", "checkpoint.resume=must"),
            "set aside": scene.start("set aside", other, "checkpoint.resume=never", "train.max_steps=2"),
        }
    )


def test_the_output_of_another_run_is_not_touched(scene: Scene, others: dict[str, Ended]) -> None:
    refused = others["its output"]
    assert refused.code == 64
    assert refused.last_word.startswith(f"entrypoint: {scene.straight.output}: holds the output of another run of ")
    assert refused.last_word.endswith(", which differs in train.learning_rate; name another output.path")
    assert (
        scene.straight.record["files"]["model.safetensors"]["sha256"]
        == contents(scene.straight.output)["model.safetensors"][1]
    )


def test_the_checkpoints_of_another_run_are_refused_by_the_keys_that_differ(others: dict[str, Ended]) -> None:
    refused = others["its checkpoints"]
    assert refused.code == 64
    newest = refused.checkpoints / f"step-{STEPS:08d}"
    assert refused.last_word == (
        f"entrypoint: {newest}: is another run's checkpoint, it differs in "
        "train.learning_rate (0.001 there, 0.002 here), train.seed (42 there, 7 here); "
        "give this run a checkpoint.path of its own, or checkpoint.resume=never"
    )
    assert not refused.output.exists() or not [*refused.output.iterdir()]


def test_a_run_that_must_resume_refuses_to_begin(others: dict[str, Ended]) -> None:
    refused = others["no checkpoint"]
    assert refused.code == 64
    assert "no complete checkpoint, expected one since checkpoint.resume=must" in refused.last_word


def test_a_run_that_must_not_resume_sets_older_checkpoints_aside(scene: Scene, others: dict[str, Ended]) -> None:
    fresh = others["set aside"]
    assert fresh.code == 0, fresh.err
    old = [path.name for path in scene.straight.checkpoints.glob("step-*")]
    assert sorted(path.name for path in (fresh.checkpoints / "older.aside-1").iterdir()) == sorted(old)
    assert [*fresh.curve("loss")] == [1, 2]  # nothing of the older run's curve is left
    assert fresh.curve("learning_rate")[1] == pytest.approx(2e-3)
