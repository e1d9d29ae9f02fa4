"""FlexAttention over a packed row: few lengths, so that few graphs are compiled, and the plain numbers."""

from __future__ import annotations

import pytest
import torch

from entrypoint.sharing import attention, forward
from entrypoint.sharing.attention import FLEX_BLOCK, padding
from entrypoint.sharing.forward import FIELDS
from entrypoint.sharing.support import unsupported
from tests.sharing.batches import assert_alike, computed, numbers, ragged, relative
from tests.sharing.models import ROUTERS, shared_over, tiny


def test_lengths_are_few_and_the_padding_is_small() -> None:
    config = tiny("Llama", "flex_attention").config
    lengths = {tokens: tokens + padding(config, tokens) for tokens in range(1, 32769)}
    assert all(length % FLEX_BLOCK == 0 for length in lengths.values())
    assert all(0 <= length - tokens < max(FLEX_BLOCK, tokens / 8) for tokens, length in lengths.items())
    # up to 1024 the multiples of 128, then eight an octave: 1152, 1280, … 2048, 2304, …
    assert len(set(lengths.values())) == 8 + 5 * 8
    assert [lengths[n] for n in (1, 128, 129, 1024, 1025, 2048, 2049)] == [128, 128, 256, 1024, 1152, 2048, 2304]


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_other_attention_takes_any_length(kind: str) -> None:
    assert padding(tiny("Llama", kind).config, 1025) == 0


def test_a_cpu_does_not_try_it() -> None:
    """It has no backward pass there."""
    assert shared_over(tiny("Llama", "sdpa")).ways() == ["sdpa"]
    assert shared_over(tiny("Llama", "eager")).ways() == ["eager"]


@pytest.mark.parametrize("name", ["Llama", "Mistral window", "Qwen3Moe", "GptOss window"])
def test_padding_changes_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlexAttention's row is padded, here on another's, since it has no backward pass on a CPU."""
    model = tiny(name, "eager")
    shared, batch, router = shared_over(model), ragged(), name in ROUTERS
    for module in (attention, forward):
        monkeypatch.setattr(module, "padding", lambda config, tokens: 13)
    with computed(model) as shapes:
        with shared.off():
            plain = numbers(model, batch, router=router)
        assert_alike(numbers(model, batch, router=router), plain)
    assert shapes == [(9, 20), (1, (59 if router else 50) + 13)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Mistral window"])
@pytest.mark.filterwarnings("ignore:_compile flag")  # transformers' own way to make a block mask
def test_it_gives_the_plain_values(name: str) -> None:
    model = tiny(name, "sdpa", num_hidden_layers=2).eval()
    shared = shared_over(model)
    batches = [ragged(), ragged(((40, (30, 25, 1)), (1, (20, 33))), seed=1)]  # 50 and 145 tokens: 128 and 256
    with torch.no_grad(), shared.off():
        plain = [model(**batch, fused_lm_head=True) for batch in batches]
    shared.use("flex_attention")
    assert unsupported(model) is None
    with torch.no_grad(), computed(model) as shapes:
        found = [model(**batch, fused_lm_head=True) for batch in batches]
    assert shapes == [(1, 128), (1, 256)]
    for one, other in zip(found, plain, strict=True):
        for field in FIELDS:
            assert relative(getattr(one, field).float(), getattr(other, field).float()) < 1e-5, field
