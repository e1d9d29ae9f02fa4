"""TRL's stock trainers as oracle: the same sequences, one padded batch there, micro-batches here, the same gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from entrypoint.conf import Dpo, Grpo
from entrypoint.data.groups import Groups
from entrypoint.training.grpo import advantages
from tests.trainers.builders import GivenReference, make_run, make_trainer
from tests.trainers.sample_groups import EOS, ragged_groups

GRPO_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
DPO_LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm",
]  # fmt: skip
MAX_LENGTH = 64  # dr_grpo's constant


def live_reference(groups: Groups) -> Any:
    """Log-probs that are near the tiny model's but not its own: ratio, clip and KL all act."""
    rng = np.random.default_rng(7)
    return GivenReference(
        {r: (-5.7 + rng.normal(0, 0.3, n)).astype(np.float32) for r, n in enumerate(groups.response_lengths)}
    )


# Of a gradient, from sums in another order; discopop takes the sigmoid of a sum of log-probs over 0.05.
ROUNDING = {"discopop": 3e-5}


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()]).clone()


def ours(
    method: Grpo | Dpo, tiny: Path, folder: Path, groups: Groups, *, budget: int
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss, gradient and metrics of one whole step over all groups."""
    run = make_run(method, folder, batch_size=1000, max_steps=1, micro_batch_tokens=budget, max_length=MAX_LENGTH)
    trainer, plan = make_trainer(run, tiny, groups, reference=live_reference(groups))
    trainer.current_gradient_accumulation_steps = 1
    micros = [trainer._rows[micro] for micro in next(iter(plan.sampler))]
    assert len(micros) > 1 or budget > 5000
    trainer.check_step = lambda metrics: None  # made-up reference: far from the model
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, micros)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return float(loss), gradient(trainer.model), metrics


def stock_grpo(
    loss_type: str, tiny: Path, folder: Path, groups: Groups
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """`GRPOTrainer._compute_loss` on all responses in TRL's own layout: prompts padded left, responses right."""
    args = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=2, num_generations=2, loss_type=loss_type, epsilon=0.2,
        max_completion_length=MAX_LENGTH, gradient_checkpointing=False, use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    trainer = GRPOTrainer(
        model, reward_funcs=[lambda **_: []], args=args, train_dataset=groups.dataset,
        processing_class=AutoTokenizer.from_pretrained(tiny),
    )  # fmt: skip
    trainer.beta = 0.1
    trainer.current_gradient_accumulation_steps = 1
    reference = live_reference(groups)
    sequences = [(g.prompt_ids, r) for g in groups for r in g.response_ids]
    left, right = max(len(p) for p, _ in sequences), max(len(r) for _, r in sequences)
    shape = (len(sequences), right)
    batch = {
        "prompt_ids": torch.full((len(sequences), left), EOS), "prompt_mask": torch.zeros(len(sequences), left).long(),
        "completion_ids": torch.full(shape, EOS), "completion_mask": torch.zeros(shape).long(),
        "ref_per_token_logps": torch.zeros(shape), "old_per_token_logps": torch.zeros(shape),
    }  # fmt: skip
    for i, (prompt, response) in enumerate(sequences):
        batch["prompt_ids"][i, left - len(prompt) :] = torch.tensor(prompt)
        batch["prompt_mask"][i, left - len(prompt) :] = 1
        batch["completion_ids"][i, : len(response)] = torch.tensor(response)
        batch["completion_mask"][i, : len(response)] = 1
        batch["ref_per_token_logps"][i, : len(response)] = torch.tensor(reference[i])
        batch["old_per_token_logps"][i, : len(response)] = torch.tensor(reference[i])
    batch["advantages"] = torch.tensor(advantages(groups.rewards, groups.offsets))
    batch["num_items_in_batch"] = batch["completion_mask"].sum().float()
    model.train()
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    return float(loss), gradient(model), {k: v[0] for k, v in trainer._metrics["train"].items()}


def stock_dpo(method: Dpo, tiny: Path, folder: Path, groups: Groups) -> tuple[float, torch.Tensor, dict[str, float]]:
    """`DPOTrainer._compute_loss` on all pairs, through TRL's own collator."""
    args = DPOConfig(
        output_dir=str(folder), loss_type=[method.loss_type], beta=method.beta, max_length=None, use_cpu=True,
        bf16=False, label_smoothing=method.label_smoothing, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    from datasets import Dataset

    reference = live_reference(groups)
    rows = []
    for i, group in enumerate(groups):
        first = groups.offsets[i]
        last = len(group.rewards) - 1
        rows.append(
            {
                "prompt_ids": group.prompt_ids.tolist(),
                "chosen_ids": group.response_ids[0].tolist(),
                "rejected_ids": group.response_ids[last].tolist(),
                "ref_chosen_logps": float(reference[first].sum(dtype=np.float64)),
                "ref_rejected_logps": float(reference[first + last].sum(dtype=np.float64)),
            }
        )
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    trainer = DPOTrainer(model, args=args, train_dataset=text, processing_class=AutoTokenizer.from_pretrained(tiny))
    trainer.precompute_ref_logps = True
    model.train()
    loss = trainer._compute_loss(model, DataCollatorForPreference(pad_token_id=EOS)(rows), return_outputs=False)
    loss.backward()
    return float(loss), gradient(model), {k: v[0] for k, v in trainer._metrics["train"].items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("loss_type", GRPO_LOSSES)
def test_grpo_is_trls_loss_and_gradient(loss_type: str, tiny: Path, tmp_path: Path) -> None:
    groups = ragged_groups(8)
    loss, found, metrics = ours(Grpo(loss_type=loss_type), tiny, tmp_path, groups, budget=200)
    wanted_loss, wanted, wanted_metrics = stock_grpo(loss_type, tiny, tmp_path, groups)
    assert loss == pytest.approx(wanted_loss, abs=1e-6, rel=1e-6)
    assert relative(found, wanted) < ROUNDING.get(loss_type, 3e-6)
    for name in wanted_metrics:
        assert metrics[name] == pytest.approx(wanted_metrics[name], abs=1e-5, rel=1e-5), name
    if "clip_ratio/region_mean" in metrics:
        assert metrics["clip_ratio/region_mean"] > 0.05  # the clip acts


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_dpo_is_trls_loss_and_gradient(loss_type: str, tiny: Path, tmp_path: Path) -> None:
    groups = ragged_groups(12)
    smoothing = 0.1 if loss_type in {"exo_pair", "robust"} else 0.0
    method = Dpo(loss_type=loss_type, label_smoothing=smoothing, pairing="best_worst")
    loss, found, metrics = ours(method, tiny, tmp_path, groups, budget=150)
    wanted_loss, wanted, wanted_metrics = stock_dpo(method, tiny, tmp_path, groups)
    assert loss == pytest.approx(wanted_loss, abs=1e-6, rel=1e-6)
    assert relative(found, wanted) < ROUNDING.get(loss_type, 3e-6)
    for name in set(wanted_metrics) - {"num_tokens"}:
        assert metrics[name] == pytest.approx(wanted_metrics[name], abs=1e-5, rel=1e-4), name


def test_advantages_by_hand() -> None:
    # group 1: 0.9, 0.6, 0.3: mean 0.6, std (ddof 1) 0.3; group 2: 1, 0: mean 0.5, std sqrt(0.5)
    found = advantages(np.array([0.9, 0.6, 0.3, 1.0, 0.0]), np.array([0, 3, 5]))
    assert found == pytest.approx([0.3 / 0.3001, 0, -0.3 / 0.3001, 0.5 / 0.7072068, -0.5 / 0.7072068], abs=1e-6)
    assert found.dtype == np.float32


def test_recorded_log_probs_are_the_behaviour_policy_and_the_reference_fills_the_gaps(
    tiny: Path, tmp_path: Path
) -> None:
    groups = Groups.from_lists(
        [
            {
                "prompt_ids": [5, 6],
                "response_ids": [[7, 8, EOS], [9, EOS]],
                "rewards": [0.9, 0.1],
                "behaviour_logps": [[-1.0, -2.0, float("nan")], None],
            }
        ]
    )
    reference: Any = GivenReference({0: np.array([-3, -4, -5], np.float32), 1: np.array([-6, -7], np.float32)})
    run = make_run(Grpo(), tmp_path, max_steps=1)
    trainer, plan = make_trainer(run, tiny, groups, reference=reference)
    batch = trainer._rows[next(iter(plan.sampler))[0]]
    # position t predicts token t + 1: the prompt's second token stands at 0, the response begins at 1
    assert batch["ref_per_token_logps"].tolist() == [[0, -3, -4, -5], [0, -6, -7, 0]]
    assert batch["old_per_token_logps"].tolist() == [[0, -1, -2, -5], [0, -6, -7, 0]]
    assert batch["tool_mask"].tolist() == [[0, 1, 1, 1], [0, 1, 1, 0]]
    assert batch["completion_ids"].tolist() == [[6, 7, 8, EOS], [6, 9, EOS, EOS]]
    assert batch["completion_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
