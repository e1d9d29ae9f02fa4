"""`train.micro_batch_tokens: auto`: the largest forward and backward pass that fits the device, tried before training.

Batches of the run's longest rows, each of twice the tokens, are computed while the next one can be expected to fit. The
answer is kept beside the checkpoints: a restart on such machines cuts its batches alike, and so computes the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from entrypoint.data.groups import Groups
from entrypoint.storage import write_atomically
from entrypoint.training.batches import Cost, StepSampler
from entrypoint.world import World

FILE = "micro_batch_tokens.json"
FIRST = 2048  # tokens that are taken to fit anywhere
STEPS = 100  # of the first epoch, looked at for the most that a rank has to compute in a step
ROOM = 0.85  # of the free memory; the rest is for what the allocator can't use and for what the loss adds
GROWTH = 1.2  # attention grows faster than its tokens do
MOMENTS = 8  # bytes that AdamW adds for a trained parameter


def find_budget(
    compute: Callable[[list[int]], None],
    sampler: StepSampler,
    groups: Groups,
    *,
    parameters: int,
    device: torch.device,
    world: World,
    folder: Path,
) -> int:
    """Tokens of a micro-batch, the same on every rank.

    Args:
        compute: forward and backward over some responses; leaves no gradient behind.
        parameters: trained ones that this rank holds.
        folder: where the answer is kept.
    """
    most = max(max(loads) for loads in map(sampler.loads, sampler.steps(0)[:STEPS]))
    setting = {"device": _name(device), "ranks": world.size, "shared": sampler.cost.shared, "most": most}
    known: int | None = world.once(lambda: _read(folder / FILE, setting))
    if known is not None:
        return known
    best = size = FIRST
    used = last = 0.0  # shares of the free memory
    while size < most and used + 2 * GROWTH * (used - last) <= ROOM:
        size, last = min(2 * size, most), used
        need, free = _measured(lambda: compute(_longest(sampler.cost, groups, size)), device)  # noqa: B023
        # The fullest rank decides for all, and before any of them is too full: a rank that fails leaves the others
        # waiting in a collective.
        used = world.most((need + MOMENTS * parameters) / free)
        best = size if used <= ROOM else best
    if world.is_main:
        write_atomically(folder / FILE, json.dumps({**setting, "tokens": best}).encode())
    world.say(f"train.micro_batch_tokens=auto: {best:,} tokens a forward pass; a rank's step has at most {most:,}")
    return best


def _longest(cost: Cost, groups: Groups, tokens: int) -> list[int]:
    """Responses of about so many tokens in all, from the groups with the longest rows."""
    longest = np.maximum.reduceat(cost.row, groups.offsets[:-1])
    found: list[int] = []
    for group in np.argsort(-longest, kind="stable"):
        for response in range(groups.offsets[group], groups.offsets[group + 1]):
            if found and cost.of([*found, response]) > tokens:
                return found
            found.append(response)
    return found


def _measured(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Bytes that `work` needs beyond what is there, and those that are free before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before
        work()
        return torch.cuda.max_memory_allocated(device) - before, free
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    resident, available = _status("VmRSS"), _available()
    work()
    return _status("VmHWM") - resident, available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _status(name: str) -> int:
    """Bytes that this process's status names so."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _available() -> int:
    """Bytes that this machine, or this container where it has less, can still give."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    found = int(lines["MemAvailable"].split()[0]) * 1024
    limit, current = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and (bound := limit.read_text().strip()) != "max":
        found = min(found, int(bound) - int(current.read_text()))
    return found


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores"


def _read(path: Path, setting: dict[str, object]) -> int | None:
    if not path.exists():
        return None
    said = json.loads(path.read_text())
    tokens: int = said.pop("tokens")
    return tokens if said == setting else None
