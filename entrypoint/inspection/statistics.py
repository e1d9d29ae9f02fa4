"""The numbers of a report, each from whole arrays; what can't be computed is None."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np

from entrypoint.conf import METHODS, Dpo, Run
from entrypoint.conf.method import PAIRINGS
from entrypoint.data.groups import Float64, Int64
from entrypoint.inspection.lengths import Lengths
from entrypoint.inspection.responses import Responses

Section = dict[str, Any]

NEAR = 0.05  # rewards closer than this are a near-tie: labellers seldom agree on the second decimal
NEIGHBOURS = 64  # each response is compared with so many others of its prompt: enough for a share
BINS = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, None))  # responses a prompt
QUANTILES = (5, 25, 50, 75, 95)


def groups(responses: Responses, usable: Responses) -> Section:
    """Prompts, how many responses they have, and how far these are apart in reward.

    Standard deviations are GRPO's own, with n − 1; the mean and the share are over prompts with two and more responses.
    """
    sizes = responses.sizes
    several = sizes >= 2
    mean = _group_means(responses.reward, responses)
    squares = _sums((responses.reward - mean[responses.group]) ** 2, responses)
    best, worst = responses.reward[responses.starts], responses.reward[responses.starts + sizes - 1]
    return {
        "prompts": len(sizes),
        "usable": len(usable.starts),
        "sizes": _spread(sizes),
        "histogram": {_bin(low, high): int(((sizes >= low) & (sizes <= (high or np.inf))).sum()) for low, high in BINS},
        "mean_std": _mean(np.sqrt(squares[several] / (sizes[several] - 1))),
        "without_spread": _mean((best == worst)[several]),
    }


def rewards(responses: Responses, *, chosen: float, rejected: float) -> Section:
    """The distribution of rewards over all responses."""
    found = responses.reward
    quantiles = np.quantile(found, np.array(QUANTILES) / 100) if len(found) else np.full(len(QUANTILES), np.nan)
    return {
        "mean": _mean(found),
        "quantiles": {f"p{q}": _round(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        "chosen": _mean(found >= chosen),
        "rejected": _mean(found < rejected),
    }


def pairs(usable: Responses, *, chosen: float, rejected: float, limit: int) -> Section:
    """Pairs that the usable prompts make, by each rule of `entrypoint.data.pairs`; counted, not built.

    Args:
        limit: `method.pairs_per_prompt`.
    """
    good, bad = _sums(usable.reward >= chosen, usable), _sums(usable.reward < rejected, usable)
    able = (good > 0) & (bad > 0)
    return {
        "prompts": int(able.sum()),
        "share": _mean(able),
        "per_prompt": limit,
        "by_pairing": {pairing: int(_pair_numbers(good, bad, pairing, limit).sum()) for pairing in PAIRINGS},
    }


def noise(responses: Responses, usable: Responses) -> Section:
    """How far the labels can be trusted: two scores against each other, copies of one response, near-ties.

    `disordered` is the share of the pairs of responses to one prompt, among those that both scores order, that they
    order differently: 0 is agreement, 0.5 what two coins would do.
    """
    return {
        **_disagreement(responses),
        "near_ties": _mean(_gaps(usable) < NEAR),
        "levels": _median(levels(usable)),
        "duplicated": int((responses.copies > 1).sum()),
        "conflicting": int((responses.range > 0).sum()),
        "far_apart": int((np.round(responses.range, 9) >= NEAR).sum()),
    }


def levels(responses: Responses) -> Int64:
    """How many different rewards each prompt's responses have, in steps of NEAR. Shape: (prompts,)."""
    step = np.floor(np.round(responses.reward / NEAR, 6))
    fresh = np.append(True, step[1:] != step[:-1])  # rewards descend within a prompt
    fresh[responses.starts] = True
    return _sums(fresh[: len(responses)], responses).astype(np.int64)


def length_bias(responses: Responses) -> Section:
    """Correlation of a response's length in bytes with its reward: overall, and of deviations from prompts' means."""
    length = responses.response_bytes.astype(np.float64)
    within = [
        values - _group_means(values, responses)[responses.group] if len(values) else values
        for values in (length, responses.reward)
    ]
    return {"overall": _correlation(length, responses.reward), "within_prompts": _correlation(*within)}


def tokens(lengths: Lengths, max_length: int) -> Section:
    """Tokens of prompts (each once) and of responses."""
    firsts = np.flatnonzero(np.append(True, np.diff(lengths.group) != 0)) if len(lengths.group) else lengths.group
    prompt, response = _long(lengths.prompt[firsts]), _long(lengths.response)
    able = prompt["mean"] and response["mean"]
    return {
        "source": lengths.source,
        "complete": lengths.complete,
        "responses": len(lengths.response),
        "prompt": prompt,
        "response": response,
        "response_per_prompt": _round(response["mean"] / prompt["mean"]) if able else None,
        "max_length": max_length,
        "over_max_length": _mean(lengths.total > max_length),
    }


def steps(run: Run, usable: Responses) -> Section:
    """What both methods would do with the training prompts: units (groups or pairs), steps and epochs."""
    dpo = run.method if isinstance(run.method, Dpo) else Dpo()
    train = usable.where(~usable.held_out)
    good = _sums(train.reward >= run.data.chosen_threshold, train)
    bad = _sums(train.reward < run.data.rejected_threshold, train)
    numbers = _pair_numbers(good, bad, dpo.pairing, dpo.pairs_per_prompt)
    units = {"grpo": len(train.starts), "dpo": int(numbers.sum())}
    return {method: _steps(run, method, units[method]) for method in METHODS}


