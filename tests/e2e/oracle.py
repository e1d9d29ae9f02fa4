"""What a run's numbers must be, computed from the files that it leaves with transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.runs import Ended, maths, weights

Float64 = npt.NDArray[np.float64]

PAIRS = ((0, 3), (1, 2))  # `ranked` over two good and two bad responses, best first: best with worst, second with third


def load(folder: Path) -> Any:
    """A model as any reader gets it, computing in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float().eval()


@torch.no_grad()
def log_probs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Float64:
    """Nats of each token of a response. Shape: (R,)."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    values: Float64 = chosen.numpy()
    return values


def held_out_metrics(model: Any, base: Any, groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy, margin, log-prob of the good responses and KL on groups of two good and two bad responses."""
    margins, good, kls = [], [], []
    for group in groups:
        assert len(group["rewards"]) == 4
        policy = [log_probs(model, group["prompt_ids"], response) for response in group["response_ids"]]
        reference = [log_probs(base, group["prompt_ids"], response) for response in group["response_ids"]]
        margins += [policy[chosen].mean() - policy[rejected].mean() for chosen, rejected in PAIRS]
        good += [policy[chosen].mean() for chosen, _ in PAIRS]
        for ours, theirs in zip(policy, reference, strict=True):
            ratio = np.exp(ours - theirs)
            kls += [*(1 - ratio + ratio * (ours - theirs))]
    return {
        "accuracy": float(np.mean([(margin > 0) + 0.5 * (margin == 0) for margin in margins])),
        "margin": float(np.mean(margins)),
        "logp_chosen": float(np.mean(good)),
        "kl": float(np.mean(kls)),
    }


def assert_every_tensor_changed(trained: Path, base: Path) -> None:
    """No parameter of the saved model is the base's."""
    after, before = weights(trained), weights(base)
    assert after.keys() == before.keys()
    same = [name for name in after if torch.equal(after[name].float(), before[name].float())]
    assert not same


def assert_same_weights(run: Ended, other: Ended, *, share: float = 1e-4) -> None:
    """The difference of all weights is less than this share of the other's norm: Adam amplifies single tensors'."""
    ours, theirs = weights(run.output), weights(other.output)
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs) ** 0.5
    whole = sum(float(tensor.double().square().sum()) for tensor in theirs.values()) ** 0.5
    assert apart <= share * whole


def assert_same_course(run: Ended, straight: Ended) -> None:
    """Both logged the same metrics at the same steps, with values that agree as those of two world sizes do.

    Clip fractions are counts: a token at the very edge may be on either side.
    """
    for (step, epoch, metrics), expected in zip(maths(run), maths(straight), strict=True):
        assert (step, epoch, {*metrics}) == (*expected[:2], {*expected[2]})
        for name, value in expected[2].items():
            rel, near = (None, 0.02) if name.startswith("clip_ratio/") else (1e-5, 1e-6)
            assert metrics[name] == pytest.approx(value, rel=rel, abs=near), f"step {step}: {name}"
