"""Trainers as a run builds them, for tests that look inside: without the launcher, over groups made on the spot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entrypoint.checkpoint import Checkpoints
from entrypoint.conf import Checkpoint, Dpo, DpoTrain, Grpo, GrpoTrain, Lora, Model, Run
from entrypoint.data.groups import Groups
from entrypoint.session import Session
from entrypoint.training.batches import Cost
from entrypoint.training.build import Plan, build_trainer, plan
from entrypoint.training.reference import ReferenceLogProbs
from entrypoint.training.scoring import Scorer
from entrypoint.world import World

ALONE = World(rank=0, size=1, store=None)


def make_run(method: Grpo | Dpo, folder: Path, *, lora: bool = False, save_every: int = 4, **train: Any) -> Run:
    """A run of few, large steps in fp32."""
    settings = {"batch_size": 5, "learning_rate": 1e-3, "max_steps": 8, "logging_steps": 1, "micro_batch_tokens": 300}
    kind = GrpoTrain if isinstance(method, Grpo) else DpoTrain
    return Run(
        method=method,
        model=Model(path="", lora=Lora(enabled=lora, rank=4)),
        train=kind(**(settings | train)),
        checkpoint=Checkpoint(path=str(folder), save_every=save_every),
    )


def make_trainer(
    run: Run, tiny: Path, groups: Groups, *, world: World = ALONE, reference: ReferenceLogProbs | None = None
) -> tuple[Any, Plan]:
    """A fed trainer; its reference log-probs are the model's own, computed before the first step, or those given.

    With micro_batch_tokens=auto it looks for its budget first, as a session does.
    """
    folder = Path(str(run.checkpoint.path))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    steps = plan(run, groups, world)
    known = reference or ReferenceLogProbs(folder / "reference")
    trainer: Any
    trainer, rows = build_trainer(run, model, tokenizer, groups, known, steps=steps.steps, callbacks=[], warn=print)
    steps.sampler.cost = Cost(groups, shared=trainer.shared is not None)

    checkpoints = Checkpoints(folder, keep=5, fingerprint={"run": "test"}, world=world)
    loaded = SimpleNamespace(traces=SimpleNamespace(train=groups), checkpoints=checkpoints, fingerprint={})
    session: Any = SimpleNamespace(
        run=run, loaded=loaded, world=world, trainer=trainer, plan=steps, pad=0, story=None, budget=None
    )

    def before(prepared: Any) -> None:
        if run.train.micro_batch_tokens == "auto":
            Session._find_budget(session, prepared)
        if reference is None:
            forward = trainer.accelerator.unwrap_model(prepared)
            scoring = scorer(forward, budget=steps.sampler.budget, world=world, shared=steps.sampler.cost.shared)
            known.compute(scoring, groups, steps.sampler.visited(steps.steps))

    trainer.feed(
        steps.sampler,
        rows,
        checkpoints=checkpoints,
        before_first_step=before,
        too_large=lambda: Session.too_large(session),
    )
    return trainer, steps


def scorer(forward: Any, *, budget: int, world: World = ALONE, shared: bool = False) -> Scorer:
    """`forward` as it scores on the CPU."""
    return Scorer(forward, pad=0, shared=shared, budget=budget, device=torch.device("cpu"), world=world)


class GivenReference(dict[int, Any]):
    """Reference log-probs made up by a test, by flat response index."""
