"""Reading a checkpoint's tensors with torch's distributed checkpoint, without trusting a pickle.

torch 2.15 reads two pickles without `weights_only`: the file `.metadata`, and every value that is no tensor. Both are
refused here unless they hold nothing but what a checkpoint is made of, whatever the manifest's sums say.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

METADATA = ".metadata"  # torch's name
ALLOWED = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{
        (kind.__module__, kind.__qualname__): kind
        for kind in (
            filesystem._StorageInfo,
            metadata._MEM_FORMAT_ENCODING,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
        )
    },
}


class Reader(dcp.FileSystemReader):
    """torch's reader, with the names in `.metadata` limited to those of its own descriptions."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """What the checkpoint holds.

        Raises:
            pickle.UnpicklingError: the file wants to call something else.
        """
        with open(Path(self.path) / METADATA, "rb") as file:
            found: metadata.Metadata = _Metadata(file).load()
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{METADATA}: names {module}.{name}, which no checkpoint holds")


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises where torch's own call below would run code
        value.seek(0)
        super().load_bytes(read_item, value)


def names(folder: Path) -> set[str]:
    """The flat names of what a checkpoint holds, such as `model.lm_head.weight`."""
    return set(Reader(folder).read_metadata().state_dict_metadata)


def read(state: dict[str, Any], folder: Path) -> None:
    """Fill `state` from a checkpoint, in place; a collective where there are several ranks.

    Raises:
        Exception: the first rank's failure, as it was raised there.
    """
    try:
        dcp.load(state, storage_reader=Reader(folder), planner=_Planner())
    except CheckpointException as error:  # a BaseException, which handlers of errors would miss
        raise next(iter(error.failures.values()))[0] from error
