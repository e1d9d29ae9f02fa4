"""The configuration: one dataclass a group, each number's one home.

`Run` is what a run file composes to. Hydra finds the groups under these names:

    base                 the whole run; a mounted run file names it in its defaults list
    method: grpo | dpo   one word selects the loss and, through `train: ${method}`, the numbers that differ with it
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from entrypoint.conf.checkpoint import Checkpoint
from entrypoint.conf.data import Data
from entrypoint.conf.method import Dpo, Grpo
from entrypoint.conf.model import Lora, Model
from entrypoint.conf.output import Output
from entrypoint.conf.tracking import Tracking
from entrypoint.conf.train import DpoTrain, GrpoTrain, Train

__all__ = ["METHODS", "Checkpoint", "Data", "Dpo", "Grpo", "Lora", "Model", "Output", "Run", "Tracking", "Train"]

METHODS: dict[str, tuple[type, type[Train]]] = {"grpo": (Grpo, GrpoTrain), "dpo": (Dpo, DpoTrain)}


@dataclass
class Run:
    """One run, composed and checked."""

    method: Any = None  # Grpo or Dpo: chosen by the group
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Any = None  # GrpoTrain or DpoTrain: follows the method
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    output: Output = field(default_factory=Output)
    tracking: Tracking = field(default_factory=Tracking)


@dataclass
class Base(Run):
    """`Run` with the defaults list, read top-down."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"method": "grpo"}, {"train": "${method}"}])


def register() -> None:
    """Put the groups into Hydra's store."""
    store = ConfigStore.instance()
    store.store(name="base", node=Base)
    for name, (method, train) in METHODS.items():
        store.store(group="method", name=name, node=method)
        store.store(group="train", name=name, node=train)
