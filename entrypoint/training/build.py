"""From the configuration to a trainer: arguments, adapter, rows, sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import DPOConfig, GRPOConfig

from entrypoint.conf import Checkpoint, Data, Dpo, Grpo, Lora, Run, Train
from entrypoint.data.groups import Groups
from entrypoint.data.pairs import no_pair, pairs_of
from entrypoint.errors import ConfigError
from entrypoint.sharing.forward import SharedPrompts
from entrypoint.sharing.support import unsupported
from entrypoint.training import memory
from entrypoint.training.batches import StepSampler, Units, group_units, pair_units
from entrypoint.training.dpo import DpoRows, LoggedDpo
from entrypoint.training.grpo import GrpoRows, LoggedGrpo
from entrypoint.training.reference import ReferenceLogProbs
from entrypoint.training.whole_batch import Rows, WholeBatch
from entrypoint.world import World

GRPO_PLACE = 2  # TRL wants a generation batch of whole groups; nothing is generated, so the smallest that it takes


@dataclass(frozen=True)
class Plan:
    """What a run will do: its sampler and the number of optimiser steps."""

    sampler: StepSampler
    steps: int
    groups_without_pair: int

    @property
    def epochs(self) -> float:
        return self.steps / len(self.sampler)


def plan(run: Run, groups: Groups, world: World) -> Plan:
    """Cut the training groups into steps.

    Raises:
        DataError: no group makes a pair (DPO).
    """
    units, without = _units(run.method, run.data, groups)
    if not len(units):
        raise no_pair(len(groups), run.data)
    train: Train = run.train
    sampler = StepSampler(
        groups,
        units,
        batch_size=train.batch_size,
        seed=train.seed,
        budget=train.micro_batch_tokens if isinstance(train.micro_batch_tokens, int) else memory.FIRST,
        rank=world.rank,
        world_size=world.size,
    )
    return Plan(sampler, train.max_steps or math.ceil(train.num_epochs * len(sampler)), without)


def _units(method: Grpo | Dpo, data: Data, groups: Groups) -> tuple[Units, int]:
    if isinstance(method, Grpo):
        return group_units(groups), 0
    pairs = pairs_of(
        groups,
        chosen_threshold=data.chosen_threshold,
        rejected_threshold=data.rejected_threshold,
        pairing=method.pairing,
        pairs_per_prompt=method.pairs_per_prompt,
    )
    return pair_units(groups, pairs), pairs.groups_without


def build_trainer(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    groups: Groups,
    reference: ReferenceLogProbs,
    *,
    steps: int,
    callbacks: list[TrainerCallback],
    warn: Callable[[str], None],
) -> tuple[WholeBatch, Rows]:
    """The method's trainer, not yet fed, and the rows it is to be fed with.

    Raises:
        ConfigError: train.sharding=fsdp where weights can't be sharded; train.share_prompts=always where prompts
            can't be shared.
    """
    pad = pad_id(tokenizer)
    common = {
        "model": model,
        "train_dataset": groups.dataset,
        "processing_class": tokenizer,
        "callbacks": callbacks,
        "peft_config": adapter(run.model.lora) if run.model.lora.enabled else None,
    }
    arguments = training_arguments(run.train, run.checkpoint, steps=steps)
    arguments["use_cache"] = model.config.use_cache  # else the Trainer writes false into the final model's config
    trainer: LoggedGrpo | LoggedDpo
    rows: Rows
    if isinstance(run.method, Grpo):
        grpo = grpo_arguments(run.method, run.train, arguments)
        grpo._n_gpu = 1  # a lone rank that sees several devices would become nn.DataParallel
        trainer = LoggedGrpo(run.method, args=grpo, **common)
        rows = GrpoRows(groups, reference, pad=pad, world_size=trainer.accelerator.num_processes)
    else:
        dpo = dpo_arguments(run.method, arguments)
        dpo._n_gpu = 1
        trainer = LoggedDpo(args=dpo, **common)
        rows = DpoRows(groups, reference, pad=pad)
    _no_attention_dropout(trainer.model)
    trainer.remove_callback(PrinterCallback)  # the tracker writes the log
    trainer.shared = share_prompts(run.train.share_prompts, trainer, warn)
    if arguments["fsdp"]:
        _shard_exactly(trainer, bf16=arguments["bf16"])
    return trainer, rows


def _no_attention_dropout(model: Any) -> None:
    """TRL's `disable_dropout` knows modules; attention has it as a number."""
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def share_prompts(wish: str, trainer: WholeBatch, warn: Callable[[str], None]) -> SharedPrompts | None:
    """Lay shared prompts over the trainer's model, below DDP, FSDP and an adapter; None where they are not used."""
    if wish == "never":
        return None
    model: Any = trainer.model  # type: ignore[attr-defined]
    peft_config = getattr(model, "active_peft_config", None)
    bare = model.get_base_model() if peft_config else model
    why = unsupported(bare, peft_config)
    if why is None:
        return SharedPrompts(bare)
    if wish == "always":
        raise ConfigError(f"train.share_prompts: always, but prompts can't be shared in this model: {why}; write auto")
    warn(f"prompts are not shared: {why}")
    return None


