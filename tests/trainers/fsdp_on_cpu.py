"""Lets accelerate's FSDP2 path run on CPU, where it is silently replaced by DDP otherwise: a test fixture."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    """From now on an `fsdp_plugin` given on CPU is kept, and the state says FSDP."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plugin = kwargs.get("fsdp_plugin")
        original(self, *args, **kwargs)
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            if self._mixed_precision == "bf16":
                plugin.set_mixed_precision("bf16")  # as accelerate does where it finds CUDA
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
