"""Shared prompts under what a run puts around them: adapters, gradient checkpointing, bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention.bias import causal_lower_right
from trl.trainer import utils as trl_utils

from entrypoint.sharing import attention, forward
from entrypoint.sharing.forward import SharedPrompts
from entrypoint.sharing.support import unsupported
from tests.sharing.batches import Batch, Numbers, assert_alike, computed, numbers, ragged, relative
from tests.sharing.models import shared_over, tiny

PLAIN, PACKED = (9, 20), (1, 50)  # rows and tokens of `ragged()`, see test_architectures
NAMES = ["Llama", "Gemma3 window", "Qwen3Moe", "GptOss window"]


def kind_of(name: str) -> str:
    return "eager" if name == "GptOss window" else "sdpa"


def both_ways(model: Any, shared: SharedPrompts, batch: Batch) -> tuple[Numbers, Numbers]:
    """Shared and plain; each is what it says."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    with computed(bare) as shapes:
        found = numbers(model, batch)
        with shared.off():
            plain = numbers(model, batch)
    assert shapes == [PACKED, PLAIN]
    return found, plain


def adapted(name: str) -> tuple[Any, SharedPrompts]:
    """As `build.share` does it: the head, then the adapter around it, then shared prompts over the bare model."""
    model = tiny(name, kind_of(name))
    shared = shared_over(model)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    peft: Any = get_peft_model(model, config)
    for part, parameter in peft.named_parameters():
        if "lora_B" in part:  # 0 at first, and then no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.2)
    assert unsupported(peft.get_base_model(), peft.active_peft_config) is None
    return peft, shared


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_gets_the_plain_gradients(name: str) -> None:
    model, shared = adapted(name)
    found, plain = both_ways(model, shared, ragged())
    assert_alike(found, plain)
    assert all("lora" in part for part in plain.gradients)
    assert all(gradient.any() for part, gradient in plain.gradients.items() if "self_attn" in part)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_checkpointing_gives_the_plain_gradients(name: str, reentrant: bool, lora: bool) -> None:
    if lora:
        model, shared = adapted(name)
    else:
        model = tiny(name, kind_of(name))
        shared = shared_over(model)
    batch = ragged()
    with shared.off():
        plain = numbers(model, batch)
    bare = model.get_base_model() if lora else model
    bare.activation_checkpointing_enable({"use_reentrant": reentrant})
    bare.enable_input_require_grads()
    layers = [layer for layer in bare.modules() if getattr(layer, "gradient_checkpointing", False)]
    assert len(layers) > 1
    found, plain_too = both_ways(model, shared, batch)
    assert_alike(found, plain)
    assert_alike(plain_too, plain)


def test_a_mask_that_loses_its_parts_is_an_error() -> None:
    """GPT-2 hands the mask on by position, where reentrant checkpointing copies it: no gradient may come of that."""
    model = tiny("GPT2")
    shared, batch = shared_over(model), ragged()
    with shared.off():
        plain = numbers(model, batch)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_alike(numbers(model, batch), plain)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="size of tensor"):
        numbers(model, batch)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "Mistral window", "Qwen3"])
def test_bf16_is_as_near_to_fp32_as_the_plain_bf16(name: str, kind: str) -> None:
    """Over several batches: one may be lucky."""
    model = tiny(name, kind)
    shared = shared_over(model)
    errors: dict[str, list[float]] = {"shared": [], "plain": []}
    slopes: dict[str, list[float]] = {"shared": [], "plain": []}
    for seed in range(4):
        batch = ragged(seed=seed)
        with shared.off():
            exact = numbers(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = dict(zip(errors, both_ways(model, shared, batch), strict=True))
        for way, rounded in found.items():
            errors[way].append(relative(rounded.fields["log_probs"], exact.fields["log_probs"]))
            slopes[way].append(relative(rounded.gradient, exact.gradient))
    for figures in (errors, slopes):
        assert sum(figures["plain"]) > 1e-4  # bf16 it is
        assert sum(figures["shared"]) < 2 * sum(figures["plain"])


def test_the_head_in_small_tiles_gives_the_plain_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 96 logits of a token in tiles of 40, as a CPU has a real vocabulary in tiles of 1024; TRL's own are whole."""
    model = tiny("Llama")
    shared = shared_over(model)
    tiles: list[int] = []
    apply = trl_utils._ChunkedLogProbFunction.apply

    def spy(*args: Any) -> Any:
        tiles.append(args[5])
        return apply(*args)

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", spy)
    monkeypatch.setattr(forward, "HEAD_TILE", 40)
    assert_alike(*both_ways(model, shared, ragged()))
    assert tiles == [40, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE]


def test_other_calls_are_the_models_own() -> None:
    """Without TRL's head, without labels, with what it does not know: nothing is shared, nothing changes."""
    model = tiny("Llama")
    batch = ragged()
    wanted = model(**batch)
    shared_over(model)
    with computed(model) as shapes:
        assert torch.equal(model(**batch).logits, wanted.logits)
        assert torch.equal(model(**batch).loss, wanted.loss)
        assert model(**batch, fused_lm_head=True, output_hidden_states=True).log_probs.shape == (9, 19)
        assert model(**batch, fused_lm_head=True, output_hidden_states=None, use_cache=False).log_probs.shape == (9, 19)
        tokens = model.generate(batch["input_ids"][:1, :9], max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    assert tokens.shape == (1, 11)
    assert shapes[:4] == [PLAIN, PLAIN, PLAIN, PACKED]


@pytest.mark.parametrize("name", ["Llama", "Gemma3 window", "Qwen3Moe"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_the_bias_that_flash_attention_knows_is_the_mask(
    name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA is given instead of a mask; on a CPU it becomes one, by the same dispatch."""
    model = tiny(name)
    shared_over(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        masked = numbers(model, ragged())
        biases: list[tuple[int, int]] = []

        def bias(queries: int, keys: int, device: torch.device) -> torch.Tensor:
            biases.append((queries, keys))
            return causal_lower_right(queries, keys)

        monkeypatch.setattr(attention, "causal_mask", bias)
        biased = numbers(model, ragged())
    assert biases
    assert_alike(biased, masked, 2e-2 if autocast else 1e-5, floor=1e-2 if autocast else 0.0)
