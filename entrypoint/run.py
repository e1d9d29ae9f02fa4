"""One rank of a run, in the order of time: load, build, train, save."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a run reads what it was given, and nothing else
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports each start to its makers otherwise
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import transformers

from entrypoint.checkpoint.schedule import Schedule
from entrypoint.conf import Data, Run
from entrypoint.data.report import Counts
from entrypoint.errors import EXIT_DONE, CheckpointError, LockedError, RunError, StoppedError
from entrypoint.inspection.advice import MANY_EPOCHS
from entrypoint.load import Loaded, load, load_model
from entrypoint.save import save
from entrypoint.session import Session
from entrypoint.storage import explained
from entrypoint.story import Story
from entrypoint.tracking.tracker import Tracker
from entrypoint.training.build import Plan, build_trainer, compute_dtype, pad_id, plan
from entrypoint.training.course import Course
from entrypoint.training.evaluation import held_out
from entrypoint.training.grace import Grace
from entrypoint.training.reference import ReferenceLogProbs
from entrypoint.watch import STOP, Watch
from entrypoint.world import World, joined

LEAVING_SECONDS = 10  # of the grace, for what comes after the last copy


def run_rank(run: Run, watch: Watch) -> None:
    """Be one rank of `run`, as the environment says which; `watch` is told to stop.

    Raises:
        RunError: an end with its exit code; StoppedError after a signal, when all is saved.
    """
    _quiet_libraries()
    with joined(run.train.collective_timeout, watch) as world:
        try:
            loaded = load(run, world)
        except LockedError:  # on rank 0; what the other run's crashes count for is not this start's to say
            Story.of(run).append("locked")
            raise
        if loaded is None:
            world.say(f"{run.output.path}: holds this run's complete output already; nothing to do")
            return
        with _told(run, loaded, world) as story:
            session = build(run, loaded, world, story)
            try:
                train(session)
                save(session)
            finally:
                if session.tracker:
                    session.tracker.close()


@contextmanager
def _told(run: Run, loaded: Loaded, world: World) -> Iterator[Story | None]:
    """The run's story, on rank 0: this start and how it ends. A crash is written down by the launcher."""
    if not world.is_main:
        yield None
        return
    story = Story.of(run)
    count = os.environ.get("RESTART_COUNT")
    story.start(resume_step=loaded.resume_step, world_size=world.size, restart_count=int(count) if count else None)
    world.watch.last_words = story.left
    try:
        yield story
        story.end(EXIT_DONE)
    except RunError as error:
        story.end(error.exit_code, str(error))
        raise


def build(run: Run, loaded: Loaded, world: World, story: Story | None) -> Session:
    """The trainer, fed with the traces' groups, and what judges it.

    Raises:
        DataError: no step can be made of the groups.
    """
    steps = plan(run, loaded.traces.train, world)
    held = held_out(loaded.traces.held_out, run.data, limit=run.train.eval_pairs)
    report(run, loaded, steps, world, pairs=len(held))
    tracker = _tracker(run, loaded, steps, world)
    course = Course(
        eval_steps=run.train.eval_steps,
        world=world,
        tracker=tracker,
        story=story,
        grace=_grace(run, story, world),
        schedule=Schedule(run.checkpoint.save_seconds) if world.is_main else None,
    )
    loaded.checkpoints.on_saved = course.saved
    log_probs = loaded.reference_folder(compute_dtype(run.train))
    reference = ReferenceLogProbs(log_probs / "train")
    trainer, rows = build_trainer(
        run,
        world.each(lambda: load_model(loaded.model_folder)),
        loaded.tokenizer,
        loaded.traces.train,
        reference,
        steps=steps.steps,
        callbacks=[course],
        warn=world.warn,
    )
    session = Session(
        run=run,
        loaded=loaded,
        world=world,
        trainer=trainer,
        plan=steps,
        held=held,
        reference=reference,
        held_reference=ReferenceLogProbs(log_probs / "held_out"),
        course=course,
        tracker=tracker,
        story=story,
        pad=pad_id(loaded.tokenizer),
    )
    course.evaluate = session.evaluate
    trainer.feed(
        steps.sampler,
        rows,
        checkpoints=loaded.checkpoints,
        before_first_step=session.measure_base,
        too_large=session.too_large,
        best=session.best,
    )
    return session


