"""One read of the traces into arrays: every response that the rules for single rows leave, duplicates merged.

It is the index that preparation builds (`entrypoint.data.index`), with the columns that say something about the labels
and with the lengths; texts are hashed and measured, never copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from entrypoint.data.columns import NUMBER, TIME, Kind, partition_of
from entrypoint.data.groups import Float64, Int64
from entrypoint.data.index import MERGED_REWARD, Feed, database, drop_groups, record_batch, skipped
from entrypoint.data.report import Counts, Reason
from entrypoint.data.rules import Mask, Partitions, Rules, group_reasons
from entrypoint.data.scan import Batch, Scan, Unread

SCORES = ("ragas_reward", "judge_score", "token_count")


@dataclass(frozen=True)
class Responses:
    """Responses, those of a prompt side by side, best first.

    Shape: each (N,). `row` is the number of a row that holds the response, `prompt` a hash; `copies` counts the rows
    merged into one, `range` is how far apart their rewards are; scores and token counts are NaN where not recorded.
    """

    row: Int64
    prompt: npt.NDArray[np.uint64]
    held_out: Mask
    reward: Float64
    copies: Int64
    range: Float64
    prompt_bytes: Int64
    response_bytes: Int64
    ragas_reward: Float64
    judge_score: Float64
    token_count: Float64

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def starts(self) -> Int64:
        """Where each prompt's responses begin. Shape: (prompts,)."""
        if not len(self):
            return np.zeros(0, np.int64)
        return np.flatnonzero(np.append(True, self.prompt[1:] != self.prompt[:-1]))

    @cached_property
    def sizes(self) -> Int64:
        """Responses of each prompt. Shape: (prompts,)."""
        return np.diff(np.append(self.starts, len(self)))

    @cached_property
    def group(self) -> Int64:
        """The number of each response's prompt. Shape: (N,)."""
        return np.repeat(np.arange(len(self.starts)), self.sizes)

    def where(self, keep: npt.NDArray[Any]) -> Responses:
        """The responses that the mask or the ascending indices `keep` choose."""
        return replace(self, **{item.name: getattr(self, item.name)[keep] for item in fields(self)})

    def usable(self, rules: Rules, counts: Counts) -> Responses:
        """Those of prompts that training can use; `counts` gets the others."""
        best, worst = self.reward[self.starts], self.reward[self.starts + self.sizes - 1]
        reasons = group_reasons(self.sizes, best, worst, rules)
        drop_groups(counts, reasons, self.sizes)
        return self.where(np.repeat(reasons == Reason.USED, self.sizes))


@dataclass
class Days:
    """First and last day, since 1970-01-01 UTC, of the rows that the rules leave; None where no row says one."""

    first: int | None = None
    last: int | None = None

    def see(self, days: pa.Array) -> None:
        """Widen the range by `days`; nulls say nothing."""
        found = pc.min_max(days).as_py()
        if found["min"] is not None:
            self.first = found["min"] if self.first is None else min(self.first, found["min"])
            self.last = found["max"] if self.last is None else max(self.last, found["max"])


