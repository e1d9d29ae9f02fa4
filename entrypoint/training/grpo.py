"""GRPO over logged groups: `GRPOTrainer` with the traces' responses instead of its own rollouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer

from entrypoint.conf import Grpo
from entrypoint.data.groups import Float32, Float64, Groups, Int64
from entrypoint.errors import DivergedError
from entrypoint.training.batches import MicroBatch
from entrypoint.training.reference import ReferenceLogProbs
from entrypoint.training.scoring import EMPTY, collate, sequences
from entrypoint.training.whole_batch import Micro, Rows, WholeBatch

TOKEN_MEANS = frozenset({"bnpo", "dapo", "cispo", "vespo"})  # the other losses average over sequences
CLIPPED = frozenset({"grpo", "bnpo", "dr_grpo", "dapo", "luspo"})  # those that report clip ratios


def advantages(rewards: Float64, offsets: Int64) -> Float32:
    """Advantage of each response within its group: (r - mean) / (std + 1e-4), std with ddof = 1.

    DeepSeekMath, arXiv 2402.03300, section 4.1.2; the constant is TRL's.

    Shape: rewards (M,), flat; offsets (N + 1,); result (M,).
    """
    sizes = np.diff(offsets)
    mean = np.add.reduceat(rewards, offsets[:-1]) / sizes
    deviation = rewards - np.repeat(mean, sizes)
    variance = np.add.reduceat(deviation**2, offsets[:-1]) / (sizes - 1)
    result: Float32 = (deviation / (np.repeat(np.sqrt(variance), sizes) + 1e-4)).astype(np.float32)
    return result


class GrpoRows(Rows):
    """A micro-batch as `GRPOTrainer._compute_loss` takes it.

    TRL pads prompts on the left and responses on the right of a seam. Here the seam stands after the first token:
    the rest is one row padded on the right, so that positions are those of the sequence alone, and TRL's `tool_mask`
    tells the response's tokens.
    """

    def __init__(self, groups: Groups, reference: ReferenceLogProbs, *, pad: int, world_size: int) -> None:
        self.groups = groups
        self.reference = reference
        self.pad = pad
        self.world_size = world_size
        self.advantages = advantages(groups.rewards, groups.offsets)

    def __getitem__(self, micro: MicroBatch) -> Micro:
        responses = np.array(micro.responses, np.int64)
        pairs = sequences(self.groups, responses) if len(responses) else [EMPTY]
        batch = collate(pairs, self.pad)
        reference, behaviour = self._policies(micro.responses, pairs, batch["input_ids"].shape)
        tokens = sum(len(answer) for _, answer in pairs)
        return {
            "prompt_ids": batch["input_ids"][:, :1],
            "prompt_mask": batch["attention_mask"][:, :1],
            "completion_ids": batch["input_ids"][:, 1:],
            "completion_mask": batch["attention_mask"][:, 1:],
            "tool_mask": batch["response_mask"][:, 1:],
            "advantages": torch.from_numpy(self.advantages[responses] if len(responses) else np.zeros(1, np.float32)),
            "ref_per_token_logps": reference,
            "old_per_token_logps": behaviour,
            # TRL divides a token sum by this over the ranks: its normaliser becomes this micro-batch's own tokens.
            "num_items_in_batch": torch.tensor(float(tokens * self.world_size)),
            "step": micro.step,
            "weights": {
                "sequences": float(len(responses)),
                "tokens": float(tokens if len(responses) else 0),
                "step_sequences": float(micro.step.sequences),
                "step_tokens": float(micro.step.tokens),
            },
        }

    def _policies(
        self, responses: tuple[int, ...], pairs: list[Any], shape: torch.Size
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the reference and of the behaviour policy, where position t predicts token t + 1.

        The behaviour policy is what sampled the traces: the recorded log-probs, else the reference.
        """
        reference = np.zeros((shape[0], shape[1] - 1), np.float32)
        behaviour = reference.copy()
        for i, response in enumerate(responses):
            row = int(np.searchsorted(self.groups.offsets, response, side="right")) - 1
            span = slice(len(pairs[i][0]) - 1, len(pairs[i][0]) - 1 + len(pairs[i][1]))
            reference[i, span] = self.reference[response]
            recorded = self.groups[row].behaviour_logps[response - int(self.groups.offsets[row])]
            known = reference[i, span] if recorded is None else recorded
            behaviour[i, span] = np.where(np.isnan(known), reference[i, span], known)
        return torch.from_numpy(reference), torch.from_numpy(behaviour)


