"""The reference policy's log-probs of the logged responses: computed once, before the first step, kept on disk.

The base model is the reference and, where the traces were sampled from it, the behaviour policy too. No copy of it
stays in memory during training: what the losses need of it is these numbers.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from entrypoint.data.groups import Float32, Groups, Int64
from entrypoint.errors import DataError
from entrypoint.storage import explained
from entrypoint.training.scoring import Scorer

SCHEMA = pa.schema([("response", pa.int64()), ("log_probs", pa.list_(pa.float32()))])
BLOCK = 4096  # responses a rank scores between two files: what a crash in this pass can cost


class ReferenceLogProbs:
    """Per-token log-probs by flat response index, memory-mapped from the parts in `folder`.

    A part is written whole and renamed, and names what it holds, so the parts of any number of ranks and of an
    interrupted pass add up.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refresh()

    def refresh(self, names: list[str] | None = None) -> None:
        """Open the parts of these names; None: those that this rank sees."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._columns: list[pa.ChunkedArray] = []
        responses, parts, places = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for number, path in enumerate(self.folder / name for name in (self._names() if names is None else names)):
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            responses.append(table.column("response").to_numpy())
            parts.append(np.full(len(table), number, np.int32))
            places.append(np.arange(len(table), dtype=np.int32))
            self._columns.append(table.column("log_probs"))
        # Sorted arrays, not a dict: ten million responses on each of eight ranks are to fit beside a model.
        self._known, first = np.unique(np.concatenate(responses), return_index=True)
        self._part, self._place = np.concatenate(parts)[first], np.concatenate(places)[first]

    def __getitem__(self, response: int) -> Float32:
        """Nats of each token of a response. Shape: (R,)."""
        at = int(np.searchsorted(self._known, response))
        if at == len(self._known) or self._known[at] != response:
            raise KeyError(response)
        values: Float32 = self._columns[self._part[at]][int(self._place[at])].values.to_numpy()
        return values

    def missing(self, responses: Int64) -> Int64:
        """Those of `responses` that no part holds, ascending."""
        return np.setdiff1d(responses, self._known)

    def compute(self, scorer: Scorer, groups: Groups, responses: Int64) -> int:
        """Score what is missing of `responses` with the base model; returns how many that were.

        Raises:
            StoppedError: told to stop; what was scored so far is kept, and a later pass goes on from there.
            DataError: the disk does not take it.
        """
        world = scorer.world
        # Rank 0's listing for all: another run may be adding parts, and ranks must agree on what is missing.
        self.refresh(world.once(self._names))
        missing = self.missing(responses)
        # Blocks of all responses, not of the missing ones: a pass that was stopped goes on with the same calls.
        for start in range(0, len(responses), BLOCK * world.size):
            block = responses[start : start + BLOCK * world.size]
            known = set(np.setdiff1d(block, missing).tolist())
            if len(known) == len(block):
                continue
            scored: list[tuple[int, Float32]] = []
            try:
                scored.extend(scorer.log_probs(groups, block, known))
            finally:
                if scored:
                    self._write(scored)
            world.barrier()
        self.refresh(world.once(self._names))
        return len(missing)

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("part-*.arrow"))

    def _write(self, scored: list[tuple[int, Float32]]) -> None:
        scored.sort(key=lambda pair: pair[0])
        table = pa.table([[r for r, _ in scored], [values for _, values in scored]], schema=SCHEMA)
        name = f"part-{scored[0][0]:012d}-{scored[-1][0]:012d}-{len(scored)}.arrow"
        partial = self.folder / f".{name}.{os.getpid()}"
        with explained(str(partial), DataError):
            with partial.open("wb") as raw:
                with pa.ipc.new_file(raw, SCHEMA) as sink:
                    sink.write_table(table)
                raw.flush()
                os.fsync(raw.fileno())
            partial.rename(self.folder / name)
