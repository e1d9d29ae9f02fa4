"""Attention over a packed row: a response sees its prompt and itself, at the positions that it has alone.

Each kind of layer gets what its attention implementation wants: `sdpa` computes the parts one by one, without a mask
where the pattern is causal; `eager` adds a mask; `flex_attention` takes a block mask and skips what it hides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention.bias import CausalBias, causal_lower_right
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from entrypoint.sharing.layout import Layout

FLEX_BLOCK = 128  # FlexAttention's tile: a row's length is a multiple of it
Window = Callable[[Any, Any], Any] | None  # (key's position, query's position) -> visible

WINDOWS: dict[str, Callable[[PreTrainedConfig], Window]] = {
    "full_attention": lambda config: None,
    "sliding_attention": lambda config: lambda k, q: k > q - config.sliding_window,
    "chunked_attention": lambda config: (
        lambda k, q: k // config.attention_chunk_size == q // config.attention_chunk_size
    ),
}


def layer_kinds(config: PreTrainedConfig) -> tuple[list[str], bool]:
    """The kinds of attention in a model's layers, and whether it takes one mask a kind, in a dict.

    The rule of transformers' `create_masks_for_generate`.
    """
    if getattr(config, "layer_types", None) is not None:
        return list(dict.fromkeys(config.layer_types)), True
    if getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"], False
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"], False
    return ["full_attention"], False


def masks(config: PreTrainedConfig, layout: Layout, device: torch.device, dtype: torch.dtype) -> Any:
    """What stands for the attention mask of the packed row: one object, or a dict with one a kind of layer."""
    kinds, as_dict = layer_kinds(config)
    make = _parts if config._attn_implementation == "sdpa" else _dense
    made = {kind: make(config, layout, WINDOWS[kind](config), device, dtype) for kind in kinds}
    return made if as_dict else made[kinds[0]]


def padding(config: PreTrainedConfig, tokens: int) -> int:
    """Tokens to add to a packed row: FlexAttention compiles anew for each length, so lengths are few."""
    if config._attn_implementation != "flex_attention":
        return 0
    step = max(FLEX_BLOCK, 1 << max(0, tokens.bit_length() - 4))  # at most an eighth more: eight lengths an octave
    return -tokens % step


# One mask over the whole row ------------------------------------------------------------------------------------------


def _dense(config: PreTrainedConfig, layout: Layout, window: Window, device: torch.device, dtype: torch.dtype) -> Any:
    extra = padding(config, len(layout))

    def filled(values: Any, fill: Any) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([values, fill])).to(device)

    alone = -1 - np.arange(extra)  # each padding token sees itself alone
    position = filled(layout.positions, np.zeros(extra, np.int64))
    own, prompt = filled(layout.own, alone), filled(layout.prompt, alone)

    def visible(batch: Any, head: Any, q: Any, k: Any) -> Any:
        see = (position[k] <= position[q]) & ((own[k] == own[q]) | (own[k] == prompt[q]))
        return see if window is None else see & window(position[k], position[q])

    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=1,
        q_length=len(position),
        kv_length=len(position),
        mask_function=visible,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=dtype,
        config=config,
        device=device,
    )


# Part by part ---------------------------------------------------------------------------------------------------------


def _parts(
    config: PreTrainedConfig, layout: Layout, window: Window, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """A place holder with a mask's four dimensions, which models hand on unseen, that carries the parts.

    It is empty: a model that looks at it, or loses the parts on the way, fails instead of attending to everything.
    """
    carrier = torch.ones(1, 1, 0, 0, dtype=torch.bool, device=device)
    carrier.parts = Parts(layout, window, device)  # type: ignore[attr-defined]
    return carrier


class Parts:
    """Where the row is cut, and the mask of each part; None where the plain causal pattern is all of it."""

    def __init__(self, layout: Layout, window: Window, device: torch.device) -> None:
        self.lengths: list[int] = []  # of the parts, in the row's order
        self.prompts: list[int | None] = []  # by part: the index of the prompt that it sees besides itself
        self.masks: list[torch.Tensor | None] = []
        positions = torch.from_numpy(layout.positions).to(device)
        for segment in layout.segments:
            at, end = segment.start, segment.start + segment.prompt
            alone = len(segment.responses) == 1
            if alone:  # nothing is shared: prompt and response are one causal sequence
                end += segment.responses[0]
            first = len(self.lengths)
            self._add(positions[at:end], positions[at:end], None, window)
            for length in () if alone else segment.responses:
                own = positions[end : end + length]
                self._add(own, torch.cat([positions[at : at + segment.prompt], own]), first, window)
                end += length

    def _add(self, queries: torch.Tensor, keys: torch.Tensor, prompt: int | None, window: Window) -> None:
        self.lengths.append(len(queries))
        self.prompts.append(prompt)
        # Positions rise: where the last token sees the first one, every token sees all before it.
        if window is not None and not bool(window(keys[0], queries[-1])):
            see = (keys[None] <= queries[:, None]) & window(keys[None], queries[:, None])
            self.masks.append(see[None, None])
        else:
            # One token sees all; transformers folds a lone token's heads into rows, which a causal pattern would cut.
            plain = prompt is None or len(queries) == 1
            self.masks.append(None if plain else causal_mask(len(queries), len(keys), keys.device))


def causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """The last `queries` of `keys` tokens, each seeing all before it."""
    if device.type == "cuda":
        return causal_lower_right(queries, keys)  # no mask in memory: flash attention knows the pattern
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def install() -> None:
    """Let transformers' `sdpa` attention know the carrier; everything else it gets goes through unchanged."""
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not _attend:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _attend


_plain_sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    parts: Parts | None = getattr(attention_mask, "parts", None)
    if parts is None:
        found: tuple[torch.Tensor, None] = _plain_sdpa(module, query, key, value, attention_mask, **kwargs)
        return found
    kwargs.pop("is_causal", None)
    # `split`, not slices: its gradient is one concatenation, a slice's is a row of zeros each.
    queries, keys, values = (tensor.split(parts.lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for i, (prompt, mask) in enumerate(zip(parts.prompts, parts.masks, strict=True)):
        k, v = keys[i], values[i]
        if prompt is not None:
            k, v = torch.cat([keys[prompt], k], dim=2), torch.cat([values[prompt], v], dim=2)
        if isinstance(mask, CausalBias):  # transformers would repeat keys and values for grouped queries
            q, k, v = _as_autocast(queries[i], k, v)
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=kwargs.get("scaling"), enable_gqa=k.shape[1] != query.shape[1]
            )
            outputs.append(out.transpose(1, 2).to(values[i].dtype))
        else:
            outputs.append(_plain_sdpa(module, queries[i], k, v, mask, is_causal=mask is None, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def _as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What autocast makes of attention's inputs; a `CausalBias` is dispatched before autocast sees it."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)
