"""`Session`: a built run; what is measured of the policy before, during and after its steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from entrypoint.conf import Grpo, Run
from entrypoint.data.groups import Groups, Int64
from entrypoint.load import Loaded
from entrypoint.storage import write_atomically
from entrypoint.tracking.tracker import Tracker
from entrypoint.training.build import Plan
from entrypoint.training.course import Course
from entrypoint.training.evaluation import HeldOut, evaluate
from entrypoint.training.reference import ReferenceLogProbs
from entrypoint.training.scoring import Forward
from entrypoint.world import World

BEFORE = "before.json"  # the base model's metrics: a resumed run can't measure them again


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
    pad: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def measure_base(self, model: nn.Module) -> None:
        """While the prepared model still is the base: the reference's log-probs, and the metrics before.

        A restart finds both on disk.
        """
        train, needed = self.loaded.traces.train, self.plan.sampler.visited(self.plan.steps)
        for reference, groups, responses in (
            (self.reference, train, needed),
            (self.held_reference, self.held.groups, self.held.responses),
        ):
            self._fill(reference, groups, responses, model)
        known = self.world.once(self._read_before)
        self.before = known if known is not None else self.evaluate(model)
        if self.world.is_main and known is None:
            path = self.loaded.checkpoints.folder / BEFORE
            said = {**self._judged(), "metrics": self.before}
            write_atomically(path, json.dumps(said).encode())
        if self.tracker:
            self.tracker.log(0, {f"held_out/{name}": value for name, value in self.before.items()})

    def evaluate(self, model: nn.Module | None = None) -> dict[str, float]:
        """Held-out metrics of the policy as it is; empty where nothing is held out. All ranks come together."""
        if not len(self.held):
            return {}
        method = self.run.method
        with self._scoring(self.trainer.model_wrapped if model is None else model) as forward:
            return evaluate(
                forward,
                self.held,
                self.held_reference,
                # GRPO's KL weight stands where DPO's beta does: reward = beta log(policy / reference).
                beta=(method.kl_coeff or 1.0) if isinstance(method, Grpo) else method.beta,
                pad=self.pad,
                budget=self.run.train.micro_batch_tokens,
                device=self.trainer.args.device,
                world=self.world,
            )

    def _fill(self, reference: ReferenceLogProbs, groups: Groups, responses: Int64, model: nn.Module) -> None:
        with self._scoring(model) as forward:
            computed = reference.compute(
                forward,
                groups,
                responses,
                pad=self.pad,
                budget=self.run.train.micro_batch_tokens,
                device=self.trainer.args.device,
                world=self.world,
            )
        self.world.say(f"reference log-probs of {len(responses):,} responses, {computed:,} of them computed now")

    @contextmanager
    def _scoring(self, model: nn.Module) -> Iterator[Forward]:
        """The model's forward for scoring: in the run's precision, without DDP's collectives around it.

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
            yield forward
        finally:
            bare.train(training)

    def _read_before(self) -> dict[str, float] | None:
        path = self.loaded.checkpoints.folder / BEFORE
        if not path.exists():
            return None
        said = json.loads(path.read_text())
        metrics: dict[str, float] = said.pop("metrics")
        return metrics if said == self._judged() else None

    def _judged(self) -> dict[str, Any]:
        """What the metrics before are of: another run's, or of other pairs, are not this run's."""
        return {"fingerprint": self.loaded.fingerprint, "pairs": len(self.held)}
