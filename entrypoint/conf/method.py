"""`method`: GRPO or DPO, and the numbers of its loss."""

from __future__ import annotations

from dataclasses import dataclass

from entrypoint.conf.key import key

PAIRINGS = ("ranked", "all", "best_worst")


@dataclass
class Grpo:
    """GRPO over logged groups (arXiv 2402.03300); TRL's GRPOTrainer holds the losses."""

    name: str = key("grpo", "The method's name.", choices=("grpo",))
    kl_coeff: float = key(0.1, "Weight of the KL penalty to the reference policy (beta in the paper).", minimum=0.0)
    clip_range: float = key(
        0.2,
        "Clip range of the ratio to the behaviour policy (epsilon in the paper), below 1; for cispo the ratio's upper "
        "limit itself.",
        above=0.0,
    )
    loss_type: str = key(
        "grpo",
        "TRL's loss and normalisation; dr_grpo's constant is train.max_length.",
        choices=("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    )
    max_kl: float = key(
        10.0, "The run stops as diverged when a step's mean KL, in nats a token, is above this.", above=0.0
    )
    max_clip_fraction: float = key(
        0.95,
        "The run stops as diverged when more than this share of a step's tokens is clipped.",
        above=0.0,
        maximum=1.0,
    )
    max_ratio: float = key(
        100.0, "The run stops as diverged when a step's mean ratio to the behaviour policy is above this.", above=1.0
    )


@dataclass
class Dpo:
    """DPO over pairs of logged responses (arXiv 2305.18290); TRL's DPOTrainer holds the losses."""

    name: str = key("dpo", "The method's name.", choices=("dpo",))
    beta: float = key(0.1, "Strength of the pull to the reference policy.", above=0.0)
    loss_type: str = key(
        "sigmoid",
        "TRL's loss.",
        choices=(
            "sigmoid",
            "hinge",
            "ipo",
            "exo_pair",
            "nca_pair",
            "robust",
            "bco_pair",
            "sppo_hard",
            "apo_zero",
            "apo_down",
            "discopop",
            "sigmoid_norm",
        ),
    )
    label_smoothing: float = key(
        0.0, "Assumed share of wrong labels; `robust` and `exo_pair` use it, exo_pair needs it.", minimum=0.0, below=0.5
    )
    pairing: str = key(
        "ranked",
        "How chosen and rejected meet within a prompt: `ranked` (i-th best with i-th worst), `all`, `best_worst`.",
        choices=PAIRINGS,
    )
    pairs_per_prompt: int = key(4, "At most this many pairs of one prompt.", minimum=1)
