"""A run's state small enough to be saved often: one layer, its optimiser, its scheduler, the trainer's state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState

from entrypoint.checkpoint import Checkpoints
from entrypoint.world import World

ALONE = World(rank=0, size=1, store=None)
RUN = {"train.learning_rate": 1e-5, "train.seed": 42}


@dataclass
class State:
    """What a step changes."""

    model: nn.Linear
    optimizer: torch.optim.Optimizer
    scheduler: Any
    trainer: TrainerState

    @classmethod
    def fresh(cls, width: int = 64) -> State:
        torch.manual_seed(0)
        model = nn.Linear(width, width)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return cls(
            model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)), TrainerState()
        )

    def step(self) -> None:
        """One optimiser step whose data is random, as nothing in a run is."""
        self.optimizer.zero_grad()
        self.model(torch.randn(8, self.model.in_features)).square().sum().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.trainer.global_step += 1
        self.trainer.log_history.append({"step": self.trainer.global_step, "loss": 0.5})

    def steps(self, number: int) -> State:
        for _ in range(number):
            self.step()
        return self

    def save(self, checkpoints: Checkpoints, best: float | None = None) -> None:
        checkpoints.save(self.model, self.optimizer, self.scheduler, self.trainer, best=best)

    def load(self, checkpoints: Checkpoints, path: Path) -> State:
        checkpoints.load(path, self.model, self.optimizer, self.scheduler)
        self.trainer = TrainerState.load_from_json(str(path / "trainer_state.json"))
        return self

    @property
    def weight(self) -> torch.Tensor:
        return next(self.model.parameters()).detach().clone()


def checkpoints(folder: Path, *, keep: int = 2, world: World = ALONE, **more: Any) -> Checkpoints:
    return Checkpoints(folder, keep=keep, fingerprint=RUN, world=world, **more)
