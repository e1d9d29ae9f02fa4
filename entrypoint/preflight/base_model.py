"""The base model, looked at without its weights: the small files, and the header of each safetensors file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from entrypoint.conf import Lora, Model
from entrypoint.errors import ModelError
from entrypoint.model.fetch import list_model
from entrypoint.model.folder import PARTS, Header, check_model, check_parts, header_of, parameters
from entrypoint.storage import explained, is_s3, local_path, s3

BYTES_A_PARAMETER = 12  # of a checkpoint: the weight and Adam's two moments, all in fp32
FIRST_BYTES = 1 << 20  # asked of a weights file on S3 at once; most headers are shorter
# Tables of embeddings and the output layer: matrices to which a LoRA adapter adds nothing.
NOT_LINEAR = re.compile(r"embed|lm_head|wte|wpe|output\.weight$")


class BaseModel:
    """The model at `model.path`; what is looked at is looked at once."""

    def __init__(self, model: Model, endpoint_url: str | None) -> None:
        self._lora = model.lora
        self._path = model.path
        self._endpoint_url = endpoint_url

    def check(self) -> str:
        """What to say of the model.

        Raises:
            ModelError: it can't be read or can't be trained.
        """
        sizes, headers = self._looked_at
        size = gigabytes(sum(sizes.values()))
        return f"{self._path}: {len(sizes)} files, {size}, {parameters(headers):,} parameters"

    @property
    def saved_bytes(self) -> int:
        """About what a checkpoint of the run has to hold.

        Raises:
            ModelError: as `check`.
        """
        headers = self._looked_at[1]
        return BYTES_A_PARAMETER * (_adapter(headers, self._lora) if self._lora.enabled else parameters(headers))

    @cached_property
    def _looked_at(self) -> tuple[dict[str, int], dict[str, Header]]:
        """Every file's bytes, and the headers of those with weights."""
        if not is_s3(self._path):
            folder = local_path(self._path)
            with explained(self._path, ModelError):
                headers = check_model(folder, self._path)
                names = [path for path in folder.iterdir() if PARTS.fullmatch(path.name) or path.name in headers]
                sizes = {path.name: path.stat().st_size for path in names}
            _try_tokenizer(folder)
            return sizes, headers
        url = self._path.rstrip("/")
        with tempfile.TemporaryDirectory() as cache:
            folder = Path(cache)
            with explained(url, ModelError, local=folder):
                fs = s3(self._endpoint_url)
                sizes = list_model(fs, url, self._endpoint_url)
                small = [name for name in sizes if PARTS.fullmatch(name)]
                fs.get([f"{url}/{name}" for name in small], [str(folder / name) for name in small])

                def header(name: str) -> Header:
                    with fs.open(f"{url}/{name}", "rb", block_size=FIRST_BYTES) as file:
                        return header_of(file, sizes[name], f"{url}/{name}")

                headers = check_parts(folder, sizes, header, url)
            _try_tokenizer(folder)
        return sizes, headers


def _try_tokenizer(folder: Path) -> None:
    from entrypoint.data.tokens import load_tokenizer  # imports torch: only where the rest stands

    load_tokenizer(folder)


def gigabytes(size: float) -> str:
    """`65.5 GB`, or in MB where that says more."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _adapter(headers: Mapping[str, Header], lora: Lora) -> int:
    """Parameters of an adapter on every linear layer: rank x (in + out) each."""
    tensors = [item for header in headers.values() for item in header.items()]
    matrices = [tensor["shape"] for name, tensor in tensors if not NOT_LINEAR.search(name)]
    return sum(lora.rank * sum(shape) for shape in matrices if len(shape) == 2)
