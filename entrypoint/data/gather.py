"""The second pass: the rows that the index left, read again, brought together by prompt, tokenised and written.

Rows are sorted by the SHA-256 of their prompt, on disk where memory is short, so the result depends on the rows
alone, never on which file holds them. Group by group they become token ids; what is too long goes, and the rules for
groups are applied again to what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from entrypoint.data.chat import canonical
from entrypoint.data.groups import SCHEMA, Float64, Int64
from entrypoint.data.index import Feed, Index, database, drop_groups, large, skipped
from entrypoint.data.report import Counts, Reason
from entrypoint.data.rules import Rules, group_reasons
from entrypoint.data.scan import Scan, Unread
from entrypoint.data.tokens import Tokens

ROWS = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.large_string()),
        ("prompt", pa.large_string()),
        ("chat", pa.bool_()),
        ("response", pa.large_string()),
        ("reward", pa.float64()),
        ("logps", pa.list_(pa.float32())),
        ("ids", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True)
class Split:
    """Where groups go: held out if the first 64 bits of the prompt's hash, as a fraction, are below the share."""

    held_out_share: float

    def held_out(self, hashes: list[str]) -> npt.NDArray[np.bool_]:
        """Shape: (N,)."""
        return np.array([int(prompt_hash[:16], 16) / 2**64 < self.held_out_share for prompt_hash in hashes], bool)


def sorted_rows(scan: Scan, rules: Rules, index: Index, spill: Path) -> Iterator[pa.Table]:
    """The rows of `index` in batches of whole prompts: sorted by prompt hash, then best first, then by text.

    Columns: `hash` (sha256 of the prompt's key, hexadecimal) and those of ROWS but `key`.
    """
    feed = Feed(ROWS, _kept(scan, rules, index))
    with database(spill) as connection, feed.feeding():
        connection.register("kept", feed.reader)
        # The text of equal prompts repeats: they are told apart by the key's hash alone.
        query = "SELECT sha256(key) AS hash, * EXCLUDE (key) FROM kept ORDER BY hash"
        rest: pa.Table | None = None
        for batch in connection.sql(query).to_arrow_reader(scan.batch_rows):
            table = pa.Table.from_batches([batch])
            table = table if rest is None else pa.concat_tables([rest, table])
            # The last prompt may go on in the next batch.
            end = int(np.searchsorted(_strings(table["hash"]), table["hash"][-1].as_py()))
            rest = table.slice(end)
            if end:
                yield _ordered(table.slice(0, end))
        if rest is not None:
            yield _ordered(rest)


def _strings(column: pa.ChunkedArray) -> npt.NDArray[np.str_]:
    return np.asarray(column.to_numpy(), dtype="U64")


def _ordered(table: pa.Table) -> pa.Table:
    return table.sort_by([("hash", "ascending"), ("reward", "descending"), ("response", "ascending")])


def _kept(scan: Scan, rules: Rules, index: Index) -> Iterator[pa.RecordBatch]:
    """The rows of `index`, as they lie in the files, with the rewards of the index (means, where merged)."""
    logps, ids = rules.columns.logps, rules.columns.token_ids
    for batch in scan.batches(frozenset(skipped(scan, rules))):
        if isinstance(batch, Unread):
            continue
        first, last = np.searchsorted(index.rows, [batch.start, batch.start + batch.rows])
        if first == last:
            continue
        where = pa.array(index.rows[first:last] - batch.start)
        texts = canonical(
            batch.columns["input"].take(where), batch.columns["output"].take(where), form=rules.form, match=rules.match
        )
        nothing = pa.nulls(last - first)
        yield pa.RecordBatch.from_arrays(
            [
                pa.array(index.rows[first:last]),
                large(texts.key),
                large(texts.prompt),
                pa.array(texts.chat),
                large(texts.response),
                pa.array(index.rewards[first:last]),
                (batch.columns[logps].take(where) if logps else nothing).cast(ROWS.field("logps").type),
                (batch.columns[ids].take(where) if ids else nothing).cast(ROWS.field("ids").type),
            ],
            schema=ROWS,
        )


