"""Final model: a trained model as Hugging Face safetensors in the wanted dtype, with its tokenizer."""

from __future__ import annotations

import copy
import json
import logging
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SHARD = "5GB"  # a shard's upload is what a bad network makes one repeat
ADAPTER = "default"  # peft's name of the only adapter


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    state_dict: dict[str, Any] | None = None,
    merge: bool = False,
    base: str | None = None,
) -> None:
    """Write a folder that `from_pretrained` alone can load; the model in memory is left as it is.

    Args:
        model: unwrapped; a transformers model or a peft one.
        dtype: of the weights on disk; what the model keeps in fp32 stays so.
        state_dict: the whole weights where the model holds shards only; it is emptied on the way, to save memory.
        merge: for a peft model, write the base with the adapter merged in; otherwise the adapter alone.
        base: what an adapter names as its base model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(model.state_dict()) if state_dict is None else state_dict
    if not hasattr(model, "peft_config"):
        _save_whole(model, weights, folder, dtype)
    elif merge:
        _save_whole(model.get_base_model(), merged(model, weights), folder, dtype)
    else:
        _save_adapter(model, weights, folder, dtype, base)
    tokenizer.save_pretrained(folder)
    let_read(folder)


def let_read(folder: Path) -> None:
    """Give a saved model's weights the mode of the files beside them: safetensors lets their owner alone read them."""
    mode = (folder / "tokenizer_config.json").stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(stat.S_IMODE(mode))


def merged(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """The base model's weights with LoRA's W + scale B A in place of W (arXiv 2106.09685), by the base's names.

    From the weights rather than by peft's merge, which changes the model in memory and needs it whole.
    """
    import torch

    prefix, out = "base_model.model.", {}
    with torch.no_grad():
        for name in list(weights):
            if ".lora_" in name:
                continue
            path = name.removeprefix(prefix)
            weight = weights[name]
            if name.endswith(".base_layer.weight"):
                place = name.removesuffix(".base_layer.weight")
                layer = model.get_submodule(place)
                a, b = (weights[f"{place}.lora_{factor}.{ADAPTER}.weight"].float() for factor in "AB")
                delta = (b @ a) * layer.scaling[ADAPTER]
                weight = weight + (delta.T if layer.fan_in_fan_out else delta).to(weight.dtype)
            out[path.replace(".base_layer.", ".")] = weight
    return out


def cast(model: Any, weights: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating-point weights in `dtype` on the CPU; empties `weights`. Weights that share memory still do."""
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    seen: dict[tuple[Any, ...], Any] = {}
    out = {}
    for name in list(weights):
        tensor = weights.pop(name).detach()
        key = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if key not in seen:
            keep = not tensor.is_floating_point() or any(part in name for part in kept)
            seen[key] = tensor.to("cpu") if keep else tensor.to("cpu", dtype)
        out[name] = seen[key]
    for tied, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if tied in out and source in out:  # gathered shards share no memory any more
            out[tied] = out[source]
    return out


def _save_whole(model: PreTrainedModel, weights: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    with _valid_generation_config(model), _unchanged_config(model):
        model.save_pretrained(folder, state_dict=cast(model, weights, dtype), max_shard_size=SHARD)
    # save_pretrained writes the dtype of the model in memory, in which a reader would load it.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(_with_dtype(config, str(dtype).removeprefix("torch.")), indent=2, sort_keys=True) + "\n")


def _save_adapter(model: Any, weights: Mapping[str, Any], folder: Path, dtype: torch.dtype, base: str | None) -> None:
    own = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    config = model.peft_config[ADAPTER]
    before, config.base_model_name_or_path = config.base_model_name_or_path, base or config.base_model_name_or_path
    try:
        # save_embedding_layers: `auto` asks the hub whether the vocabulary was resized.
        model.save_pretrained(folder, state_dict=cast(model, own, dtype), save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = before
    (folder / "README.md").unlink(missing_ok=True)  # peft's form to fill in, empty


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration, and those inside it, with another dtype."""
    changed = {key: _with_dtype(value, name) if isinstance(value, dict) else value for key, value in config.items()}
    return {**changed, "dtype": name} if "dtype" in config or "model_type" in config else changed


@contextmanager
def _unchanged_config(model: PreTrainedModel) -> Iterator[None]:
    dtype, architectures = model.config.dtype, model.config.architectures
    try:
        yield
    finally:
        model.config.dtype, model.config.architectures = dtype, architectures


@contextmanager
def _valid_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """save_pretrained refuses a generation config that contradicts itself, as many base models' do.

    A run must not fail by it at its end: sampling numbers imply do_sample, else transformers' defaults are written.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    for candidate in (own, _sampling(own), GenerationConfig.from_model_config(model.config)):
        try:
            candidate.validate(strict=True)
        except ValueError as error:
            log.warning("generation_config.json of the base model contradicts itself: %s", str(error).splitlines()[0])
            continue
        model.generation_config = candidate
        break
    try:
        yield
    finally:
        model.generation_config = own


def _sampling(config: Any) -> Any:
    changed = copy.deepcopy(config)
    changed.do_sample = True
    return changed
