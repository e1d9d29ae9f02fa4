"""`Session`: a built run; what is measured of the policy before, during and after its steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torch.distributed.tensor import DTensor

from entrypoint.conf import Grpo, Run
from entrypoint.data.groups import Float32, Groups, Int64
from entrypoint.errors import ConfigError, TooLargeError
from entrypoint.load import Loaded
from entrypoint.sharing.check import settle
from entrypoint.storage import note
from entrypoint.story import Story
from entrypoint.tracking.tracker import Tracker
from entrypoint.training.batches import Cost
from entrypoint.training.build import Plan, compute_dtype
from entrypoint.training.course import Course
from entrypoint.training.evaluation import HeldOut, evaluate
from entrypoint.training.memory import Budget, find_budget, out_of_memory
from entrypoint.training.reference import ReferenceLogProbs
from entrypoint.training.scoring import Scorer, inputs, sequences
from entrypoint.watch import SHORTLY
from entrypoint.world import World

CHECKED = 3  # responses to one prompt that are computed both ways at the start
BEFORE = "before.json"  # the base model's metrics: a restart need not measure them again


@dataclass
class Session:
    """The trainer with all that surrounds it; `before` and `after` are held-out metrics, empty without pairs."""

    run: Run
    loaded: Loaded
    world: World
    trainer: Any
    plan: Plan
    held: HeldOut
    reference: ReferenceLogProbs
    held_reference: ReferenceLogProbs
    course: Course
    tracker: Tracker | None  # on rank 0
    story: Story | None  # on rank 0
    pad: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    budget: Budget | None = None  # of a micro-batch, where it was found
    evaluated: tuple[int, dict[str, float]] = (-1, {})  # the step that was evaluated last

    def measure_base(self, model: nn.Module) -> None:
        """While the prepared model still is the base: the reference's log-probs, and the metrics before.

        A restart finds both on disk.
        """
        self._share_prompts(model)
        if self.run.train.micro_batch_tokens == "auto":
            self._find_budget(model)
        self.world.watch.patience = SHORTLY  # a stop is agreed between two forward passes, and what is scored is kept
        train, needed = self.loaded.traces.train, self.plan.sampler.visited(self.plan.steps)
        for reference, groups, responses in (
            (self.reference, train, needed),
            (self.held_reference, self.held.groups, self.held.responses),
        ):
            self._fill(reference, groups, responses, model)
        known = self.world.once(self._read_before)
        self.before = known if known is not None else self.evaluate(model)
        if self.world.is_main and known is None:
            said = {**self._judged(), "metrics": self.before}
            note(self.loaded.checkpoints.folder / BEFORE, json.dumps(said).encode(), self.world.warn)
        if self.tracker:
            self.tracker.log_held_out(0, self.before)

    def evaluate(self, model: nn.Module | None = None) -> dict[str, float]:
        """Held-out metrics of the policy as it is; empty where nothing is held out. All ranks come together."""
        if not len(self.held):
            return {}
        method = self.run.method
        # GRPO's KL weight stands where DPO's beta does: reward = beta log(policy / reference).
        beta = (method.kl_coeff or 1.0) if isinstance(method, Grpo) else method.beta
        with self._scoring(self.trainer.model_wrapped if model is None else model, self.world) as scorer:
            metrics = evaluate(scorer, self.held, self.held_reference, beta=beta)
        if model is None:
            self.evaluated = (self.trainer.state.global_step, metrics)
        return metrics

    def best(self) -> float | None:
        """Held-out accuracy, what the best checkpoint is the best in; None where this step was not evaluated."""
        step, metrics = self.evaluated
        return metrics["accuracy"] if step == self.trainer.state.global_step else None

    def too_large(self) -> TooLargeError:
        """What a step that ran out of memory ends with; the next start takes smaller micro-batches where it may."""
        return out_of_memory(self.plan.sampler, self.budget)

    def _share_prompts(self, model: nn.Module) -> None:
        """Check on a group of the first step that sharing its prompt changes nothing; else compute it plainly.

        Raises:
            ConfigError: train.share_prompts=always, and it does.
        """
        sampler, groups = self.plan.sampler, self.loaded.traces.train
        if self.trainer.shared is None:
            return
        group = int(sampler.units.group[sampler.steps(0)[0][0]])
        sampler.cost = Cost(groups, shared=True)
        few = np.arange(groups.offsets[group], groups.offsets[group + 1])[:CHECKED]

        def score() -> Float32:
            # Every rank scores the same: under FSDP a forward is a collective.
            with self._scoring(
                model, World(rank=0, size=1, store=None), budget=int(sampler.cost.row[few].sum())
            ) as all_:
                return np.concatenate([values for _, values in all_.log_probs(groups, few)])

        train = self.run.train
        why = settle(self.trainer.shared, score, dtype=compute_dtype(train), worst=self.world.most)
        if why is None:
            return
        sampler.cost = Cost(groups, shared=False)
        if train.share_prompts == "always":
            raise ConfigError(f"train.share_prompts: always, but it fails the check: {why}; write auto")
        self.world.warn(f"prompts are not shared: {why}")

    def _find_budget(self, model: nn.Module) -> None:
        """Micro-batches as large as the device takes."""
        groups, device = self.loaded.traces.train, self.trainer.args.device
        bare = self.trainer.accelerator.unwrap_model(model)
        trained = [p for p in bare.parameters() if p.requires_grad]

        def compute(responses: list[int]) -> None:
            bare.train()  # activations are recomputed in training alone
            try:
                with self.trainer.accelerator.autocast():
                    out = bare(**inputs(sequences(groups, np.array(responses)), self.pad, device))
                out.log_probs.sum().backward()
            finally:
                bare.zero_grad(set_to_none=True)

        self.budget = find_budget(
            compute,
            self.plan.sampler,
            groups,
            parameters=sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in trained),
            device=device,
            world=self.world,
            collective=self.trainer.is_fsdp_enabled,
            folder=self.loaded.checkpoints.folder,
            broke_off=self.story is not None and self.story.broke_off(),
            lasting=self.run.checkpoint.mirror is None,
            setting={
                "fingerprint": self.loaded.fingerprint,
                "precision": compute_dtype(self.run.train),
                "sharding": self.run.train.sharding,
                "gradient_checkpointing": self.run.train.gradient_checkpointing,
            },
        )
        self.plan.sampler.budget = self.budget.tokens

    def _fill(self, reference: ReferenceLogProbs, groups: Groups, responses: Int64, model: nn.Module) -> None:
        with self._scoring(model, self.world) as scorer:
            computed = reference.compute(scorer, groups, responses)
        self.world.say(f"reference log-probs of {len(responses):,} responses, {computed:,} of them computed now")

    @contextmanager
    def _scoring(self, model: nn.Module, world: World, budget: int | None = None) -> Iterator[Scorer]:
        """The model as it scores for `world`: in the run's precision, without DDP's collectives around it.

        Afterwards the model is in the mode that it was in: TRL files a step's metrics by it.
        """
        accelerator = self.trainer.accelerator
        bare = accelerator.unwrap_model(model)
        training = bare.training

        def forward(**inputs: Any) -> Any:
            with accelerator.autocast():
                return bare(**inputs)

        bare.eval()
        try:
            yield Scorer(
                forward,
                pad=self.pad,
                shared=self.plan.sampler.cost.shared,
                budget=budget or self.plan.sampler.budget,
                device=self.trainer.args.device,
                world=world,
            )
        finally:
            bare.train(training)

    def _read_before(self) -> dict[str, float] | None:
        try:
            said = json.loads((self.loaded.checkpoints.folder / BEFORE).read_text())
            metrics: dict[str, float] = said.pop("metrics")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or damaged: measured again
            return None
        return metrics if said == self._judged() else None

    def _judged(self) -> dict[str, Any]:
        """What the metrics before are of: another run's, or of other pairs, are not this run's."""
        return {"fingerprint": self.loaded.fingerprint, "pairs": len(self.held)}
