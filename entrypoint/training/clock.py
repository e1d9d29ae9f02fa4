"""Where a step's time goes, and how many tokens it computes in it."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from transformers import PreTrainedConfig
from trl.trainer.utils import compute_flops_per_token, compute_mfu, get_peak_flops

from entrypoint.training.batches import Step

STEP = ("data", "forward", "backward", "optimizer")  # the phases of a step; the others stand beside it


class Clock:
    """Phases that follow each other: `enter` ends the last one.

    On CUDA a phase's ends are events in the stream, so that no phase waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def enter(self, phase: str) -> None:
        """`phase` begins now."""
        self._marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading; the phase that runs goes on."""
        if not self._marks:
            return {}
        self.enter(self._marks[-1][0])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        spent: dict[str, float] = defaultdict(float)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            spent[phase] += begin.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - begin
        self._marks = self._marks[-1:]
        return spent

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def throughput(
    spent: dict[str, float], steps: list[Step], config: PreTrainedConfig, *, bf16: bool, world_size: int
) -> dict[str, float]:
    """Metrics of some steps: tokens, their rate, and the share of each phase in the time.

    tokens/stock: what trainers compute that pad a step's rows to the longest, each with its own prompt.
    tokens/padding: share of the computed tokens that is no distinct token: padding, and prompts that are not shared.
    tokens/imbalance: the most loaded rank's tokens over the mean rank's.
    speed/mfu: share of the devices' peak, for distinct tokens (TRL's count of operations); on CUDA alone.
    """
    count = len(steps)
    distinct, computed = sum(step.distinct for step in steps), sum(step.computed for step in steps)
    seconds, total = sum(spent.get(phase, 0.0) for phase in STEP), sum(spent.values())
    found = {
        "tokens/distinct": distinct / count,
        "tokens/stock": sum(step.stock for step in steps) / count,
        "tokens/padding": 1 - distinct / computed,
        "tokens/imbalance": sum(step.imbalance for step in steps) / count,
        "speed/distinct_tokens_per_second": distinct / seconds,
        **{f"time/{phase}": share / total for phase, share in spent.items()},
    }
    peak = _peak(bf16)
    if peak:
        try:
            operations = compute_flops_per_token(config, round(sum(step.length for step in steps) / count))
        except AttributeError:  # an architecture whose configuration TRL can't count by
            return found
        found["speed/mfu"] = compute_mfu(operations, distinct / seconds, world_size, peak) / 100
    return found


def _peak(bf16: bool) -> float | None:
    """The device's operations a second; None where TRL doesn't know it."""
    if not torch.cuda.is_available():
        return None
    found: float | None = get_peak_flops(torch.cuda.get_device_name(), "bfloat16" if bf16 else "float32")
    return found