@dataclass(frozen=True)
class Reader:
    """Reads the traces of `scan`, whose columns are `with_scores` where the scores are wanted.

    Args:
        held_out_share: `data.held_out_share`.
        counts: gets every row that is dropped, the sampling models, and the total.
        days: gets the days of the rows that the rules for single rows leave.
    """

    scan: Scan
    rules: Rules
    held_out_share: float
    counts: Counts
    days: Days = field(default_factory=Days)

    def read(self, spill: Path) -> Responses:
        """Every response; what doesn't fit into memory goes to the folder `spill`."""
        feed = Feed(_feed_schema(self.rules), self._batches())
        with database(spill) as connection:
            connection.register("reader", feed.reader)
            with feed.feeding():
                # As in `entrypoint.data.gather.Split`: the first 64 bits of the prompt's SHA-256, as a fraction.
                connection.execute(
                    f"""CREATE TABLE rows AS
                        SELECT row, hash(key) AS prompt, hash(response) AS response, reward,
                               ('0x' || left(sha256(key), 16))::UBIGINT::DOUBLE / 2.0 ** 64 < {self.held_out_share!r}
                                   AS held_out,
                               strlen(key) AS prompt_bytes, strlen(response) AS response_bytes, {", ".join(SCORES)}
                        FROM reader WHERE use"""
                )
            connection.unregister("reader")
            connection.execute(
                f"""CREATE TABLE responses AS
                    SELECT prompt, response, min(row) AS row, bool_or(held_out) AS held_out, count(*) AS copies,
                           {MERGED_REWARD} AS reward, max(reward) - min(reward) AS range,
                           min(prompt_bytes) AS prompt_bytes, min(response_bytes) AS response_bytes,
                           {", ".join(_merged(name) for name in SCORES)}
                    FROM rows GROUP BY prompt, response"""
            )
            connection.execute("DROP TABLE rows")
            found = connection.execute(
                "SELECT * EXCLUDE (response) FROM responses ORDER BY prompt, reward DESC, response"
            ).fetchnumpy()
        responses = Responses(**{item.name: np.asarray(found[item.name]) for item in fields(Responses)})
        self.counts.drop(Reason.DUPLICATE, int((responses.copies - 1).sum()))
        self.counts.conflicting += int((responses.range > 0).sum())
        return responses

    def _batches(self) -> Iterator[pa.RecordBatch]:
        skip = skipped(self.scan, self.rules)
        schema = _feed_schema(self.rules)
        for batch in self.scan.batches(frozenset(skip)):
            self.counts.rows += batch.rows
            if isinstance(batch, Unread):
                self.counts.drop(skip[batch.file.path], batch.rows)
                continue
            rows = record_batch(batch, self.rules, self.counts)
            self.days.see(_days(batch).filter(rows["use"]))
            scores = [_finite(batch.columns.get(name, pa.nulls(batch.rows, pa.float64()))) for name in SCORES]
            columns = [rows[name] for name in schema.names if name not in SCORES]
            yield pa.RecordBatch.from_arrays([*columns, *scores], schema=schema)


def with_scores(rules: Rules) -> Rules:
    """`rules` that also read, where a file has them, the scores behind the reward, the token counts and the day."""
    optional = (*((name, _lenient(NUMBER)) for name in SCORES), ("timestamp", _lenient(TIME)))
    return replace(rules, columns=replace(rules.columns, optional=optional))


def _lenient(kind: Kind) -> Kind:
    """`kind`, but a column of another type holds nothing: training doesn't read it, so it is no reason to refuse."""
    nothing = pa.int64() if kind is TIME else pa.float64()

    def normal(column: pa.Array) -> pa.Array:
        return kind.normal(column) if kind.fits(column.type) else pa.nulls(len(column), nothing)

    return Kind(kind.words, lambda found: True, normal)


def _feed_schema(rules: Rules) -> pa.Schema:
    texts = [("key", pa.large_string()), ("response", pa.large_string())]
    known = [("row", pa.int64()), ("use", pa.bool_()), *texts, ("reward", pa.float64())]
    return pa.schema([*known, *((name, pa.float64()) for name in SCORES)])


def _merged(name: str) -> str:
    """One score of several copies. Equal ones give exactly theirs, so that a comparison with others is exact too."""
    mean = f"CASE WHEN min({name}) = max({name}) THEN min({name}) ELSE avg({name}) END"
    return f"coalesce({mean}, 'NaN'::DOUBLE) AS {name}"


def _finite(values: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_finite(values), values, pa.scalar(None, pa.float64()))


def _days(batch: Batch) -> pa.Array:
    """The day of each row: the file's column, else the folder's date. Shape: (batch.rows,)."""
    days = batch.columns.get("timestamp")
    if days is not None:
        return days
    partition = Partitions.of(batch.file).day if partition_of(batch.file, "timestamp")[0] else None
    return pa.repeat(pa.scalar(partition, pa.int64()), batch.rows)
