"""The configuration: one dataclass a group, each number's one home.

`Run` is what a run file composes to. Hydra finds the groups under these names:

    base                 the whole run; a mounted run file names it in its defaults list
    method: grpo | dpo   one word selects the loss and, through `train: ${method}`, the numbers that differ with it
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hydra.core.config_store import ConfigStore

from entrypoint.conf.checkpoint import Checkpoint
from entrypoint.conf.data import Data
from entrypoint.conf.key import key
from entrypoint.conf.method import Dpo, Grpo
from entrypoint.conf.model import Lora, Model
from entrypoint.conf.output import Output
from entrypoint.conf.tracking import Tracking
from entrypoint.conf.train import DpoTrain, GrpoTrain, Train

__all__ = [
    "METHODS",
    "Checkpoint",
    "Data",
    "Dpo",
    "DpoTrain",
    "Grpo",
    "GrpoTrain",
    "Lora",
    "Model",
    "Output",
    "Run",
    "Tracking",
    "Train",
]

METHODS: dict[str, tuple[type, type[Train]]] = {"grpo": (Grpo, GrpoTrain), "dpo": (Dpo, DpoTrain)}
DEFAULTS = ["_self_", {"method": "grpo"}, {"train": "${method}"}]  # read top-down


@dataclass
class Run:
    """One run, composed and checked."""

    method: Any = key(Grpo, "GRPO or DPO, and the numbers of its loss.")  # Grpo or Dpo: chosen by the group
    data: Data = key(Data, "Where the labelled traces are and which of their rows count.")
    model: Model = key(Model, "The base model and, where wanted, the adapter that is trained instead of it.")
    train: Train = key(GrpoTrain, "The optimisation.")  # GrpoTrain or DpoTrain: follows the method
    checkpoint: Checkpoint = key(Checkpoint, "What is kept of a run that is not done.")
    output: Output = key(Output, "The hand-off to the eval gate.")
    tracking: Tracking = key(Tracking, "Where metrics go beside metrics.jsonl and TensorBoard.")


def register() -> None:
    """Put the groups into Hydra's store.

    As plain values, without their types: OmegaConf's types would turn a reward column `true` into 'True', a consent
    of 2 into true, and a bad number into "Error merging override". `entrypoint.config.read` types the composed tree
    by these dataclasses, exactly and with a better sentence.
    """
    store = ConfigStore.instance()
    rest = {name: value for name, value in asdict(Run()).items() if name not in ("method", "train")}
    store.store(name="base", node={"defaults": DEFAULTS, **rest})
    for name, (method, train) in METHODS.items():
        store.store(group="method", name=name, node=asdict(method()))
        store.store(group="train", name=name, node=asdict(train()))
