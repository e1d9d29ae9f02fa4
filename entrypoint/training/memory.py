"""`train.micro_batch_tokens: auto`: the largest forward and backward pass that fits the device, tried before training.

Batches of the run's longest rows, each of twice the tokens, are computed while the next one can be expected to fit. The
answer is kept beside the checkpoints: a restart on such machines cuts its batches alike, and so computes the same.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entrypoint.data.groups import Groups
from entrypoint.storage import note
from entrypoint.training.batches import Cost, StepSampler
from entrypoint.world import World

FILE = "micro_batch_tokens.json"
FIRST = 2048  # tokens that are taken to fit anywhere
STEPS = 100  # of the first epoch, looked at for the most that a rank has to compute in a step
ROOM = 0.85  # of the free memory; the rest is for what the allocator can't use and for what the loss adds
GROWTH = 1.2  # attention grows faster than its tokens do
INFINITE = 2**63
MOMENTS = 8  # bytes that AdamW adds for a trained parameter


def find_budget(
    compute: Callable[[list[int]], None],
    sampler: StepSampler,
    groups: Groups,
    *,
    parameters: int,
    device: torch.device,
    world: World,
    collective: bool,
    folder: Path,
    setting: dict[str, Any],
) -> int:
    """Tokens of a micro-batch, the same on every rank.

    Args:
        compute: forward and backward over some responses; leaves no gradient behind.
        parameters: trained ones that this rank holds.
        collective: the ranks meet within `compute`, as they do under FSDP.
        folder: where the answer is kept.
        setting: what else it depends on.

    Raises:
        MemoryError: a collective `compute` ran out of memory here. The others may stand anywhere in it, so nothing can
            be agreed on any more; the next start takes what has fitted.
    """
    most = max(max(loads) for loads in map(sampler.loads, sampler.steps(0)[:STEPS]))
    machine = {"device": _name(device), "memory": _total(device), "ranks": world.size, "ranks_here": _ranks_here()}
    setting = setting | machine | {"shared": sampler.cost.shared, "most": most}
    known: int | None = world.once(lambda: _read(folder / FILE, setting))
    if known is not None:
        world.say(f"train.micro_batch_tokens=auto: {known:,} tokens a forward pass, as found before")
        return known
    best = size = FIRST
    _write(world, folder, setting, best)  # what a run that this ends starts again with
    tokens = used = slope = 0.0  # of the last batch: tokens, share of the free memory, share a token
    while size < most and used + GROWTH * slope * (2 * size - tokens) <= ROOM:
        size = min(2 * size, most)
        batch = _longest(sampler.cost, groups, size)
        computed = sampler.cost.of(batch)
        try:
            need, free = _measured(partial(compute, batch), device)
        except torch.OutOfMemoryError as error:
            if collective:
                raise MemoryError(
                    f"train.micro_batch_tokens=auto: a forward pass over {computed:,} tokens ran out of memory; "
                    f"the next start takes {best:,}"
                ) from error
            need, free = math.inf, 1.0
        # The fullest rank decides for all, and before any of them is too full.
        share = world.most((need + MOMENTS * parameters) / max(free, 1.0))
        if share <= ROOM:
            best = size
            _write(world, folder, setting, best)
        slope = max(slope, (share - used) / max(computed - tokens, 1.0))
        tokens, used = computed, share
    world.say(f"train.micro_batch_tokens=auto: {best:,} tokens a forward pass; a rank's steps have up to {most:,}")
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
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before, free = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
        work()
        return torch.cuda.max_memory_allocated(device) - before, free
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    except OSError:  # a sandbox without it: nothing larger than FIRST is known to fit
        return math.inf, 1.0
    resident, available = proc_bytes("self/status", "VmRSS"), _available()
    work()
    return proc_bytes("self/status", "VmHWM") - resident, available / _ranks_here()


def _give_back() -> None:
    """Return to the system what the process has freed: resident all the same, it would hide what a batch needs."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def proc_bytes(file: str, name: str) -> int:
    """Bytes of a line of a file in /proc, `name: … kB`."""
    lines = dict(line.split(":", 1) for line in Path("/proc", file).read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _available() -> int:
    """Bytes that this machine, or this container where it has less, can still give."""
    found = proc_bytes("meminfo", "MemAvailable")
    limit = _limit()
    if limit is None:
        return found
    # Pages of files that are only read, such as the model and the traces, are given back when they are needed.
    group = Path("/sys/fs/cgroup")
    cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines()).get("inactive_file", "0")
    return min(found, limit - int((group / "memory.current").read_text()) + int(cached))


def _total(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min(proc_bytes("meminfo", "MemTotal"), _limit() or INFINITE)


def _limit() -> int | None:
    """Bytes that this container may have (cgroup v2); None without a limit."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return None if text == "max" else int(text)


def _ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores"


def _write(world: World, folder: Path, setting: dict[str, Any], tokens: int) -> None:
    if world.is_main:
        note(folder / FILE, json.dumps({**setting, "tokens": tokens}).encode(), world.warn)


def _read(path: Path, setting: dict[str, Any]) -> int | None:
    try:
        said = json.loads(path.read_text())
        tokens: int = said.pop("tokens")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or damaged: it is found again
        return None
    return tokens if said == json.loads(json.dumps(setting)) else None
