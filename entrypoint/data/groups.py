"""`Groups`: the prepared traces as training sees them; one row IS one prompt with all of its responses.

The file is an Arrow IPC stream that is memory-mapped: ten million rows cost no memory until they are read, and all
ranks of a node share the pages. Lengths and rewards come as numpy arrays over the whole set, since samplers need them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:  # takes seconds to import: only what maps groups pays for it
    import datasets

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

SCHEMA = pa.schema(
    [
        ("prompt_hash", pa.string()),  # sha256 of the canonical prompt, hexadecimal
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.list_(pa.int32()))),  # each ends with end-of-sequence
        ("rewards", pa.list_(pa.float64())),  # descending
        ("behaviour_logps", pa.list_(pa.list_(pa.float32()))),  # inner null: not recorded, or for other tokens
        ("source", pa.string()),  # the best response's row, for messages
    ]
)


@dataclass(frozen=True)
class Group:
    """One prompt with its G responses, best first.

    Shape: prompt_ids (P,); response_ids G arrays (R_i,), each ending with end-of-sequence; rewards (G,), descending;
    behaviour_logps G entries, each None or (R_i,) in nats, NaN where a token's was not recorded.
    """

    prompt_hash: str
    prompt_ids: Int32
    response_ids: tuple[Int32, ...]
    rewards: Float64
    behaviour_logps: tuple[Float32 | None, ...]
    source: str


class Groups(Sequence[Group]):
    """Prepared groups over a memory-mapped `datasets.Dataset` in SCHEMA, in the order of their prompt hashes."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset
        self._arrow = dataset.with_format("arrow")

    @classmethod
    def from_file(cls, path: Path) -> Groups:
        """Map the Arrow IPC stream at `path`."""
        import datasets

        return cls(datasets.Dataset.from_file(str(path)))

    @classmethod
    def from_lists(cls, rows: Iterable[Mapping[str, Any]]) -> Groups:
        """Groups in memory, for tests: see `table` for what a row holds."""
        import datasets

        return cls(datasets.Dataset(table(rows)))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """Group `index`; a slice gives a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"group {i} of {len(self)}")
        row = self._arrow[i % len(self)]
        responses = row["response_ids"][0].values
        logps = row["behaviour_logps"][0].values
        return Group(
            prompt_hash=row["prompt_hash"][0].as_py(),
            prompt_ids=_numpy(row["prompt_ids"][0].values),
            response_ids=tuple(_numpy(response.values) for response in responses),
            rewards=_numpy(row["rewards"][0].values),
            behaviour_logps=tuple(_numpy(logp.values) if logp.is_valid else None for logp in logps),
            source=row["source"][0].as_py() or "",
        )

    def __iter__(self) -> Iterator[Group]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def prompt_lengths(self) -> Int64:
        """Tokens of each prompt. Shape: (N,)."""
        return _join(pc.list_value_length(chunk) for chunk in self._chunks("prompt_ids"))

    @cached_property
    def sizes(self) -> Int64:
        """Responses of each group. Shape: (N,)."""
        return _join(pc.list_value_length(chunk) for chunk in self._chunks("rewards"))

    @cached_property
    def offsets(self) -> Int64:
        """Where each group's responses begin in the flat arrays below. Shape: (N + 1,)."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes)])

    @cached_property
    def response_lengths(self) -> Int64:
        """Tokens of every response, end-of-sequence included, flat. Shape: (offsets[-1],)."""
        return _join(pc.list_value_length(pc.list_flatten(chunk)) for chunk in self._chunks("response_ids"))

    @cached_property
    def rewards(self) -> Float64:
        """Rewards of every response, flat. Shape: (offsets[-1],)."""
        parts = [_numpy(pc.list_flatten(chunk)) for chunk in self._chunks("rewards")]
        return np.concatenate([np.zeros(0), *parts])

    def rewards_of(self, i: int) -> Float64:
        """Rewards of group i, descending. Shape: (G,)."""
        return self.rewards[self.offsets[i] : self.offsets[i + 1]]

    def lengths_of(self, i: int) -> Int64:
        """Tokens of group i's responses, end-of-sequence included. Shape: (G,)."""
        return self.response_lengths[self.offsets[i] : self.offsets[i + 1]]

    def _chunks(self, column: str) -> list[pa.Array]:
        # Chunk by chunk, never joined: list offsets are 32-bit, and a large set has more tokens than that.
        chunks: list[pa.Array] = self._arrow.data.column(column).chunks
        return chunks


def table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Groups written out as lists, for tests, in the given order.

    A row needs `prompt_ids`, `response_ids` and `rewards` (descending); `prompt_hash`, `behaviour_logps` and `source`
    have defaults.
    """
    full = []
    for number, row in enumerate(rows):
        defaults = {
            "prompt_hash": f"{number:064x}",
            "behaviour_logps": [None] * len(row["rewards"]),
            "source": f"test row {number}",
        }
        full.append(defaults | dict(row))
    return pa.Table.from_pylist(full, schema=SCHEMA)


def write_groups(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """`table(rows)` as the file that `Groups.from_file` maps; returns `path`."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(table(rows))
    return path


def _numpy(values: pa.Array) -> Any:
    return values.to_numpy(zero_copy_only=False)


def _join(parts: Iterable[pa.Array]) -> Int64:
    return np.concatenate([np.zeros(0, np.int64), *(_numpy(part).astype(np.int64) for part in parts)])
