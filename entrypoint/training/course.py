"""What happens between two steps: a stop is agreed, the held-out pairs are evaluated, metrics are written down."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entrypoint.tracking.tracker import Tracker

NOTHING, SAVE, STOP = 0, 1, 2


class Signals:
    """The most that this process was told: SIGTERM and SIGINT say stop, SIGUSR1 says save and go on."""

    def __init__(self) -> None:
        self.told = NOTHING

    def listen(self) -> None:
        """Take the signals from now on; a second one changes nothing."""
        for number, meaning in ((signal.SIGTERM, STOP), (signal.SIGINT, STOP), (signal.SIGUSR1, SAVE)):
            signal.signal(number, self._take(meaning))

    def _take(self, meaning: int) -> Callable[[int, FrameType | None], None]:
        def handler(number: int, frame: FrameType | None) -> None:
            self.told = max(self.told, meaning)

        return handler

    def agreed(self, device: torch.device) -> int:
        """The most that any rank was told, the same on all; one all-reduce of one number."""
        told = self.told
        if dist.is_initialized():
            tensor = torch.tensor(told, device=device)
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            told = int(tensor)
        if told == SAVE:
            self.told = NOTHING
        return told


class Course(TrainerCallback):
    """Hooks of the Trainer's loop.

    Args:
        eval_steps: steps between two evaluations.
        tracker: takes metrics, on rank 0.

    `evaluate` must be set before training: the held-out metrics of the policy, by all ranks together.
    """

    evaluate: Callable[[], dict[str, float]]

    def __init__(self, *, eval_steps: int, tracker: Tracker | None) -> None:
        self.eval_steps = eval_steps
        self.tracker = tracker
        self.signals = Signals()
        self.stopped = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Signals ask for a save only where there is something to save."""
        self.signals.listen()
        state.compute_steps(
            args, state.max_steps
        )  # a resumed state brings the former run's save_every and logging_steps
        if self.tracker:
            self.tracker.step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Agree on a stop; evaluate, but not where the final evaluation follows at once."""
        if self.tracker:
            self.tracker.step(state.global_step)
        told = self.signals.agreed(args.device)
        if told:
            control.should_save = True
        if control.should_save:  # a resumed run's next line then is a mean over the same steps as the straight run's
            control.should_log = True
        if told == STOP and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            return
        if state.global_step % self.eval_steps == 0 and state.global_step < state.max_steps:
            metrics = {f"held_out/{name}": value for name, value in self.evaluate().items()}
            if self.tracker:
                self.tracker.log(state.global_step, metrics)

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
            self.tracker.log(state.global_step, {name: value for name, value in logs.items() if value is not None})
