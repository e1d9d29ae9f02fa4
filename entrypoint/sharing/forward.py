"""Laid over a model's forward with TRL's fused head: each distinct prompt of a batch is computed once.

TRL's trainers call a model in one way, `model(input_ids, attention_mask, labels, fused_lm_head=True)`, and read
per-token fields of shape (B, L - 1). They get the same fields of the same shape; no trainer knows of it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel
from trl.trainer import utils as trl_utils

from entrypoint.sharing.attention import install, masks, padding
from entrypoint.sharing.layout import Layout, lay_out

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
BY_LENGTH = ("dynamic", "longrope")
HEAD_TILE = 1024  # logits a token that a CPU's cache holds: the head took 1.6 times as long with TRL's 32768
UNDERSTOOD = {"input_ids", "attention_mask", "labels", "fused_lm_head", "output_router_logits", "use_cache"}


class SharedPrompts:
    """What lies over the model; `enabled`: whether it is used, otherwise every call is the plain forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Lay it over `model`, which must have TRL's fused head already."""
        install()
        self.enabled = True
        self._model = model
        self._plain = model.forward
        self._config: Any = model.config.get_text_config()

        @functools.wraps(type(model).forward)
        def forward(owner: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            return self._forward(owner, *args, **kwargs)

        model.forward = types.MethodType(forward, model)

    def ways(self) -> list[str]:
        """The attention implementations to try, best first.

        A model that has no `sdpa` would add a mask of tokens x tokens; on CUDA FlexAttention skips what it hides (on a
        CPU it has no backward pass).
        """
        own = self._config._attn_implementation
        flex = own == "eager" and self._model.device.type == "cuda" and self._model._supports_flex_attn
        return ["flex_attention", own] if flex else [own]

    def use(self, attention: str) -> None:
        """Compute attention by this implementation from now on."""
        if attention != self._config._attn_implementation:
            self._model.set_attn_implementation(attention)

    def give_up(self) -> None:
        """Every call is the plain forward from now on."""
        self.enabled = False

    @contextmanager
    def off(self) -> Iterator[None]:
        """The plain forward for a while."""
        self.enabled, before = False, self.enabled
        try:
            yield
        finally:
            self.enabled = before

    def _forward(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT names what it has not
        scores = given.get("fused_lm_head", False) and "labels" in given and not args
        if not (self.enabled and scores and set(given) <= UNDERSTOOD):
            return self._plain(*args, **kwargs)
        router = given.get("output_router_logits", getattr(self._config, "output_router_logits", False))
        whole = router or _goes_by_length(self._config)
        layout = lay_out(given["input_ids"], given.get("attention_mask"), given["labels"], whole=whole)
        if layout is None:
            return self._plain(*args, **kwargs)
        return self._packed(model, layout, given["input_ids"], given["labels"], router=router)

    def _packed(
        self, model: PreTrainedModel, layout: Layout, input_ids: torch.Tensor, labels: torch.Tensor, *, router: bool
    ) -> Any:
        device = input_ids.device
        extra = padding(self._config, len(layout))

        def row(values: Any, fill: int = 0) -> torch.Tensor:
            return torch.nn.functional.pad(torch.from_numpy(values), (0, extra), value=fill).to(device)[None]

        mask = masks(self._config, layout, device, model.dtype)
        scored, place, source = (
            torch.from_numpy(where).to(device) for where in (layout.scored, layout.place, layout.source)
        )
        options = {"output_router_logits": True} if router else {}
        with _between(model.base_model, mask, scored), _head_tile(device):
            out = self._plain(
                input_ids=row(layout.ids),
                position_ids=row(layout.positions),
                # For the router's auxiliary loss, which counts a shared token as often as the batch has it.
                attention_mask=row(layout.counts),
                shift_labels=torch.from_numpy(layout.labels).to(device)[None],
                fused_lm_head=True,
                **options,
            )
        shape = (labels.shape[0], labels.shape[1] - 1)
        for name in FIELDS:
            found = getattr(out, name)
            if found is not None:
                spread = found.new_zeros(shape[0] * shape[1]).index_put((place,), found[0].index_select(0, source))
                setattr(out, name, spread.view(shape))
        out.label_mask = labels[:, 1:] != -100
        out.loss = -out.log_probs.sum() / len(place)  # the head's is a mean over what it computed
        if router:
            out.loss = out.loss + getattr(self._config, "router_aux_loss_coef", 0.0) * out.aux_loss
        return out


def _goes_by_length(config: Any) -> bool:
    """Whether the longest row of a batch decides how all positions are scaled (Phi-3's long variants, NTK)."""
    rope = getattr(config, "rope_parameters", None) or {}
    return any(each.get("rope_type") in BY_LENGTH for each in (rope, *rope.values()) if isinstance(each, dict))


def _head_tile(device: torch.device) -> AbstractContextManager[Any]:
    """TRL's head sized for a CPU, where it goes over a tile of logits a dozen times; on CUDA its kernel goes once."""
    if device.type != "cpu":
        return nullcontext()
    return patch.object(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", HEAD_TILE)


@contextmanager
def _between(backbone: torch.nn.Module, mask: Any, scored: torch.Tensor) -> Iterator[None]:
    """The backbone gets the masks; the head gets the hidden states that are scored, a prompt's last one repeated."""

    def before(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    def after(module: torch.nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.index_select(1, scored)
        return output

    hooks = (backbone.register_forward_pre_hook(before, with_kwargs=True), backbone.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
