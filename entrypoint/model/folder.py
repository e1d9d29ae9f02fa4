"""Model folder: what a base model in Hugging Face's layout must hold, checked without reading weights; its identity.

Only headers and small files are read: a model of any size is checked and named in well under a second.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from entrypoint.errors import ModelError

Header = dict[str, dict[str, Any]]  # of a weights file: tensor name to {dtype, shape, data_offsets}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What makes the model: README, run.json and training leftovers beside it are neither fetched nor part of its identity.
PARTS = re.compile(
    r"(config|generation_config|special_tokens_map|added_tokens|processor_config|preprocessor_config)\.json"
    r"|(tokenizer|vocab|merges|chat_template|spiece|sentencepiece)[\w.-]*\.(json|txt|jinja|model|spm)"
    r"|[\w.-]+\.(jinja|tiktoken)"
    rf"|{re.escape(INDEX)}"
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
SMALL = 1 << 20  # bytes; smaller files are part of the identity as a whole
PROBES = 16  # places in a larger file that are
PROBE = 1 << 16  # bytes of each of them, the first and the last excepted, which have SMALL


def check_names(names: Collection[str], where: str) -> None:
    """Check that a listing holds a configuration, a tokenizer and safetensors weights.

    Raises:
        ModelError: something is missing, or the weights are pickles only, which are never loaded.
    """
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise ModelError(
                f"{where}: holds a LoRA adapter, not a model; name a model folder (merge the adapter first)"
            )
        raise ModelError(f"{where}: no config.json; expected a model in Hugging Face's layout")
    if INDEX not in names and SINGLE not in names:
        pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        if pickles:
            raise ModelError(
                f"{where}: only pickle weights ({pickles[0]}); convert them to safetensors, nothing else is loaded"
            )
        raise ModelError(f"{where}: no weights; expected {SINGLE} or {INDEX} with its shards")
    if not any(name in TOKENIZERS or name.endswith(".tiktoken") for name in names):
        raise ModelError(f"{where}: no tokenizer; expected one of {', '.join(TOKENIZERS)}")


def weight_names(names: Collection[str], index: Mapping[str, Any] | None, where: str) -> set[str]:
    """The weights files that the model loads: the index's shards, else the single file.

    Raises:
        ModelError: the index is no index, or names a shard that `names` lacks.
    """
    if index is None:
        return {SINGLE}
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise ModelError(f"{where}/{INDEX}: no weight_map; expected the index that save_pretrained writes")
    missing = sorted(set(shards.values()) - set(names))
    if missing:
        raise ModelError(
            f"{where}: {INDEX} names {missing[0]}, which is missing ({len(missing)} in all); copy the model again"
        )
    return set(shards.values())


def check_model(folder: Path, where: str | None = None) -> dict[str, Header]:
    """Check a model folder without loading it.

    Args:
        where: how errors name the folder, where that is not its own path.

    Returns:
        The headers of its weights files, by name.

    Raises:
        ModelError: a missing or torn file, code of its own, quantised weights, or no causal language model.
    """
    where = where or str(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise ModelError(f"{where}: {what}; expected a folder or s3:// with a model in Hugging Face's layout")
    names = {entry.name for entry in folder.iterdir() if entry.is_file()}
    return check_parts(folder, names, lambda name: read_header(folder / name, where), where)


def check_parts(folder: Path, names: Collection[str], header: Callable[[str], Header], where: str) -> dict[str, Header]:
    """Check what makes a model; its weights need not be in `folder`.

    Args:
        folder: holds the small files (PARTS).
        names: every file of the model.
        header: the header of a weights file, by name.

    Returns:
        The headers of the weights files, by name.

    Raises:
        ModelError: as `check_model`.
    """
    check_names(names, where)
    texts = {
        name: read_json(folder / name, where) for name in names if PARTS.fullmatch(name) and name.endswith(".json")
    }
    _check_config(texts["config.json"], where)
    index = texts.get(INDEX)
    headers = {name: header(name) for name in sorted(weight_names(names, index, where))}
    for tensor, shard in index["weight_map"].items() if index is not None else ():
        if tensor not in headers[shard]:
            raise ModelError(f"{where}/{shard}: lacks the tensor {tensor} that {INDEX} promises; copy the model again")
    return headers


def model_identity(folder: Path) -> str:
    """Hex SHA-256 that names a model by content, not by place or time.

    Made of names and sizes, of small files whole, and of each larger one's first and last MiB and 14 places between.
    """
    names = {entry.name for entry in folder.iterdir() if entry.is_file()}
    index = read_json(folder / INDEX, str(folder)) if INDEX in names else None
    parts = {name for name in names if PARTS.fullmatch(name)} | weight_names(names, index, str(folder))
    digest = hashlib.sha256()
    for name in sorted(parts):
        path = folder / name
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(_sample(path))
    return digest.hexdigest()


def parameters(headers: Mapping[str, Header]) -> int:
    """Parameters of the weights files with these headers."""
    return sum(math.prod(tensor["shape"]) for header in headers.values() for tensor in header.values())


def base_dtype(folder: Path) -> str:
    """The model's dtype, `float32`, `bfloat16` or `float16`: what config.json says, else what most of its bytes are.

    Raises:
        ModelError: it is another one.
    """
    config = read_json(folder / "config.json", str(folder))
    said = config.get("dtype") or config.get("torch_dtype")
    if said is not None:
        name = str(said).removeprefix("torch.")
    else:
        names = {entry.name for entry in folder.iterdir()}
        index = read_json(folder / INDEX, str(folder)) if INDEX in names else None
        sizes: Counter[str] = Counter()
        for weights in weight_names(names, index, str(folder)):
            for tensor in read_header(folder / weights, str(folder)).values():
                sizes[tensor["dtype"]] += tensor["data_offsets"][1] - tensor["data_offsets"][0]
        most = sizes.most_common(1)[0][0] if sizes else "nothing"
        name = DTYPES.get(most, most)
    if name not in DTYPES.values():
        raise ModelError(f"{folder}: weights are {name}; expected one of {', '.join(DTYPES.values())}")
    return name


def read_header(path: Path, where: str) -> Header:
    """The header of a local safetensors file; see `header_of`."""
    with open(path, "rb") as file:
        return header_of(file, path.stat().st_size, f"{where}/{path.name}")


def header_of(file: BinaryIO, size: int, name: str) -> Header:
    """Tensor name to {dtype, shape, data_offsets} of a safetensors file, checked against the file's size.

    Args:
        file: opened at its start.
        size: bytes of the whole file.
        name: how messages call it.

    Raises:
        ModelError: the file is torn or no safetensors file.
    """
    start = file.read(8)
    if start.startswith(b"version "):
        raise ModelError(f"{name}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(LONGEST_HEADER, size - 8):
        raise ModelError(f"{name}: torn: {size} bytes do not hold a safetensors header; copy it again")
    text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = _data_end(header)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{name}: its safetensors header can't be read ({type(error).__name__}); copy it again"
        ) from error
    if 8 + length + end != size:
        raise ModelError(f"{name}: torn: {size} bytes where its header promises {8 + length + end}; copy it again")
    return dict(header)


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: it is torn or no object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ModelError(f"{where}/{path.name}: can't be read as JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{where}/{path.name}: holds a JSON {type(content).__name__}; expected an object")
    return content


def _data_end(header: dict[str, Any]) -> int:
    """Where the last tensor ends, in bytes after the header; tensors must follow each other without a gap."""
    end = 0
    for tensor in sorted(header.values(), key=lambda tensor: tuple(tensor["data_offsets"])):
        first, last = tensor["data_offsets"]
        width = DTYPE_BYTES.get(tensor["dtype"])
        if first != end or last < first or (width and math.prod(tensor["shape"]) * width != last - first):
            raise ValueError("offsets, shape and dtype disagree")
        end = last
    return end


def _check_config(config: dict[str, Any], where: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{where}/config.json: no model_type; expected the configuration that save_pretrained writes")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if config.get("auto_map"):
            raise ModelError(
                f"{where}/config.json: model_type {kind!r} needs code that comes with the model (auto_map), "
                "which is never run; use a model whose class transformers has"
            )
        raise ModelError(f"{where}/config.json: transformers has no causal language model of model_type {kind!r}")
    if config.get("quantization_config"):
        raise ModelError(f"{where}/config.json: the weights are quantised; training needs the unquantised model")


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        if size <= 2 * SMALL:
            return hashlib.file_digest(file, "sha256").digest()
        for place in range(PROBES):
            length = SMALL if place in (0, PROBES - 1) else PROBE
            file.seek((size - length) * place // (PROBES - 1))
            digest.update(file.read(length))
    return digest.digest()
