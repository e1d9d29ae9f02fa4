"""A batch with its prompts computed once is the plain batch: every field, every parameter's gradient, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from entrypoint.sharing import attention, forward
from entrypoint.sharing.layout import Layout, lay_out
from entrypoint.sharing.support import unsupported
from tests.sharing.batches import Batch, assert_alike, computed, numbers, ragged
from tests.sharing.models import EAGER_ONLY, ROUTERS, SHARED, WINDOW, shared_over, tiny

CASES = [(name, kind) for name in SHARED for kind in ("sdpa", "eager") if kind == "eager" or name not in EAGER_ONLY]
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "kv_b_proj", "q_b_proj"}


# Of prompts 9 + 6 + 1 + 1; of responses 7 + 1 + 11, 2 + 8 + 1 + 5, 6 and 1. The last token of each predicts nothing,
# but a router counts it, and with it the longest row is above Phi-3's limit of 19.
PADDED, DISTINCT, WHOLE = (9, 20), (1, 17 + 42 - 9), (1, 17 + 42)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_fields_and_gradients_are_the_plain_ones(name: str, kind: str) -> None:
    model = tiny(name, kind)
    assert unsupported(model) is None
    shared, batch, router = shared_over(model), ragged(), name in ROUTERS
    with computed(model) as shapes:
        with shared.off():
            plain = numbers(model, batch, router=router)
        assert_alike(numbers(model, batch, router=router), plain)
    assert shapes == [PADDED, WHOLE if router or "long" in name else DISTINCT]
    moved = {part for part, gradient in plain.gradients.items() if gradient.any()}
    assert all(part in moved for part in plain.gradients if ATTENTION & set(part.split("."))), "a gradient of nothing"


def answers_see_each_other(layout: Layout) -> Layout:
    return replace(layout, own=layout.prompt)


def prompts_are_hidden(layout: Layout) -> Layout:
    return replace(layout, prompt=layout.own)


def positions_go_on(layout: Layout) -> Layout:
    """As if the second response stood behind the first."""
    late = layout.own > layout.prompt + 1
    return replace(layout, positions=layout.positions + 10 * late)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("damage", [answers_see_each_other, prompts_are_hidden, positions_go_on])
def test_a_wrong_row_is_off_by_nats(
    name: str, damage: Callable[[Layout], Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name, "eager")
    shared, batch = shared_over(model), ragged()

    def damaged(*args: Any, **kwargs: Any) -> Layout:
        layout = lay_out(*args, **kwargs)
        assert layout is not None
        return damage(layout)

    monkeypatch.setattr(forward, "lay_out", damaged)
    assert farthest(model, shared, batch) > 0.5


@pytest.mark.parametrize("name", [name for name in SHARED if "window" in name or name == "Mixtral"])
@pytest.mark.parametrize("damage", [lambda config: None, lambda config: lambda k, q: k > q - WINDOW - 1])
def test_a_window_of_another_size_is_off_by_nats(name: str, damage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name, "eager")
    shared, batch = shared_over(model), ragged()
    monkeypatch.setitem(attention.WINDOWS, "sliding_attention", damage)
    assert farthest(model, shared, batch) > 0.5


def farthest(model: Any, shared: forward.SharedPrompts, batch: Batch) -> float:
    """The greatest difference of a token's log-prob, in nats."""
    with torch.no_grad():
        found = model(**batch, fused_lm_head=True).log_probs
        with shared.off():
            return float((found - model(**batch, fused_lm_head=True).log_probs).abs().max())
