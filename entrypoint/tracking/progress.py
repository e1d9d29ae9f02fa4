"""Progress: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TextIO

from tqdm import tqdm

HELD_OUT = "held_out/"
# What of a step's many metrics a line shows, and how it is called there.
SHOWN = {
    "loss": "loss",
    "kl": "kl",
    "clip_ratio/region_mean": "clip",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "grad_norm": "grad",
    "learning_rate": "lr",
    "speed/distinct_tokens_per_second": "tokens/s",
}


class Progress:
    """Shows how far a run is.

    Args:
        total: steps of the whole run.
        done: steps that are done at the start.
        stream: a terminal gets a bar, anything else lines.
    """

    def __init__(self, *, total: int, done: int, stream: TextIO | None = None) -> None:
        self._total, self._stream = total, stream or sys.stderr
        self._bar: Any = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", file=self._stream, dynamic_ncols=True)
        self._begin = self._last = (done, time.monotonic())

    def step(self, step: int) -> None:
        """A step has ended; the first call of all starts the clock (what came before were no steps)."""
        if step <= self._begin[0]:
            self._begin = self._last = (step, time.monotonic())
        elif self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step's metrics, or those of an evaluation (`held_out/…`)."""
        held_out = {name[len(HELD_OUT) :]: value for name, value in metrics.items() if name.startswith(HELD_OUT)}
        if held_out:
            self._write(f"step {step}/{self._total} held-out {_values(held_out)}")
            return
        shown = _values({SHOWN[name]: metrics[name] for name in SHOWN if name in metrics})
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self._write(f"step {step}/{self._total} {shown}{self._speed(step)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _speed(self, step: int) -> str:
        """Seconds a step since the last line, and what is left at the mean speed since the start."""
        now, (last, then), (first, begin) = time.monotonic(), self._last, self._begin
        self._last = (step, now)
        if step <= max(last, first):
            return ""
        left = timedelta(seconds=round((self._total - step) * (now - begin) / (step - first)))
        return f" {(now - then) / (step - last):.3g} s/step eta {left}"

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)


def _values(metrics: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in metrics.items())