def _steps(run: Run, method: str, units: int) -> Section:
    train = METHODS[method][1]()
    if run.method.name != method:  # what the run file says of `train` holds for the other method too
        usual = METHODS[run.method.name][1]()
        names = [item.name for item in fields(train)]
        said = {name: getattr(run.train, name) for name in names if getattr(run.train, name) != getattr(usual, name)}
        train = replace(train, **said)
    else:
        train = run.train
    epoch = -(-units // train.batch_size)
    total = (train.max_steps or math.ceil(train.num_epochs * epoch)) if units else 0
    return {
        "units": units,
        "batch_size": train.batch_size,
        "steps_per_epoch": epoch,
        "max_steps": train.max_steps,
        "num_epochs": train.num_epochs,
        "steps": total,
        "epochs": _round(total / epoch) if units else None,
    }


def _pair_numbers(good: Float64, bad: Float64, pairing: str, limit: int) -> Float64:
    """Pairs of each prompt with `good` chosen and `bad` rejected responses; the thresholds don't overlap."""
    ranked = np.minimum(good, bad)
    by_rule: dict[str, Float64] = {"ranked": ranked, "all": good * bad, "best_worst": np.minimum(ranked, 1)}
    return np.minimum(by_rule[pairing], limit)


def _disagreement(responses: Responses) -> Section:
    """ragas_reward against judge_score, over the responses that have both."""
    both = responses.where(~np.isnan(responses.ragas_reward + responses.judge_score))
    ragas, judge = both.ragas_reward, both.judge_score
    same_scale = len(both) and min(ragas.min(), judge.min()) >= 0 and max(ragas.max(), judge.max()) <= 1
    ordered, disordered = _orders(both)
    return {
        "scored": len(both),
        "correlation": _correlation(ragas, judge),
        "mean_difference": _mean(np.abs(ragas - judge)) if same_scale else None,
        "ordered_pairs": ordered,
        "disordered": _round(disordered / ordered) if ordered else None,
    }


def _orders(responses: Responses) -> tuple[int, int]:
    """Pairs of responses to one prompt that both scores order, and those that they order differently."""
    # By row, since neighbours are compared: a prompt's responses stand best first.
    order = np.lexsort((responses.row, responses.group))
    group, ragas, judge = responses.group[order], responses.ragas_reward[order], responses.judge_score[order]
    size = np.repeat(responses.sizes, responses.sizes)
    ordered = disordered = 0
    for apart in range(1, NEIGHBOURS):
        more = size > apart
        size, group, ragas, judge = size[more], group[more], ragas[more], judge[more]
        if not len(group):
            break
        same = group[apart:] == group[:-apart]
        agree = np.sign(ragas[apart:] - ragas[:-apart]) * np.sign(judge[apart:] - judge[:-apart]) * same
        ordered += int(np.count_nonzero(agree))
        disordered += int((agree < 0).sum())
    return ordered, disordered


def _gaps(responses: Responses) -> Float64:
    """Differences of neighbouring rewards within prompts; binary fractions are rounded away (0.35 − 0.3 < 0.05)."""
    same = responses.prompt[1:] == responses.prompt[:-1]
    gaps: Float64 = np.round((responses.reward[:-1] - responses.reward[1:])[same], 9)
    return gaps


def _sums(values: Any, responses: Responses) -> Float64:
    """Sums over each prompt's responses. Shape: (N,) to (prompts,)."""
    if not len(responses):
        return np.zeros(0)
    found: Float64 = np.add.reduceat(np.asarray(values, np.float64), responses.starts)
    return found


def _group_means(values: Float64, responses: Responses) -> Float64:
    means: Float64 = _sums(values, responses) / responses.sizes
    return means


def _correlation(x: Float64, y: Float64) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    if len(x) < 2:
        return None
    if min(x.std() / max(np.abs(x).max(), 1), y.std() / max(np.abs(y).max(), 1)) < 1e-9:  # what rounding leaves
        return None
    return _round(float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())))


def _spread(values: Any) -> Section:
    if not len(values):
        return dict.fromkeys(("min", "median", "mean", "max"))
    found = {"min": values.min(), "median": np.median(values), "mean": values.mean(), "max": values.max()}
    return {name: _round(value) for name, value in found.items()}


def _long(values: Float64) -> Section:
    if not len(values):
        return dict.fromkeys(("mean", "median", "p95", "max"))
    found = {"mean": values.mean(), "median": np.median(values), "p95": np.quantile(values, 0.95), "max": values.max()}
    return {name: _round(value) for name, value in found.items()}


def _bin(low: int, high: int | None) -> str:
    return f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"


def _mean(values: Any) -> float | None:
    return _round(float(np.mean(values))) if len(values) else None


def _median(values: Any) -> float | None:
    return _round(float(np.median(values))) if len(values) else None


def _round(value: float) -> float | None:
    """Six digits behind the point: beyond them a sum depends on the order of its addends."""
    return None if math.isnan(value) else round(float(value), 6) + 0.0
