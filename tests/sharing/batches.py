"""Batches as TRL gives them to a model, what a model makes of them, and how far two such results are apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from entrypoint.sharing.forward import FIELDS
from tests.sharing.models import VOCABULARY

Batch = dict[str, torch.Tensor]  # input_ids, attention_mask, labels (B, L)

GROUPS = ((9, (7, 1, 11)), (6, (2, 8, 1, 5)), (1, (6,)), (1, (1,)))  # (tokens of a prompt, of its responses)


def ragged(groups: tuple[tuple[int, tuple[int, ...]], ...] = GROUPS, *, seed: int = 0) -> Batch:
    """Rows of random tokens, padded on the right: groups and groups of one, one-token prompts and responses."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (count,), generator=generator)

    rows = []
    for length, responses in groups:
        prompt = tokens(length)
        rows += [(prompt, tokens(response)) for response in responses]
    shape = (len(rows), max(len(prompt) + len(response) for prompt, response in rows))
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    batch["labels"].fill_(-100)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        batch["input_ids"][i, :end] = torch.cat([prompt, response])
        batch["attention_mask"][i, :end] = 1
        batch["labels"][i, len(prompt) : end] = response
    return batch


@contextmanager
def computed(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shapes that the model's backbone is called with."""
    shapes: list[tuple[int, ...]] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


@dataclass(frozen=True)
class Numbers:
    """What one forward and backward pass gave: TRL's fields (B, L - 1), scalars, the gradient by parameter."""

    fields: dict[str, torch.Tensor]
    scalars: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]

    @property
    def gradient(self) -> torch.Tensor:
        return torch.cat([gradient.flatten() for gradient in self.gradients.values()])


def numbers(model: torch.nn.Module, batch: Batch, *, router: bool = False) -> Numbers:
    """Forward and backward of a loss in which every token's log-prob and entropy has a weight of its own."""
    model.zero_grad()
    options: dict[str, Any] = {"output_router_logits": True} if router else {}
    out = model(**batch, fused_lm_head=True, **options)
    weights = 0.5 + torch.rand(out.log_probs.shape, generator=torch.Generator().manual_seed(5))
    loss = (weights * out.log_probs).sum() + 0.3 * (weights.flip(0, 1) * out.entropy).sum()
    if router:
        loss = loss + 2 * out.aux_loss
    loss.backward()
    return Numbers(
        {name: getattr(out, name).detach().float() for name in FIELDS},
        {"loss": out.loss.detach()} | ({"aux_loss": out.aux_loss.detach()} if router else {}),
        {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        },
    )


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """L2 norm of the difference over that of what is wanted; an absolute one where nothing is."""
    return float((found - wanted).norm() / (wanted.norm() if wanted.any() else 1))


def assert_alike(found: Numbers, wanted: Numbers, tolerance: float = 1e-5, *, floor: float = 0.0) -> None:
    """Each field, scalar and parameter's gradient, and the whole gradient, as L2 norms.

    A gradient that is small beside the greatest one is measured by a hundredth of that: where a sum cancels (a key's
    bias changes no softmax, nor does any key that is alone), only rounding is left.

    floor: what is smaller than this, in nats or of a gradient, is measured by it: for any batch, where anything may
        cancel. A gradient's terms are tens.
    """
    assert found.gradients.keys() == wanted.gradients.keys()
    least = 1e-2 * max(float(gradient.norm()) for gradient in wanted.gradients.values())
    for name, one, other, scale in [
        *((name, found.fields[name], wanted.fields[name], 0.0) for name in wanted.fields),
        *((name, found.scalars[name], wanted.scalars[name], 0.0) for name in wanted.scalars),
        ("gradient", found.gradient, wanted.gradient, 0.0),
        *((name, found.gradients[name], wanted.gradients[name], least) for name in wanted.gradients),
    ]:
        assert one.shape == other.shape
        off = float((one - other).norm())
        assert off <= tolerance * max(float(other.norm()), scale, floor), f"{name} is off by {off}"