def _shard_exactly(trainer: LoggedGrpo | LoggedDpo, *, bf16: bool) -> None:
    """Sharding computes what one device computes: bf16 in the layers, fp32 in what they give and in the gradient.

    accelerate's own policy rounds every output to bf16 (a sum of 200 log-probs was off by 2.5 nats) and adds the ranks'
    gradients in bf16.
    """
    accelerator = trainer.accelerator
    if accelerator.distributed_type != DistributedType.FSDP:  # accelerate would train unsharded, without a word
        raise ConfigError("train.sharding: fsdp needs more than one rank, each on a CUDA device; write auto or none")
    if bf16:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def grpo_arguments(method: Grpo, train: Train, arguments: dict[str, Any]) -> GRPOConfig:
    """TRL's arguments for GRPO."""
    return GRPOConfig(
        **arguments,
        per_device_train_batch_size=GRPO_PLACE,
        num_generations=GRPO_PLACE,
        epsilon=method.clip_range,
        loss_type=method.loss_type,
        max_completion_length=train.max_length,  # dr_grpo's constant
        disable_dropout=True,
    )


def dpo_arguments(method: Dpo, arguments: dict[str, Any]) -> DPOConfig:
    """TRL's arguments for DPO."""
    return DPOConfig(
        **arguments,
        per_device_train_batch_size=1,
        beta=method.beta,
        loss_type=[method.loss_type],
        label_smoothing=method.label_smoothing,
        max_length=None,  # rows that are too long were dropped
        disable_dropout=True,
    )


def training_arguments(train: Train, checkpoint: Checkpoint, *, steps: int) -> dict[str, Any]:
    """What both trainers' arguments share."""
    cuda = torch.cuda.is_available()
    sharded = train.sharding == "fsdp" or (train.sharding == "auto" and cuda and _world_size() > 1)
    return {
        "output_dir": str(checkpoint.path),
        "max_steps": steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler,
        "warmup_steps": math.ceil(train.warmup_ratio * steps),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "seed": train.seed,
        "bf16": compute_dtype(train) == "bf16",
        "activation_checkpointing": train.gradient_checkpointing == "always"
        or (train.gradient_checkpointing == "auto" and cuda),
        "use_cpu": not cuda,
        "fsdp": sharded,
        "fsdp_config": {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"} if sharded else None,
        "ddp_timeout": train.collective_timeout,
        # A forward that syncs buffers would be a collective, and ranks evaluate unequal numbers of rows.
        "ddp_broadcast_buffers": False,
        "ddp_find_unused_parameters": False,
        "logging_steps": train.logging_steps,
        "logging_nan_inf_filter": False,  # a NaN is shown, not smoothed over
        "save_strategy": "steps",  # the last step is saved too
        # By minutes rank 0's clock says when: see `Course`.
        "save_steps": checkpoint.save_every if isinstance(checkpoint.save_every, int) else steps,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def compute_dtype(train: Train) -> str:
    """The dtype of the forward pass: what `precision: auto` means on this machine."""
    if train.precision != "auto":
        return train.precision
    return "bf16" if torch.cuda.is_available() else "fp32"


def adapter(lora: Lora) -> Any:
    """A LoRA adapter on all linear layers; at its start the model computes what the base computes."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills a row; masked everywhere, so any will do."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad)


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
