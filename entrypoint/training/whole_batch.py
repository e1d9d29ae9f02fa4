"""`WholeBatch`: laid over a TRL trainer, one dataloader item is one optimiser step, whatever the number of ranks.

TRL normalises by what one forward call holds. A step here is cut into micro-batches by a token budget and dealt to
ranks by length, so each call's loss is weighted by its share of the whole batch, and so is each metric.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from entrypoint.checkpoint import Checkpoints
from entrypoint.errors import DivergedError, TooLargeError
from entrypoint.sharing.forward import SharedPrompts
from entrypoint.training.batches import MicroBatch, Step, StepSampler
from entrypoint.training.clock import Clock, throughput

Micro = dict[str, Any]  # tensors of one forward call; under "weights" its sequences and tokens, under "step" its `Step`


class WholeBatch:
    """Mixin over `GRPOTrainer` and `DPOTrainer`; `feed` must be called before `train`.

    Attributes:
        shared: what lets the model compute a prompt once for all of its responses, where that is used.
    """

    shared: SharedPrompts | None = None

    def feed(
        self: Any,
        sampler: StepSampler,
        rows: Dataset[Micro],
        *,
        checkpoints: Checkpoints,
        before_first_step: Callable[[nn.Module], None],
        too_large: Callable[[], TooLargeError],
        best: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Where the steps come from.

        Args:
            sampler: gives this rank's micro-batches of each step.
            rows: collates a `MicroBatch`.
            checkpoints: saves and restores the run's state.
            before_first_step: called with the prepared model while it still is the base model.
            too_large: called where the device has no memory for a step; gives what the run ends with.
            best: how good the policy is, where it was evaluated at the present step.
        """
        self._sampler = sampler
        self._rows = rows
        self._checkpoints = checkpoints
        self._before_first_step = before_first_step
        self._too_large = too_large
        self._best = best
        self._sums: dict[str, tuple[float, float]] = {}  # metric of this step: weighted sum, weight
        self._steps: list[Step] = []  # since the last line of metrics
        self._clock = Clock(self.args.device)
        self.add_callback(_AfterOptimizer(self._clock, self._reserve))

    # The step ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One item is a list of micro-batches; never given to accelerate, which would shard it once more."""
        return DataLoader(self._rows, batch_sampler=self._sampler, collate_fn=list)

    def training_step(self: Any, model: nn.Module, inputs: list[Micro], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of all micro-batches of a step; gradients meet at the last.

        Under FSDP they meet at each: deferring would keep a whole unsharded gradient on every rank.
        """
        total = torch.zeros((), device=self.args.device)
        steps = [micro.pop("step") for micro in inputs]  # the same in all of them
        self._steps.append(steps[0])
        for i, micro in enumerate(inputs):
            last = i == len(inputs) - 1
            with nullcontext() if last or self.is_fsdp_enabled else self.accelerator.no_sync(model=model):
                total += super().training_step(model, micro, None)  # type: ignore[misc]
        self._clock.enter("optimizer")
        self._merge_metrics()
        return total

    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; a step's time begins here."""
        self._clock.enter("data")
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self: Any, model: nn.Module, inputs: Micro, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """TRL's loss of one micro-batch, times its share of the whole step.

        The ranks' gradients are averaged afterwards, by DDP as by FSDP: `num_processes` undoes it.
        """
        self._clock.enter("forward")
        weights = inputs.pop("weights")
        outer, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        with self._local_metrics(), self.accelerator.autocast():  # as the reference is scored; TRL's DPO has none
            loss = super().compute_loss(model, inputs)  # type: ignore[misc]
        found, self._metrics["train"] = self._metrics["train"], outer
        found |= self.own_metrics()
        found.pop("num_tokens", None)  # TRL's running count of this rank alone
        for name, values in found.items():
            self._collect(name, float(values[0]), float(self.metric_weight(name, weights)))
        self._clock.enter("backward")
        whole: torch.Tensor = loss * (self.loss_share(weights) * self.accelerator.num_processes)
        return whole

    def loss_share(self, weights: dict[str, float]) -> float:
        """This micro-batch's part of the step, in what the loss is a mean over."""
        raise NotImplementedError

    def metric_weight(self, name: str, weights: dict[str, float]) -> float:
        """How much a metric of one micro-batch counts: what it is a mean over."""
        raise NotImplementedError

    def own_metrics(self) -> dict[str, list[float]]:
        """Metrics beside TRL's, of the micro-batch just computed."""
        return {}

    def check_step(self, metrics: dict[str, float]) -> None:
        """Raise DivergedError where a step's whole-batch metrics say so."""

    # Metrics of the whole batch --------------------------------------------------------------------------------------

    @contextmanager
    def _local_metrics(self: Any) -> Iterator[None]:
        """TRL gathers its metrics over the ranks inside the loss: with unequal rows that aborts or lies.

        While it runs, each rank sees itself alone; `_merge_metrics` weights and sums once a step.
        """
        own = self.accelerator
        own.gather = own.gather_for_metrics = own.reduce = lambda tensor, *args, **kwargs: tensor
        try:
            yield
        finally:
            del own.gather, own.gather_for_metrics, own.reduce  # the class's own methods again

    def _collect(self, name: str, value: float, weight: float) -> None:
        """Add a micro-batch's metric to the step's; a place holder's weighs nothing."""
        if weight == 0:
            value = 0.0
        sign = self.extremes().get(name)
        if sign is None:
            total, seen = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + value * weight, seen + weight)
        elif weight > 0:
            self._sums[name] = (max(sign * value, self._sums.get(name, (-math.inf, 0.0))[0]), 0.0)

    def _merge_metrics(self: Any) -> None:
        """The step's metrics over all ranks, into TRL's own store, once a step."""
        extremes = self.extremes()
        means = sorted(set(self._sums) - set(extremes))
        device = self.args.device
        sums = torch.tensor([self._sums[name] for name in means], dtype=torch.float64, device=device)
        # A rank without rows has seen no extreme: the names must come from the loss, not from what was seen.
        tops = torch.tensor(
            [self._sums.get(name, (-math.inf, 0.0))[0] for name in extremes], dtype=torch.float64, device=device
        )
        if self.accelerator.num_processes > 1:
            dist.all_reduce(sums)
            dist.all_reduce(tops, op=dist.ReduceOp.MAX)
        merged = {name: total / seen if seen else 0.0 for name, (total, seen) in zip(means, sums.tolist(), strict=True)}
        merged |= {name: extremes[name] * top for name, top in zip(extremes, tops.tolist(), strict=True)}
        self._sums = {}
        self._metrics["train"].pop("step_time", None)  # TRL's own, of one micro-batch
        for name, value in merged.items():
            self._metrics["train"][name].append(value)
        self.check_step(merged)

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, with the throughput of the steps since the last line."""
        if self._steps:
            accelerator = self.accelerator
            logs |= throughput(
                self._clock.read(),
                self._steps,
                accelerator.unwrap_model(self.model).config.get_text_config(),
                bf16=self.args.bf16,
                world_size=accelerator.num_processes,
            )
            self._steps = []
        super().log(logs, start_time)  # type: ignore[misc]

    def extremes(self) -> dict[str, int]:
        """Metrics that are the batch's greatest (1) or least (-1) value, not a mean; alike on every rank."""
        return {}

    def _clip_grad_norm(self: Any, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        if not math.isfinite(float(norm)):
            raise DivergedError(
                f"step {self.state.global_step + 1}: the gradient's norm is {float(norm)}, expected a finite number; "
                "lower train.learning_rate, or look for damaged weights in model.path"
            )
        return norm

    # Start and resume ------------------------------------------------------------------------------------------------

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's.

        Raises:
            TooLargeError: on a rank that ran out of memory; the others may be in any collective, and hear of it.
        """
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        except torch.OutOfMemoryError as error:
            raise self._too_large() from error

    def _prepare_for_training(self: Any, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """After wrapping, the model still is the base: the moment for the reference pass. Then the checkpoint."""
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        self._before_first_step(model)
        if resume_from_checkpoint is not None:
            self._checkpoints.load(resume_from_checkpoint, model, self.optimizer, self.lr_scheduler)
        return model, loader

    def _run_epoch(self: Any, **kwargs: Any) -> None:
        """An epoch, unless a resumed run has no step left to do."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)  # type: ignore[misc]

    def _save_checkpoint(self: Any, model: nn.Module, trial: Any) -> None:
        self._clock.enter("checkpoint")
        self._checkpoints.save(model, self.optimizer, self.lr_scheduler, self.state, best=self._best())
        self._clock.enter("other")

    def _reserve(self: Any) -> None:
        """After the first step: then the optimiser has moments."""
        self._clock.enter("checkpoint")
        self._checkpoints.reserve(self.model_wrapped, self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing before wrapping: see `_prepare_for_training`."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing of TRL's: `Checkpoints.load` has it."""


class _AfterOptimizer(TrainerCallback):
    """What comes between two steps is none of them; after this start's first one, `first` is called."""

    def __init__(self, clock: Clock, first: Callable[[], None]) -> None:
        self.clock = clock
        self.first: Callable[[], None] | None = first

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        first, self.first = self.first, None
        if first:
            first()
        self.clock.enter("other")


class Rows(Dataset[Micro]):
    """Collates micro-batches; an index is a whole `MicroBatch`."""

    def __getitem__(self, micro: MicroBatch) -> Micro:
        raise NotImplementedError
