"""The reference policy's log-probs of the logged responses: computed once, before the first step, kept on disk.

The base model is the reference and, where the traces were sampled from it, the behaviour policy too. No copy of it
stays in memory during training: what the losses need of it is these numbers.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from entrypoint.data.groups import Float32, Groups, Int64
from entrypoint.training.scoring import Forward, log_probs
from entrypoint.world import World

SCHEMA = pa.schema([("response", pa.int64()), ("log_probs", pa.list_(pa.float32()))])
BLOCK = 4096  # responses a rank scores between two files: what a crash in this pass can cost


class ReferenceLogProbs:
    """Per-token log-probs by flat response index, memory-mapped from the parts in `folder`.

    A part is written whole and renamed, and names what it holds, so the parts of any number of ranks and of an
    interrupted pass add up.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[pa.ChunkedArray] = []
        self._where: dict[int, tuple[int, int]] = {}
        self._read: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Find the parts that were written since."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("part-*.arrow")):
            if path.name in self._read:
                continue
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            for at, response in enumerate(table.column("response").to_pylist()):
                self._where[response] = (len(self._parts), at)
            self._parts.append(table.column("log_probs"))
            self._read.add(path.name)

    def __getitem__(self, response: int) -> Float32:
        """Nats of each token of a response. Shape: (R,)."""
        part, at = self._where[response]
        values: Float32 = self._parts[part][at].values.to_numpy()
        return values

    def missing(self, responses: Int64) -> Int64:
        """Those of `responses` that no part holds."""
        return np.array([r for r in responses.tolist() if r not in self._where], np.int64)

    def compute(
        self,
        forward: Forward,
        groups: Groups,
        responses: Int64,
        *,
        pad: int,
        budget: int,
        device: torch.device,
        world: World,
    ) -> int:
        """Score what is missing of `responses` with the base model; returns how many that were."""
        missing = self.missing(responses)
        world.barrier()  # before anyone writes: all must see the same parts
        for start in range(0, len(missing), BLOCK * world.size):
            block = missing[start : start + BLOCK * world.size]
            scored = list(log_probs(forward, groups, block, pad=pad, budget=budget, device=device, world=world))
            if scored:
                self._write(scored)
        world.barrier()
        self.refresh()
        return len(missing)

    def _write(self, scored: list[tuple[int, Float32]]) -> None:
        scored.sort(key=lambda pair: pair[0])
        table = pa.table([[r for r, _ in scored], [values for _, values in scored]], schema=SCHEMA)
        name = f"part-{scored[0][0]:012d}-{scored[-1][0]:012d}-{len(scored)}.arrow"
        partial = self.folder / f".{name}.{os.getpid()}"
        with partial.open("wb") as raw:
            with pa.ipc.new_file(raw, SCHEMA) as sink:
                sink.write_table(table)
            raw.flush()
            os.fsync(raw.fileno())
        partial.rename(self.folder / name)
