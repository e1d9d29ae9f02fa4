"""Held-out evaluation: the same numbers, from the same pairs, for both methods and any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from entrypoint.conf import Data, Dpo
from entrypoint.data.groups import Float64, Groups, Int64
from entrypoint.data.pairs import Pairs, pairs_of
from entrypoint.training.reference import ReferenceLogProbs
from entrypoint.training.scoring import Scorer


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs by the DPO rule: flat response indices, cut to the first `limit` pairs in hash order.

    Shape: chosen, rejected (N,); responses (M,), ascending and distinct.
    """

    groups: Groups
    chosen: Int64
    rejected: Int64
    responses: Int64

    def __len__(self) -> int:
        return len(self.chosen)


def held_out(groups: Groups, data: Data, *, limit: int) -> HeldOut:
    """The pairs that both methods are judged by: DPO's default pairing, whatever the run trains with.

    Groups lie in the order of their prompts' hashes, so the first `limit` pairs are a sample of prompts that no
    order of files changes.
    """
    rule = Dpo()
    pairs: Pairs = pairs_of(
        groups,
        chosen_threshold=data.chosen_threshold,
        rejected_threshold=data.rejected_threshold,
        pairing=rule.pairing,
        pairs_per_prompt=rule.pairs_per_prompt,
    )
    first = groups.offsets[pairs.group]
    chosen, rejected = (first + pairs.chosen)[:limit], (first + pairs.rejected)[:limit]
    return HeldOut(groups, chosen, rejected, np.unique(np.concatenate([chosen, rejected])))


def evaluate(scorer: Scorer, held: HeldOut, reference: ReferenceLogProbs, *, beta: float) -> dict[str, float]:
    """Metrics of the policy that `scorer` has on the held-out pairs; the same on every rank.

    accuracy: share of pairs whose chosen response has the higher log-prob a token (ties count half).
    margin: mean of that difference, nats a token.
    logp_chosen: mean log-prob a token of the good responses, each counted once.
    kl: mean over tokens of 1 - rho + rho log rho with rho = policy / reference: an estimate of KL(policy, reference)
        from the reference's own samples that is never negative.
    rewards/accuracies, rewards/margins: TRL's reference-relative versions, beta (log policy - log reference) summed
        over the response.
    """
    sums = torch.zeros(len(held.responses), 3, dtype=torch.float64)  # log-prob, KL, log-prob of the reference
    place = {int(response): i for i, response in enumerate(held.responses)}
    for response, policy in scorer.log_probs(held.groups, held.responses):
        base = reference[response].astype(np.float64)
        log_ratio = policy.astype(np.float64) - base
        kl = 1 - np.exp(log_ratio) + np.exp(log_ratio) * log_ratio
        sums[place[response]] = torch.tensor([policy.sum(dtype=np.float64), kl.sum(), base.sum()])
    # Each response was scored by one rank and is zero on the others: the sum is the whole table, on every rank.
    table = scorer.world.sum(sums.to(scorer.device)).cpu().numpy()
    return _metrics(held, table, beta)


def _metrics(held: HeldOut, table: Float64, beta: float) -> dict[str, float]:
    tokens = held.groups.response_lengths[held.responses].astype(np.float64)
    mean = table[:, 0] / tokens
    chosen = np.searchsorted(held.responses, held.chosen)
    rejected = np.searchsorted(held.responses, held.rejected)
    margin = mean[chosen] - mean[rejected]
    reward = beta * (table[:, 0] - table[:, 2])
    return {
        "accuracy": float((margin > 0).mean() + 0.5 * (margin == 0).mean()),
        "margin": float(margin.mean()),
        "logp_chosen": float(mean[np.unique(chosen)].mean()),
        "kl": float(table[:, 1].sum() / tokens.sum()),
        "rewards/accuracies": float((reward[chosen] > reward[rejected]).mean()),
        "rewards/margins": float((reward[chosen] - reward[rejected]).mean()),
    }
