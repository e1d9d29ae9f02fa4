"""`train.micro_batch_tokens: auto`: the largest forward and backward pass that fits the device, tried before training.

Batches of the run's longest rows, each of twice the tokens, are computed while the next one can be expected to fit. The
answer is kept beside the checkpoints: a restart on such machines cuts its batches alike, and so computes the same.
Where a step runs out of memory all the same, it becomes half of it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entrypoint import host
from entrypoint.data.groups import Groups
from entrypoint.errors import NoRoomError, TooLargeError
from entrypoint.storage import note, write_atomically
from entrypoint.training.batches import Cost, StepSampler
from entrypoint.world import World

FILE = "micro_batch_tokens.json"
FIRST = 2048  # tokens that are taken to fit anywhere
STEPS = 100  # of the first epoch, looked at for the most that a rank has to compute in a step
ROOM = 0.85  # of the free memory; the rest is for what the allocator can't use and for what the loss adds
GROWTH = 1.2  # attention grows faster than its tokens do
WAITING = 12  # bytes a trained parameter: AdamW's moments, and the gradient that waits for the next micro-batch


@dataclass(frozen=True)
class Budget:
    """Tokens of a micro-batch, the same on every rank, and where the next start finds them.

    Attributes:
        setting: what they depend on.
        lasting: the next start finds what is written beside the checkpoints: without checkpoint.mirror.
    """

    tokens: int
    path: Path
    setting: dict[str, Any]
    lasting: bool = True

    def lower(self, tokens: int, why: str) -> TooLargeError:
        """Have the next start take `tokens`, and say so; on any number of ranks, alike.

        Raises:
            OSError: it can't be written down: the next start would end as this one.
        """
        said = f"train.micro_batch_tokens=auto: {why}"
        if not self.lasting:
            return NoRoomError(
                f"{said}; the next start may not find checkpoint.path as it is, for which checkpoint.mirror is there: "
                f"write train.micro_batch_tokens={tokens}"
            )
        write_atomically(self.path, _content(self.setting, tokens, finished=True))
        return TooLargeError(f"{said}; start the same command again, it takes {tokens:,}")


def out_of_memory(sampler: StepSampler, budget: Budget | None) -> TooLargeError:
    """What a step that ran out of memory ends with; a budget that was found is lowered first.

    Args:
        budget: None where the user has given it, or where it is not found yet.
    """
    tokens, least = sampler.budget, _uncut(sampler)
    if tokens <= least:
        return NoRoomError(
            f"train.max_length: a step ran out of memory, and a smaller train.micro_batch_tokens than {tokens:,} would "
            f"not help, since what is computed together has up to {least:,}; lower train.max_length, give the run more "
            "devices (train.sharding=fsdp), or train an adapter (model.lora.enabled=true)"
        )
    if budget is None:
        return NoRoomError(
            f"train.micro_batch_tokens: a step ran out of memory with {tokens} tokens a forward pass; write a smaller "
            f"number, {least} or more, or auto"
        )
    return budget.lower(max(tokens // 2, least), f"a step ran out of memory with {tokens:,} tokens a forward pass")


def _uncut(sampler: StepSampler) -> int:
    """The most tokens that a forward pass has under the smallest of budgets: of a response, or a pair."""
    units, cost = sampler.units, sampler.cost
    together = units.responses.reshape(-1, units.atom)
    rows, prompts = cost.row[together], cost.prompt[together[:, 0]]
    tokens = rows.sum(axis=1) - (units.atom - 1) * prompts if cost.shared else units.atom * rows.max(axis=1)
    return int(tokens.max())


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
    broke_off: bool = False,
    lasting: bool = True,
) -> Budget:
    """The most tokens of a micro-batch that fit.

    Args:
        compute: forward and backward over some responses; leaves no gradient behind.
        parameters: trained ones that this rank holds.
        collective: the ranks meet within `compute`, as they do under FSDP.
        folder: where the answer is kept.
        setting: what else it depends on.
        broke_off: the start before crashed (on rank 0): if it was searching, what had fitted until then is the answer.
            After a notice the search begins anew.
        lasting: the next start finds the folder as it is.

    Raises:
        TooLargeError: a collective `compute` ran out of memory here. The others may stand anywhere in it, so nothing
            can be agreed on any more; the next start takes what has fitted, if it finds it.
        OSError: and that can't be written down.
    """
    most = max(max(loads) for loads in map(sampler.loads, sampler.steps(0)[:STEPS]))
    machine = {"device": _name(device), "memory": _total(device), "ranks": world.size, "ranks_here": host.ranks_here()}
    own = setting | machine | {"shared": sampler.cost.shared, "most": most}
    setting = world.once(lambda: own)
    known: int | None = world.once(lambda: _read(folder / FILE, setting, broke_off=broke_off))
    if known is not None:
        world.say(f"train.micro_batch_tokens=auto: {known:,} tokens a forward pass, as found before")
        return Budget(known, folder / FILE, setting, lasting)
    best = size = FIRST
    _write(world, folder, setting, best, finished=False)
    tokens = used = slope = 0.0  # of the last batch: tokens, share of the free memory, share a token
    while size < most and used + GROWTH * slope * (2 * size - tokens) <= ROOM:
        size = min(2 * size, most)
        batch = _longest(sampler.cost, groups, size)
        computed = sampler.cost.of(batch)
        try:
            need, free = _measured(partial(compute, batch), device)
        except torch.OutOfMemoryError as error:
            if collective:
                why = f"a forward pass over {computed:,} tokens ran out of memory"
                raise Budget(best, folder / FILE, setting, lasting).lower(best, why) from error
            need, free = math.inf, 1.0
        # The fullest rank decides for all, and before any of them is too full.
        share = world.most((need + WAITING * parameters) / max(free, 1.0))
        if share <= ROOM:
            best = size
            _write(world, folder, setting, best, finished=False)
        slope = max(slope, (share - used) / max(computed - tokens, 1.0))
        tokens, used = computed, share
    _write(world, folder, setting, best, finished=True)
    world.say(f"train.micro_batch_tokens=auto: {best:,} tokens a forward pass; a rank's steps have up to {most:,}")
    return Budget(best, folder / FILE, setting, lasting)


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
    resident, available = host.proc_bytes("self/status", "VmRSS"), host.available()
    work()
    return host.proc_bytes("self/status", "VmHWM") - resident, available / host.ranks_here()


def _give_back() -> None:
    """Return to the system what the process has freed: resident all the same, it would hide what a batch needs."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _total(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host.total()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores"


def _write(world: World, folder: Path, setting: dict[str, Any], tokens: int, *, finished: bool) -> None:
    if world.is_main:
        note(folder / FILE, _content(setting, tokens, finished=finished), world.warn)


def _content(setting: dict[str, Any], tokens: int, *, finished: bool) -> bytes:
    return json.dumps({**setting, "tokens": tokens, "finished": finished}).encode()


def _read(path: Path, setting: dict[str, Any], *, broke_off: bool) -> int | None:
    try:
        said = json.loads(path.read_text())
        tokens: int = said.pop("tokens")
        finished: bool = said.pop("finished")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or damaged: it is found again
        return None
    return tokens if said == json.loads(json.dumps(setting)) and (finished or broke_off) else None
