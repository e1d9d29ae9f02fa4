"""DPO over pairs of logged responses: `DPOTrainer` fed whole steps, the reference's numbers brought along."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from trl import DPOConfig, DPOTrainer

from entrypoint.data.groups import Groups
from entrypoint.training.batches import MicroBatch
from entrypoint.training.reference import ReferenceLogProbs
from entrypoint.training.scoring import EMPTY, collate, sequences
from entrypoint.training.whole_batch import Micro, Rows, WholeBatch

CHOSEN_TOKENS = frozenset({"logits/chosen", "mean_token_accuracy"})


class DpoRows(Rows):
    """A micro-batch as `DPOTrainer._compute_loss` takes it: all chosen rows, then all rejected ones."""

    def __init__(self, groups: Groups, reference: ReferenceLogProbs, *, pad: int) -> None:
        self.groups = groups
        self.reference = reference
        self.pad = pad

    def __getitem__(self, micro: MicroBatch) -> Micro:
        order = micro.responses[0::2] + micro.responses[1::2]
        rows = sequences(self.groups, np.array(order, np.int64)) if order else [EMPTY, EMPTY]
        batch = collate(rows, self.pad)
        sums = [float(self.reference[r].sum(dtype=np.float64)) for r in order] or [0.0, 0.0]
        pairs = len(rows) // 2
        lengths = [len(answer) for _, answer in rows] if order else [0, 0]
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "completion_mask": batch["response_mask"],
            "ref_chosen_logps": torch.tensor(sums[:pairs], dtype=torch.float32),
            "ref_rejected_logps": torch.tensor(sums[pairs:], dtype=torch.float32),
            "step": micro.step,
            "weights": {
                "pairs": float(len(order) // 2),
                "step_pairs": float(micro.step.sequences),
                "chosen_tokens": float(sum(lengths[:pairs])),
                "rejected_tokens": float(sum(lengths[pairs:])),
            },
        }


class LoggedDpo(WholeBatch, DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` whose pairs and reference log-probs come from `DpoRows`."""

    def __init__(self, *, args: DPOConfig, **kwargs: Any) -> None:
        args.precompute_ref_log_probs = True
        # With precomputed log-probs TRL still hashes every weight for its cache and, under FSDP, loads a reference
        # model to fill it: minutes and memory for numbers that are brought along.
        with patch.multiple(
            "trl.trainer.dpo_trainer", hash_module=lambda _: "", create_model_from_path=lambda *_, **__: None
        ):
            super().__init__(args=args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        """Tokenised already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        """Computed already."""
        return dataset

    def loss_share(self, weights: dict[str, float]) -> float:
        return weights["pairs"] / weights["step_pairs"]

    def metric_weight(self, name: str, weights: dict[str, float]) -> float:
        if name in CHOSEN_TOKENS:
            return weights["chosen_tokens"]
        if name == "logits/rejected":
            return weights["rejected_tokens"]
        if name == "entropy":
            return weights["chosen_tokens"] + weights["rejected_tokens"]
        return weights["pairs"]