class LoggedGrpo(WholeBatch, GRPOTrainer):  # type: ignore[misc]
    """`GRPOTrainer` whose groups, advantages, reference and behaviour log-probs come from `GrpoRows`."""

    def __init__(self, method: Grpo, *, args: GRPOConfig, **kwargs: Any) -> None:
        self.method = method
        # A KL weight at this point makes TRL load a reference model: it is set when there is nothing left to load.
        args.beta = 0.0
        super().__init__(reward_funcs=[_never], args=args, **kwargs)
        self.beta = args.beta = method.kl_coeff

    _prepare_inputs = Trainer._prepare_inputs  # no generation, no buffer: a batch is what the rows made

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As TRL's, with labels on the response alone: the LM head never sees a prompt position."""
        labels = input_ids.masked_fill(self._response_mask == 0, -100)
        router = {"output_router_logits": True} if kwargs.get("compute_aux_loss") else {}
        out = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True, **router)
        self._log_probs = out.log_probs.detach()
        return out.log_probs[:, -logits_to_keep:], out.entropy[:, -logits_to_keep:], out.aux_loss

    def _compute_loss(self, model: Any, inputs: Micro) -> torch.Tensor:
        response_mask = inputs["tool_mask"]
        self._response_mask = torch.nn.functional.pad(response_mask, (1, 0))
        loss: torch.Tensor = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
        tokens = response_mask.bool()
        ratio = torch.exp(self._log_probs - inputs["old_per_token_logps"])[tokens]
        self._own = {"ratio": [float(ratio.mean())], "ratio_max": [float(ratio.max())]}
        if self.beta == 0.0:  # TRL leaves the KL out then; the run is watched all the same
            log_rho = (self._log_probs - inputs["ref_per_token_logps"])[tokens]
            self._own["kl"] = [float((1 - log_rho.exp() + log_rho.exp() * log_rho).mean())]
        return loss

    def own_metrics(self) -> dict[str, list[float]]:
        """Ratio to the behaviour policy: its mean over tokens, and its greatest; the KL where TRL has none."""
        return self._own

    def loss_share(self, weights: dict[str, float]) -> float:
        kind = "tokens" if self.loss_type in TOKEN_MEANS else "sequences"
        return weights[kind] / weights[f"step_{kind}"]

    def metric_weight(self, name: str, weights: dict[str, float]) -> float:
        return weights["sequences" if name in {"aux_loss", "vespo/phi_seq_mean"} else "tokens"]

    def extremes(self) -> dict[str, int]:
        clips = {"clip_ratio/low_min": -1, "clip_ratio/high_max": 1} if self.loss_type in CLIPPED else {}
        return {"ratio_max": 1, **clips}

    def check_step(self, metrics: dict[str, float]) -> None:
        """Compare a step's KL, clip fraction and ratio with the method's limits."""
        for metric, limit, key in (
            ("kl", self.method.max_kl, "max_kl"),
            ("clip_ratio/region_mean", self.method.max_clip_fraction, "max_clip_fraction"),
            ("ratio", self.method.max_ratio, "max_ratio"),
        ):
            if not metrics.get(metric, 0.0) <= limit:
                raise DivergedError(
                    f"step {self.state.global_step + 1}: {metric} is {metrics[metric]:.4g}, above method.{key} = "
                    f"{limit:g}: the policy has left the traces' policy; lower train.learning_rate, raise "
                    "method.kl_coeff, or raise the limit"
                )


def _never(**kwargs: Any) -> list[float | None]:
    """TRL wants a reward function; the rewards are logged."""
    raise AssertionError("logged responses are never scored again")
