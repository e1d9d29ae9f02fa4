"""`train`: the optimisation; what differs between the methods stands in the two small classes at the end."""

from __future__ import annotations

from dataclasses import dataclass

from entrypoint.conf.key import key


@dataclass
class Train:
    batch_size: int = key(32, "Groups (GRPO) or pairs (DPO) of one optimiser step, over all ranks.", minimum=1)
    learning_rate: float = key(1e-5, "Peak learning rate of AdamW.", above=0.0, below=1.0)
    max_steps: int | None = key(None, "Optimiser steps; wins over num_epochs.", minimum=1)
    num_epochs: float = key(1.0, "Passes over the training groups, where max_steps is null.", above=0.0)
    max_length: int = key(
        4096, "Prompt and response together, in tokens; longer rows are dropped, never cut.", minimum=2
    )
    precision: str = key(
        "auto",
        "Compute dtype; weights and optimiser state are fp32 everywhere. auto: bf16 on CUDA, fp32 on CPU.",
        choices=("auto", "bf16", "fp32"),
    )
    sharding: str = key(
        "auto", "auto: FSDP2 on more than one CUDA device, else none.", choices=("auto", "none", "fsdp")
    )
    gradient_checkpointing: str = key(
        "auto",
        "Recompute activations in the backward pass: less memory, about a third more time. auto: on CUDA.",
        choices=("auto", "always", "never"),
    )
    share_prompts: str = key(
        "auto",
        "Compute a prompt once for all of its responses in a forward pass: less time and memory, the same numbers. "
        "auto: where the model allows it and a check at the start agrees; always: else end with 64.",
        choices=("auto", "always", "never"),
    )
    micro_batch_tokens: int | str = key(
        "auto",
        "Tokens that one forward pass on one rank computes: memory, never the maths. auto: the most that fit the "
        "device, tried before the first step.",
        minimum=1,
        word="auto",
    )
    logging_steps: int = key(10, "Steps between two lines of metrics, each their mean.", minimum=1)
    eval_steps: int = key(100, "Steps between two held-out evaluations; one before and one after always.", minimum=1)
    eval_pairs: int = key(256, "At most this many held-out pairs are evaluated.", minimum=1)
    seed: int = key(42, "Seed of the order of groups and of a LoRA adapter's start.", minimum=0, maximum=2**32 - 1)
    weight_decay: float = key(0.0, "Decoupled weight decay of AdamW.", minimum=0.0, maximum=1.0)
    warmup_ratio: float = key(
        0.0, "Share of the steps in which the learning rate rises from 0.", minimum=0.0, below=1.0
    )
    lr_scheduler: str = key(
        "linear", "Learning rate after the warm-up.", choices=("linear", "cosine", "constant", "constant_with_warmup")
    )
    max_grad_norm: float = key(1.0, "Norm to which a step's gradient is clipped.", above=0.0)
    collective_timeout: int = key(1800, "Seconds after which ranks that wait for a lost one leave.", minimum=1)


@dataclass
class GrpoTrain(Train):
    max_steps: int | None = key(1000, "Optimiser steps; wins over num_epochs.", minimum=1)


@dataclass
class DpoTrain(Train):
    learning_rate: float = key(5e-7, "Peak learning rate of AdamW.", above=0.0, below=1.0)
