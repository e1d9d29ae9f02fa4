"""Staging: a copy of the run's state in CPU memory, so that training goes on while it is written."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor


class Staging:
    """Copies a state into buffers that are allocated once and used again at each copy.

    Those of all ranks together hold 12 bytes a trained parameter: an fp32 weight and Adam's two moments. Where the
    state is on a GPU they are page-locked, so that the device copies into them directly.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def reserve(self, state: dict[str, Any]) -> None:
        """Allocate the buffers of a state, which need not be its newest."""
        self._copy(state, "", {}, fill=False)

    @torch.no_grad()
    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with every tensor copied; complete when this returns. The copy before it is overwritten."""
        staged: dict[str, Any] = self._copy(state, "", {}, fill=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return staged

    def _copy(self, value: Any, name: str, copied: dict[tuple[Any, ...], torch.Tensor], *, fill: bool) -> Any:
        if isinstance(value, dict):
            return {key: self._copy(item, f"{name}.{key}", copied, fill=fill) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, f"{name}.{at}", copied, fill=fill) for at, item in enumerate(value))
        if isinstance(value, DTensor):
            return DTensor(self._copy(value.to_local(), name, copied, fill=fill), value._spec, requires_grad=False)
        if not isinstance(value, torch.Tensor):
            return value
        same = (value.data_ptr(), value.dtype, value.shape, value.stride())  # tied weights have two names
        if value.numel() and same in copied:
            return copied[same]
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[name] = buffer
        copied[same] = buffer.copy_(value, non_blocking=value.is_cuda) if fill else buffer
        return buffer
