"""Grace: what a notice to stop can cost, told in one line, with a warning where the save does not fit into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

STATE = 12  # bytes a trained parameter has in a checkpoint: fp32, with Adam's two moments
GIGA = 1e9


class Grace:
    """Tells what a notice can cost as soon as it is known; on rank 0.

    Args:
        seconds: from the notice to the end of the process.
        interval: between two checkpoints, in words.
        known: an earlier save: bytes, seconds, step_seconds; None: there was none.
        say: takes a line.
        warn: takes a warning.
    """

    def __init__(
        self,
        seconds: float,
        *,
        interval: str,
        known: Mapping[str, Any] | None,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._seconds, self._interval, self._known, self._say, self._warn = seconds, interval, known, say, warn
        self._told = False

    def begin(self, model: nn.Module) -> None:
        """Before the first step: from an earlier start's figures, else from the model's size alone."""
        if self._known:
            self.measured(**{name: self._known[name] for name in ("bytes", "seconds", "step_seconds")})
            return
        size = STATE * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self._say(
            f"a notice to stop leaves {self._seconds:g} s: a checkpoint of {size / GIGA:.3g} GB needs "
            f"{size / GIGA / self._seconds:.2g} GB/s; measured at the first save"
        )

    def measured(self, *, bytes: int, seconds: float, step_seconds: float) -> None:
        """Say it once: a step, and a save of so many bytes, in seconds."""
        if self._told:
            return
        self._told = True
        gigabytes, left = bytes / GIGA, self._seconds - step_seconds
        size = f"{gigabytes:.3g} GB at {gigabytes / max(seconds, 1e-9):.2g} GB/s"
        if seconds <= left:
            self._say(
                f"a notice to stop costs no more than the step under way ({step_seconds:.1f} s): it is finished and "
                f"saved ({seconds:.1f} s, {size}) within the {self._seconds:g} s that there are"
            )
            return
        need = f"{gigabytes / left:.2g} GB/s are needed" if left > 0 else "no disk is fast enough"
        self._warn(
            f"checkpoint.grace_seconds={self._seconds:g} is less than a step ({step_seconds:.1f} s) and a save "
            f"({seconds:.1f} s, {size}) take; {need}. A notice costs up to the interval between two checkpoints "
            f"({self._interval}), as a crash does"
        )