def _grace(run: Run, story: Story | None, world: World) -> Grace | None:
    """What a notice can cost, on rank 0."""
    if story is None:
        return None
    return Grace(
        run.checkpoint.grace_seconds,
        interval=f"checkpoint.save_every={run.checkpoint.save_every}",
        known=story.newest_save(),
        say=world.say,
        warn=world.warn,
    )


def _tracker(run: Run, loaded: Loaded, steps: Plan, world: World) -> Tracker | None:
    """Where metrics go, on rank 0; where it is refused, all ranks leave."""
    made: list[Tracker] = []

    def make() -> None:
        with explained(str(run.checkpoint.path), CheckpointError):
            made.append(Tracker(run, resumed_at=loaded.resume_step, total_steps=steps.steps))

    world.once(make)
    return made[0] if made else None


def train(session: Session) -> None:
    """All steps, from the newest checkpoint on, and the metrics after.

    Raises:
        StoppedError: told to stop; saved.
        DivergedError: the numbers left the region where they mean anything.
    """
    started = time.monotonic()
    resume = session.loaded.resume_from
    if resume:
        session.world.say(f"resuming from {resume}")
    session.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    session.loaded.checkpoints.wait()
    session.seconds = time.monotonic() - started
    if session.course.stopped:
        session.world.once(lambda: _finish_mirror(session))
        step, checkpoints = session.trainer.state.global_step, session.loaded.checkpoints
        saved = "saved" if checkpoints.newest == step else f"which is not saved, but step {checkpoints.newest} is,"
        raise StoppedError(
            f"stopped by a signal at step {step} of {session.plan.steps}, {saved} in {checkpoints.folder}; "
            "start the same command again to go on",
            hold=session.world.watch.told != STOP,
        )
    session.after = session.evaluate()
    if session.tracker:
        session.tracker.log_held_out(session.plan.steps, session.after)


def _finish_mirror(session: Session) -> None:
    """On rank 0, after a notice: the copy to the mirror has what is left of the grace."""
    mirror, course = session.loaded.checkpoints.mirror, session.course
    if mirror is None:
        return
    passed = time.monotonic() - course.stopped_at + course.step_seconds  # the signal came within the last step
    left = session.run.checkpoint.grace_seconds - passed - LEAVING_SECONDS
    if not mirror.finish(max(0.0, left)):
        session.world.warn("the newest checkpoint is not in checkpoint.mirror yet; the next start copies it")


def report(run: Run, loaded: Loaded, steps: Plan, world: World, *, pairs: int) -> None:
    """What the run is about to do, and what of it is seldom meant."""
    counts = loaded.traces.counts
    world.say(counts.text())
    unit = "groups" if run.method.name == "grpo" else "pairs"
    world.say(
        f"{run.method.name}: {len(steps.sampler.units):,} {unit}, {steps.steps:,} steps of up to "
        f"{run.train.batch_size}, {steps.epochs:.2f} epochs; {pairs:,} held-out pairs"
    )
    notes = []
    if steps.groups_without_pair:
        notes.append(f"{steps.groups_without_pair:,} training groups make no pair and are not trained on")
    if steps.epochs > MANY_EPOCHS:
        notes.append(
            f"train.max_steps={steps.steps} means {steps.epochs:.1f} epochs over the same traces; "
            f"{len(steps.sampler)} steps are one epoch"
        )
    if not pairs:
        notes.append("no held-out group makes a pair: the run is not evaluated; see data.held_out_share")
    for note in notes + behaviour_warnings(counts, run.data):
        world.warn(note)


def behaviour_warnings(counts: Counts, data: Data) -> list[str]:
    """What makes the reference a poor stand-in for the policy that sampled the traces."""
    notes = []
    if len(counts.models) > 1:
        found = ", ".join(f"{name} {rows:,}" for name, rows in sorted(counts.models.items(), key=lambda m: -m[1]))
        notes.append(
            f"the traces were sampled by {len(counts.models)} models (rows: {found}), but the behaviour policy is "
            "taken to be the base model; data.models keeps only some"
        )
    if counts.other_models:
        notes.append(f"{counts.other_models:,} rows were not sampled by data.behaviour_model={data.behaviour_model}")
    if counts.logps_differ:
        notes.append(
            f"{counts.logps_differ:,} rows have recorded log-probs of other tokens than the tokenizer's: "
            "the reference stands in for them"
        )
    return notes


def _quiet_libraries() -> None:
    """Leave the log to what this run has to say."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"accelerate|transformers|trl")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
