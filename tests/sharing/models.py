"""Tiny random models of many architectures, with weights so large that a wrong mask shows as whole nats."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from entrypoint.sharing.forward import FIELDS, SharedPrompts

VOCABULARY = 96
WINDOW = 5  # shorter than the prompts and responses of `batches.ragged`: it cuts in both

ENDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE: dict[str, Any] = ENDS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
HEADS = BASE | {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {  # DeepSeek's attention and its experts
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
INDEXED = BASE | EXPERTS | LATENT | {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
}  # fmt: skip
SLIDING = {"sliding_window": WINDOW}
MIXED = SLIDING | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
QWEN_WINDOW = SLIDING | {"use_sliding_window": True, "max_window_layers": 1}
OLD = ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT_NEO = {"num_layers": 2, "num_heads": 4, "window_size": 5, "max_position_embeddings": 64, "intermediate_size": 64}
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 19, "short_factor": [1.0] * 4,
    "long_factor": [4.0, 3.0, 2.0, 5.0],
}  # fmt: skip

# By the stem of the class's name; what follows a space is a variant.
SHARED: dict[str, dict[str, Any]] = {
    "Llama": BASE,
    "Mistral window": BASE | SLIDING,
    "Qwen2": BASE,
    "Qwen2 window": BASE | QWEN_WINDOW,
    "Qwen3": HEADS,
    "Qwen3 window": HEADS | QWEN_WINDOW,
    "Qwen3Moe": HEADS | EXPERTS | {"num_experts": 4, "decoder_sparse_step": 1},
    "Mixtral": BASE | SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Gemma2 window": HEADS | MIXED,
    "Gemma3 window": HEADS | MIXED,
    "Glm4": HEADS,
    "Glm4Moe": HEADS | EXPERTS | {name: LATENT[name] for name in LATENT if name.startswith(("n_", "first", "topk"))},
    "Phi3": BASE,
    "Phi3 window": BASE | SLIDING,
    "Phi3 long": BASE | {"original_max_position_embeddings": 19, "rope_parameters": LONG_ROPE},
    "Olmo2": BASE,
    "Olmo3 window": BASE | MIXED,
    "GptOss window": HEADS | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Granite": BASE
    | {"logits_scaling": 2.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.5},
    "Cohere2 window": BASE | MIXED | {"logit_scale": 0.5},
    "DeepseekV3": BASE | EXPERTS | LATENT,
    "SmolLM3": BASE | {"no_rope_layers": [1, 0, 1]},
    "SmolLM3 window": BASE | MIXED | {"use_sliding_window": True},
}
EAGER_ONLY = {"Gemma2 window", "GptOss window"}  # soft caps, sinks
ROUTERS = {"Qwen3Moe", "Mixtral", "GptOss window"}  # those that have an auxiliary loss

REFUSED: dict[str, dict[str, Any]] = {
    "Qwen3Next": HEADS | EXPERTS | LINEAR | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "Qwen3_5": HEADS | LINEAR,
    "Mamba2": ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8,
                      "n_groups": 1},
    "FalconH1": BASE | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
                        "mamba_d_state": 8},
    "Lfm2": BASE | {"layer_types": ["conv", "full_attention", "conv"]},
    "MiniMax": HEADS | LINEAR | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Jamba": BASE | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
                     "mamba_d_state": 8, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "NemotronH": HEADS | {"hybrid_override_pattern": "M*-", "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1,
                          "ssm_state_size": 8},
    "RecurrentGemma": HEADS | {"lru_width": 32, "attention_window_size": 5},
    "Rwkv": ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
    "DeepseekV32": INDEXED,
    "GlmMoeDsa": INDEXED,
    "Bloom": ENDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": ENDS | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "Falcon": OLD | {"alibi": True},
    "GPTNeo": ENDS | GPT_NEO | {"hidden_size": 32, "attention_types": [[["global", "local"], 1]]},
    "Llama4": HEADS | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attn_temperature_tuning": True},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "GPT2": ENDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                    "attn_pdrop": 0.0},
    "Falcon RoPE": OLD | {"alibi": False},
}  # fmt: skip
CLASSES = {"Gemma3": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Qwen3_5": "Qwen3_5TextConfig", "Llama4": "Llama4TextConfig"}


def tiny(name: str, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """The model, in training mode, the same numbers for every attention implementation."""
    stem = name.partition(" ")[0]
    config = getattr(transformers, CONFIGS.get(stem, f"{stem}Config"))(**(SHARED | REFUSED | OTHERS)[name] | changes)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, CLASSES.get(stem, f"{stem}ForCausalLM"))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:  # norms, biases and sinks are 1 or 0 at first: what multiplies by 1 can't be seen
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.2)
    model.train()
    return model


def shared_over(model: PreTrainedModel) -> SharedPrompts:
    """TRL's fused head with all of its fields, and shared prompts over it."""
    add_fused_lm_head(model, outputs=FIELDS)
    return SharedPrompts(model)
