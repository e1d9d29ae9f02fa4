"""The two sides of `bench_step`: our trainers and TRL's own, given the same sequences, one optimiser step at a time."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from entrypoint.conf import Dpo, Grpo
from entrypoint.data.groups import Groups, Int64
from entrypoint.training.batches import Units
from entrypoint.training.scoring import Scorer, sequences
from tests.trainers.builders import ALONE, GivenReference, make_run, make_trainer

LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Shape:
    """A step over `groups` prompts with `size` responses each, lengths in tokens.

    bar: the speed-up that is wanted; None: reported only.
    apart: of each group one response alone, so that nothing is shared.
    """

    method: str
    prompt: int
    response: int
    size: int
    bar: float | None = None
    groups: int = 2
    apart: bool = False

    @property
    def name(self) -> str:
        size = "nothing shared" if self.apart else f"G={self.size}"
        return f"{self.method.upper()}, {self.prompt} : {self.response}, {size}"

    @property
    def rows(self) -> int:
        return self.groups if self.apart else self.groups * self.size

    @property
    def context(self) -> int:
        return self.prompt + self.response

    def settings(self) -> Grpo | Dpo:
        return Grpo() if self.method == "grpo" else Dpo()

    def batch(self, vocabulary: int) -> tuple[Groups, Int64]:
        """Groups of random tokens, and the flat indices of the responses that the step computes.

        Rewards fall from 1 to 0 in equal steps. Apart, a group's best response and the next one's worst take turns:
        the advantages are those of TRL's groups of two rows, whatever their prompts.
        """
        random = np.random.default_rng(0)

        def ids(*shape: int) -> Any:
            return random.integers(3, vocabulary, shape).tolist()

        rewards = np.linspace(1, 0, self.size).tolist()
        rows = [
            {"prompt_ids": ids(self.prompt), "response_ids": ids(self.size, self.response), "rewards": rewards}
            for _ in range(self.groups)
        ]
        each = self.size * np.arange(self.groups)
        return Groups.from_lists(rows), each + np.arange(self.groups) % 2 if self.apart else np.arange(self.rows)


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Side:
    """A trainer whose optimiser steps are made one by one, so that two sides can take turns."""

    def __init__(self, trainer: Any) -> None:
        if trainer.args.activation_checkpointing:  # what `train` does before its first step
            trainer.model.activation_checkpointing_enable()
        trainer.create_optimizer()
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.trainer = trainer
        # A step of nothing moves no weight, and leaves the optimiser's state allocated before a clock runs.
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer.optimizer.step()
        self.model.zero_grad()

    def gradient(self) -> None:
        """Reference, forward, backward: the step's gradient lies in the parameters afterwards."""
        raise NotImplementedError

    def step(self) -> float:
        """A whole optimiser step; returns its seconds."""
        began = now()
        self.gradient()
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.trainer.optimizer.step()
        self.model.zero_grad()
        return now() - began


class Ours(Side):
    """Our trainer as a run builds it; the reference is scored anew each step, for that step's responses.

    A forward call computes the whole step, or one group of it (`group_a_call`).
    """

    def __init__(self, shape: Shape, model: Path, scratch: str, *, group_a_call: bool, checkpointing: bool) -> None:
        self.groups, self.responses = shape.batch(AutoConfig.from_pretrained(model).vocab_size)
        tokens = shape.prompt + shape.size * shape.response
        train: dict[str, Any] = {
            "batch_size": shape.groups,
            "learning_rate": LEARNING_RATE,
            "share_prompts": "always",
            "gradient_checkpointing": "always" if checkpointing else "never",
            "micro_batch_tokens": tokens if group_a_call else tokens * shape.groups,
        }
        run = make_run(shape.settings(), Path(scratch), **train)
        reference: Any = GivenReference.fromkeys(self.responses.tolist())
        trainer, plan = make_trainer(run, model, self.groups, reference=reference)
        super().__init__(trainer)
        trainer.current_gradient_accumulation_steps = 1
        if shape.apart:
            one = np.arange(shape.groups + 1)
            plan.sampler.units = Units(one[:-1], self.responses, one, atom=1)
        self.micro_batches = next(iter(plan.sampler))
        self.cost = plan.sampler.cost
        self.scorer = Scorer(
            self.model,
            pad=0,
            shared=self.cost.shared,
            budget=plan.sampler.budget,
            device=trainer.args.device,
            world=ALONE,
        )
        self.reference = reference
        self.policy_seconds = 0.0

    def gradient(self) -> None:
        self.model.eval()
        self.reference.update(self.scorer.log_probs(self.groups, self.responses))
        began = now()
        rows = self.trainer._rows
        self.trainer.training_step(self.model, [rows[micro] for micro in self.micro_batches])
        self.policy_seconds = now() - began  # forward and backward alone


