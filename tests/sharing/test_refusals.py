"""Models whose packed row would be another computation are refused; one that slips through fails its self-check."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from transformers import PreTrainedModel

from entrypoint.data.groups import Float32
from entrypoint.sharing import attention, forward
from entrypoint.sharing.check import TOLERANCE, settle
from entrypoint.sharing.forward import SharedPrompts
from entrypoint.sharing.support import unsupported
from tests.sharing.batches import ragged
from tests.sharing.models import REFUSED, shared_over, tiny

STATE, INDEX, PLACE = "keep a state", "of the kind indexed_attention", "place in the row"
REASONS = {
    "Qwen3Next": STATE, "Qwen3_5": STATE, "Mamba2": STATE, "FalconH1": STATE, "Jamba": STATE, "NemotronH": STATE,
    "RecurrentGemma": STATE, "Rwkv": STATE, "Lfm2": "of the kind conv", "MiniMax": "of the kind linear_attention",
    "DeepseekV32": INDEX, "GlmMoeDsa": INDEX, "Bloom": PLACE, "Mpt": PLACE, "Falcon": PLACE,
    "GPTNeo": "counts places in the row", "Llama4": PLACE,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_look_past_the_mask_are_refused(name: str) -> None:
    assert REASONS[name] in str(unsupported(tiny(name, "eager")))


@pytest.mark.parametrize("name", [name for name, reason in REASONS.items() if reason == STATE])
def test_a_state_is_known_by_its_layers_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`_is_stateful` is a promise to `generate`, and some models with a state say no."""
    model = tiny(name, "eager")
    monkeypatch.setattr(type(model), "_is_stateful", False)
    assert re.search(r"layers are of the kind|takes no position_ids", str(unsupported(model)))


@pytest.mark.parametrize("kind", ["flash_attention_2", "paged|sdpa"])
def test_attention_that_reads_no_mask_is_refused(kind: str) -> None:
    model = tiny("Llama")
    model.config._attn_implementation_internal = kind
    assert unsupported(model) == f"its attention is {kind}"


def test_a_model_that_sees_what_comes_is_refused() -> None:
    assert unsupported(tiny("Llama", is_causal=False)) == "it is not a causal language model"


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_an_adapter_with_a_prompt_of_its_own_is_refused(kind: Any) -> None:
    model = tiny("Llama")
    assert "prompt of its own" in str(unsupported(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)))
    assert unsupported(model, LoraConfig(task_type="CAUSAL_LM")) is None


# The self-check -------------------------------------------------------------------------------------------------------


def log_probs(model: PreTrainedModel) -> Float32:
    """Of one group's responses, flat."""
    with torch.no_grad():
        out = model(**ragged(((9, (7, 4, 11)),)), fused_lm_head=True)
    found: Float32 = out.log_probs[out.label_mask].numpy()
    return found


def checked(model: PreTrainedModel, dtype: str = "fp32") -> tuple[SharedPrompts, str | None]:
    shared = shared_over(model)
    return shared, settle(shared, lambda: log_probs(model), dtype=dtype, worst=lambda own: own)


SLIPPED = {"Rwkv": "", "Mpt": "", "GPTNeo": "", "Mistral window": "sliding_attention", "Lfm2": "conv",
           "MiniMax": "linear_attention", "Qwen3Next": "linear_attention"}  # fmt: skip


@pytest.mark.parametrize("name", SLIPPED)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_slips_through_is_caught_and_computed_plainly(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some ignore the mask, and some have a kind of layer that is taken here for full attention."""
    kind, build = SLIPPED[name], attention.masks
    if kind:
        monkeypatch.setitem(attention.WINDOWS, kind, lambda config: None)
    if kind in ("conv", "linear_attention"):  # their layers know one mask only, that of padding: there is none
        monkeypatch.setattr(forward, "masks", lambda *args: build(*args) | {kind: None})
    model = tiny(name, "eager")
    shared, why = checked(model, dtype)
    assert not shared.enabled
    found = re.fullmatch(r"with eager: log-probs are off by (\S+) nats a token, at most (\S+)", str(why))
    assert found
    plain = log_probs(model)
    shared.enabled = True
    off = float(np.abs(log_probs(model) - plain).mean())
    shared.give_up()
    assert float(found[1]) == pytest.approx(off, rel=0.05)
    assert off > float(found[2]) == TOLERANCE[dtype]
    with shared.off():
        assert (log_probs(model) == plain).all()


def test_a_model_that_reads_the_mask_itself_is_computed_plainly() -> None:
    """Falcon calls torch's attention by itself: what carries the parts must not pass for a mask that shows all."""
    model = tiny("Falcon RoPE", "sdpa")
    assert unsupported(model) is None
    shared, why = checked(model)
    assert str(why).startswith("with sdpa: The size of tensor")
    assert not shared.enabled
    assert np.isfinite(log_probs(model)).all()


@pytest.mark.parametrize("name", ["Llama", "Mistral window", "Qwen3Moe", "Falcon RoPE"])
def test_a_model_that_computes_the_same_passes(name: str) -> None:
    shared, why = checked(tiny(name, "eager"))
    assert why is None
    assert shared.enabled


def test_the_other_ways_are_tried_before_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedPrompts, "ways", lambda shared: ["sdpa", "eager"])
    model = tiny("Gemma2 window", "eager")  # a soft cap on its scores, which sdpa refuses
    shared, why = checked(model)
    assert why is None
    assert shared.enabled
    assert model.config._attn_implementation == "eager"


def test_no_number_is_no_agreement() -> None:
    shared = shared_over(tiny("Llama"))
    why = settle(shared, lambda: np.zeros(3, np.float32), dtype="fp32", worst=lambda own: own)
    assert why is None
    why = settle(shared, lambda: np.full(3, np.nan, np.float32), dtype="fp32", worst=lambda own: own)
    assert why == "with sdpa: a log-prob is no number"
    assert not shared.enabled


def test_what_fails_on_another_rank_fails_on_all() -> None:
    shared = shared_over(tiny("Llama"))
    why = settle(shared, lambda: np.zeros(3, np.float32), dtype="fp32", worst=lambda own: math.inf)
    assert why == "with sdpa: another rank fails"
    assert not shared.enabled
