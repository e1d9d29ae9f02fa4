"""What happens between two steps: a stop is agreed, the held-out pairs are evaluated, metrics are written down."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entrypoint.checkpoint import Saved
from entrypoint.checkpoint.schedule import Schedule
from entrypoint.errors import StoppedError
from entrypoint.story import Story
from entrypoint.tracking.tracker import Tracker
from entrypoint.training.grace import Grace
from entrypoint.watch import NOTHING, SAVE, STOP
from entrypoint.world import World


class Course(TrainerCallback):
    """Hooks of the Trainer's loop.

    Args:
        eval_steps: steps between two evaluations.
        world: where ranks agree on what they were told.
        tracker: takes metrics, on rank 0.
        story: takes events, on rank 0.
        grace: tells what a notice can cost, on rank 0.
        schedule: says when a save is due by the clock, on rank 0.

    `evaluate` must be set before training: the held-out metrics of the policy, by all ranks together.

    Attributes:
        stopped: whether the ranks have agreed to stop and save.
        stopped_at: when, by `time.monotonic`.
        step_seconds: of the newest step, from its begin to its end; 0 before the first.
    """

    evaluate: Callable[[], dict[str, float]]

    def __init__(
        self,
        *,
        eval_steps: int,
        world: World,
        tracker: Tracker | None = None,
        story: Story | None = None,
        grace: Grace | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.eval_steps = eval_steps
        self.world = world
        self.tracker = tracker
        self.story = story
        self.grace = grace
        self.schedule = schedule
        self.stopped, self.stopped_at = False, 0.0
        self.step_seconds = 0.0
        self._begun = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """From here on a stop is agreed and saved: there is something to save.

        Raises:
            StoppedError: told to stop before the first step.
        """
        state.compute_steps(
            args, state.max_steps
        )  # a resumed state brings the former run's save_every and logging_steps
        self.world.watch.patience = None
        self.world.check_stop("getting ready")
        if self.tracker:
            self.tracker.step(state.global_step)
        if self.story:
            self.story.ready(state.global_step)
        if self.schedule:
            self.schedule.begin()
        if self.grace:
            self.grace.begin(more["model"])
        resumed_into_evaluation = self._due(state) and self.world.once(lambda: not self._evaluated(state.global_step))
        if resumed_into_evaluation:  # the one that a stop has broken off
            self._evaluate(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A step's time begins."""
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Agree on a stop; evaluate, but not where the final evaluation follows at once."""
        self.step_seconds = time.perf_counter() - self._begun
        if self.tracker:
            self.tracker.step(state.global_step)
        if self.story:
            self.story.reach(state.global_step)
        due = self.schedule is not None and self.schedule.due()
        told = self.world.agreed(SAVE if due else NOTHING)
        if told == SAVE:
            self.world.watch.saved()
        stop = told == STOP and state.global_step < state.max_steps
        if not stop and self._due(state):
            try:
                self._evaluate(state)
            except StoppedError:  # by all ranks alike; the resumed run evaluates
                stop, told = True, STOP
        if told != NOTHING:
            control.should_save = True
        if control.should_save:  # a resumed run's next line then is a mean over the same steps as the straight run's
            control.should_log = True
        if stop:
            self.stopped = control.should_training_stop = True
            self.stopped_at = time.monotonic()
            if self.story:
                self.story.append("notice", step=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Pass TRL's metrics on; the Trainer's summary at the end is not a step's."""
        if self.tracker and logs and "loss" in logs:
            metrics = {name: value for name, value in logs.items() if value is not None}
            self.tracker.log(state.global_step, metrics | (self.story.metrics() if self.story else {}))

    def saved(self, saved: Saved) -> None:
        """A checkpoint is complete; called on rank 0, in the thread that wrote it."""
        seconds = {"seconds": saved.seconds, "step_seconds": self.step_seconds}
        if self.story:
            self.story.append("saved", step=saved.step, bytes=saved.bytes, stall=saved.stall, **seconds)
        if self.grace:
            self.grace.measured(bytes=saved.bytes, **seconds)

    def _due(self, state: TrainerState) -> bool:
        step = state.global_step
        return 0 < step < state.max_steps and step % self.eval_steps == 0

    def _evaluated(self, step: int) -> bool:
        return self.tracker is None or self.tracker.evaluated(step)

    def _evaluate(self, state: TrainerState) -> None:
        metrics = self.evaluate()
        if self.tracker:
            self.tracker.log_held_out(state.global_step, metrics)