def stock_arguments(shape: Shape, rows: int, scratch: str, *, checkpointing: bool) -> dict[str, Any]:
    """What both stock trainers' arguments share; `rows`: of a forward call (DPO: pairs)."""
    units = shape.groups if shape.method == "dpo" else shape.rows
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": units // rows,
        "learning_rate": LEARNING_RATE,
        "activation_checkpointing": checkpointing,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "disable_dropout": True,
        "report_to": "none",
    }


class StockGrpo(Side):
    """`GRPOTrainer`: `training_step` rolls out, scores with its reference model, and computes the loss."""

    def __init__(self, shape: Shape, model: Path, scratch: str, *, rows: int, checkpointing: bool) -> None:
        groups, responses = shape.batch(AutoConfig.from_pretrained(model).vocab_size)
        pairs = sequences(groups, responses)
        logged = {
            "prompt_ids": [prompt.tolist() for prompt, _ in pairs],
            "completion_ids": [response.tolist() for _, response in pairs],
            "logprobs": None,
            "logged_reward": groups.rewards[responses].tolist(),
        }
        method = Grpo()
        args = GRPOConfig(
            **stock_arguments(shape, rows, scratch, checkpointing=checkpointing),
            num_generations=shape.size,
            beta=method.kl_coeff,
            epsilon=method.clip_range,
            loss_type=method.loss_type,
        )
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=lambda logged_reward, **_: logged_reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            processing_class=AutoTokenizer.from_pretrained(model),
            rollout_func=lambda prompts, trainer: dict(logged),
        )
        super().__init__(trainer)
        trainer.current_gradient_accumulation_steps = self.calls = shape.rows // rows
        self.rows = shape.rows

    def gradient(self) -> None:
        prompts = [{"prompt": ""} for _ in range(self.rows)]
        for _ in range(self.calls):  # the first rolls out and scores for all
            self.trainer.training_step(self.model, prompts, None)


class StockDpo(Side):
    """`DPOTrainer` with precomputed reference log-probs, which its own method computes once for each pair."""

    def __init__(self, shape: Shape, model: Path, scratch: str, *, rows: int, checkpointing: bool) -> None:
        groups, _ = shape.batch(AutoConfig.from_pretrained(model).vocab_size)
        self.pairs = [
            {
                "prompt_ids": group.prompt_ids.tolist(),
                "chosen_ids": group.response_ids[0].tolist(),
                "rejected_ids": group.response_ids[-1].tolist(),
            }
            for group in groups
        ]
        method = Dpo()
        args = DPOConfig(
            **stock_arguments(shape, rows, scratch, checkpointing=checkpointing),
            beta=method.beta,
            loss_type=[method.loss_type],
            max_length=None,
            precompute_ref_log_probs=True,
        )
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        super().__init__(trainer)
        trainer.current_gradient_accumulation_steps = len(self.pairs) // rows
        self.rows = rows

    def gradient(self) -> None:
        for first in range(0, len(self.pairs), self.rows):
            batch = self.trainer.data_collator(self.pairs[first : first + self.rows])
            batch = {name: value.to(self.trainer.args.device) for name, value in batch.items()}
            chosen, rejected = self.trainer.compute_ref_log_probs(self.model, batch)
            batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            self.trainer.training_step(self.model, batch)


def stock(shape: Shape, model: Path, scratch: str, *, rows: int, checkpointing: bool = False) -> Side:
    side = StockGrpo if shape.method == "grpo" else StockDpo
    return side(shape, model, scratch, rows=rows, checkpointing=checkpointing)


def compact() -> AbstractContextManager[Any]:
    """Stock TRL's fused head scores labelled positions alone, as it does on CUDA; the kernel stays the CPU's."""
    return patch("trl.trainer.utils._use_triton", lambda device: True)
