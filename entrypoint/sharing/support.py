"""Whether a packed row computes what a model computes: by what it is, before it is tried."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

from entrypoint.sharing.attention import WINDOWS, layer_kinds

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


def unsupported(model: PreTrainedModel, peft_config: Any = None) -> str | None:
    """Why prompts can't be shared in this model; None where they can.

    Args:
        peft_config: the adapter's, where there is one.
    """
    config: Any = model.config.get_text_config()
    kinds = set(layer_kinds(config)[0])
    backbone = model.base_model
    if getattr(model, "_is_stateful", False):
        return "its layers keep a state that would run through the responses"
    if kinds - set(WINDOWS):
        return f"its layers are of the kind {', '.join(sorted(kinds - set(WINDOWS)))}"
    if config._attn_implementation not in IMPLEMENTATIONS:
        return f"its attention is {config._attn_implementation}"
    if getattr(config, "index_topk", None) is not None:
        return "its attention picks tokens by an index of their own"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its positions come from a token's place in the row (ALiBi)"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "its local attention counts places in the row"
    if getattr(config, "attn_temperature_tuning", False):
        return "its attention's temperature depends on a token's place in the row"
    if not getattr(config, "is_causal", True) or getattr(config, "is_encoder_decoder", False):
        return "it is not a causal language model"
    if getattr(peft_config, "is_prompt_learning", False):
        return "its adapter learns a prompt of its own"
    if backbone is model or "position_ids" not in inspect.signature(backbone.forward).parameters:
        return f"{type(model).__name__} takes no position_ids"
    return None
