"""A run's state as named tensors: weights, optimiser and random numbers, alike on any number of ranks.

The order of the data needs no state: it is a function of the seed and the step.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

RNG = "rng"


def get_state(model: nn.Module, optimizer: Any, *, rank: int) -> dict[str, Any]:
    """The state as it is: its tensors are the model's own, not copies. A collective under FSDP."""
    weights, moments = get_state_dict(model, _bare(optimizer), options=_options(model))
    return {"model": weights, "optimizer": moments, RNG: {str(rank): _random()}}


def own_share(state: dict[str, Any], *, rank: int, size: int) -> dict[str, Any]:
    """The state without those whole tensors that another rank saves: each is one rank's, to equal bytes.

    Without sharding every rank holds all of it, and a copy on each of a node's would be many times the checkpoint.
    """
    named = dict(_whole((), {name: part for name, part in state.items() if name != RNG}))
    loads, others = [0] * size, set()
    for name, tensor in sorted(named.items(), key=lambda item: -item[1].nbytes):  # stable: alike on all ranks
        owner = loads.index(min(loads))
        loads[owner] += tensor.nbytes
        if owner != rank:
            others.add(name)
    return _without(state, (), others)


def get_place(model: nn.Module, optimizer: Any, *, rank: int, saved: Container[str]) -> dict[str, Any]:
    """Where a checkpoint that holds the names `saved` is read into; a rank that it knows nothing of keeps its own RNG.

    Nothing in training is random today but what a model brings along (a router's jitter): on another number of ranks
    such a model draws other numbers.
    """
    state = get_state(model, optimizer, rank=rank)
    state[RNG][str(rank)] = {
        name: value for name, value in state[RNG][str(rank)].items() if f"{RNG}.{rank}.{name}" in saved
    }
    return state


def set_state(state: dict[str, Any], model: nn.Module, optimizer: Any, *, rank: int) -> None:
    """Put what was read into the model and its optimiser."""
    set_state_dict(
        model,
        _bare(optimizer),
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(model),
    )
    random = state[RNG][str(rank)]
    if "cpu" in random:
        torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def _whole(path: tuple[str, ...], tree: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _whole((*path, key), value)
        elif isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
            yield (*path, key), value


def _without(tree: dict[str, Any], path: tuple[str, ...], names: set[tuple[str, ...]]) -> dict[str, Any]:
    kept = {key: value for key, value in tree.items() if (*path, key) not in names}
    return {
        key: _without(value, (*path, key), names) if isinstance(value, dict) else value for key, value in kept.items()
    }


def _random() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _options(model: nn.Module) -> StateDictOptions:
    # With an adapter the frozen base is not part of the run's state: it is read from model.path again.
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)


def _bare(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