class Writer:
    """Tokenises batches of sorted rows and writes the groups that are left to `train` and `held_out`."""

    def __init__(
        self, tokens: Tokens, rules: Rules, counts: Counts, scan: Scan, split: Split, max_length: int, folder: Path
    ) -> None:
        self._tokens = tokens
        self._rules = rules
        self._counts = counts
        self._scan = scan
        self._split = split
        self._max_length = max_length
        self._folder = folder

    def write(self, batches: Iterator[pa.Table]) -> None:
        """Write every batch; `train.arrow` and `held_out.arrow` are there afterwards, perhaps without a group."""
        with (
            pa.OSFile(str(self._folder / "train.arrow"), "wb") as train_file,
            pa.OSFile(str(self._folder / "held_out.arrow"), "wb") as held_out_file,
            pa.ipc.new_stream(train_file, SCHEMA) as train,
            pa.ipc.new_stream(held_out_file, SCHEMA) as held_out,
        ):
            for table in batches:
                groups = self._groups(table)
                chosen = self._split.held_out(groups["prompt_hash"].to_pylist())
                rows = pc.list_value_length(groups["rewards"]).to_numpy(zero_copy_only=False)
                for writer, where in ((train, ~chosen), (held_out, chosen)):
                    if where.any():
                        writer.write_batch(groups.filter(pa.array(where)))
                self._counts.train_groups += int((~chosen).sum())
                self._counts.held_out_groups += int(chosen.sum())
                self._counts.train_rows += int(rows[~chosen].sum())
                self._counts.held_out_rows += int(rows[chosen].sum())
        self._counts.refusal = self._tokens.refusal

    def _groups(self, table: pa.Table) -> pa.RecordBatch:
        """The groups of some whole prompts, in SCHEMA."""
        hashes = _strings(table["hash"])
        starts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
        prompts = self._prompts(table, starts)
        responses = self._tokens.responses(table["response"].to_pylist())
        group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(hashes))))
        refused = np.array([prompt is None for prompt in prompts], bool)[group]
        empty = np.array([prompt == [] for prompt in prompts], bool)[group]  # of characters that the tokenizer drops
        lengths = np.array([len(prompt or ()) for prompt in prompts], np.int64)[group]
        lengths += np.array([len(response) for response in responses], np.int64)
        long = ~refused & ~empty & (lengths > self._max_length)
        self._counts.drop(Reason.UNPARSABLE, int(refused.sum()))
        self._counts.drop(Reason.EMPTY, int(empty.sum()))
        self._counts.drop(Reason.TOO_LONG, int(long.sum()))
        rewards = table["reward"].to_numpy()
        rows = self._left(group, rewards, np.flatnonzero(~(refused | empty | long)))
        group = group[rows]
        firsts = np.flatnonzero(np.append(True, group[1:] != group[:-1])) if len(group) else group
        ends = np.append(firsts, len(rows)).astype(np.int32)
        numbers = [responses[row] for row in rows]
        sources = [self._scan.source(row) for row in table["row"].to_numpy()[rows[firsts]]]
        return pa.RecordBatch.from_arrays(
            [
                pa.array(hashes[starts[group[firsts]]].tolist(), pa.string()),
                pa.array([prompts[i] for i in group[firsts]], pa.list_(pa.int32())),
                pa.ListArray.from_arrays(ends, pa.array(numbers, pa.list_(pa.int32()))),
                pa.ListArray.from_arrays(ends, pa.array(rewards[rows])),
                pa.ListArray.from_arrays(ends, self._logps(table, rows, numbers)),
                pa.array(sources, pa.string()),
            ],
            schema=SCHEMA,
        )

    def _prompts(self, table: pa.Table, starts: Int64) -> list[list[int] | None]:
        """Token ids of each group's prompt; of several that count as one, the first in the order of their texts."""
        texts, chat = table["prompt"], table["chat"]
        if self._rules.match != "exact":
            ends = np.append(starts[1:], len(texts))
            spans = zip(starts.tolist(), ends.tolist(), strict=True)
            starts = np.array([min(range(a, b), key=lambda i: texts[i].as_py()) for a, b in spans], np.int64)
        where = pa.array(starts)
        return self._tokens.prompts(texts.take(where).to_pylist(), chat.take(where).to_pylist())

    def _left(self, group: Int64, rewards: Float64, rows: Int64) -> Int64:
        """Those of `rows` whose group can still be used; the others are counted."""
        if not len(rows):
            return rows
        firsts = np.flatnonzero(np.append(True, np.diff(group[rows]) != 0))
        sizes = np.diff(np.append(firsts, len(rows)))
        best, worst = rewards[rows[firsts]], rewards[rows[firsts + sizes - 1]]
        reasons = group_reasons(sizes, best, worst, self._rules)
        drop_groups(self._counts, reasons, sizes)
        left: Int64 = rows[np.repeat(reasons == Reason.USED, sizes)]
        return left

    def _logps(self, table: pa.Table, rows: Int64, responses: list[list[int]]) -> pa.Array:
        """Recorded log-probs where they belong to exactly the response's tokens, else null."""
        kind = SCHEMA.field("behaviour_logps").type.value_type
        if not self._rules.columns.logps:
            return pa.nulls(len(rows), kind)
        recorded = table.select(["logps", "ids"]).take(pa.array(rows)).to_pylist()
        matched = [
            self._match(entry["logps"], entry["ids"], response)
            for entry, response in zip(recorded, responses, strict=True)
        ]
        return pa.array(matched, kind)

    def _match(self, logps: list[Any] | None, ids: list[Any] | None, response: list[int]) -> list[float] | None:
        if logps is None or ids is None:
            return None
        values = [float("nan") if value is None else float(value) for value in logps]
        if ids == response[:-1]:  # sampling stacks often leave out the end-of-sequence
            ids, values = response, [*values, float("nan")]
        if ids != response or len(values) != len(response):
            self._counts.logps_differ += 1
            return None
        self._counts.logps_used += 1
        return values
