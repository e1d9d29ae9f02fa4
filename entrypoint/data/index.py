"""The index of all rows: which prompt and which response, by hash, where, and how good. No text is copied.

A first, cheap pass decides what is worth reading again. Prompts and responses are told apart by 64-bit hashes: two
responses are merged only if both hashes agree (128 bits), and two prompts that collide can at worst let rows through
to the second pass, which groups by SHA-256 and applies the same rules again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from entrypoint.data.chat import canonical
from entrypoint.data.groups import Float64, Int64
from entrypoint.data.report import Counts, Reason
from entrypoint.data.rules import Partitions, Reasons, Rules, group_reasons, models_of, rewards_of, row_reasons
from entrypoint.data.scan import Batch, Scan, Unread

MEMORY = "2GB"  # DuckDB's share; what doesn't fit is spilled to the folder
# The reward of a merged response: the mean of its copies. It must not depend on the order of the addends, so they are
# added as integers: 15 digits of a reward.
MERGED_REWARD = """CASE WHEN min(reward) = max(reward) THEN min(reward)
                        ELSE round(sum(round(reward * 1e15)::BIGINT)::DOUBLE / (count(*) * 1e15), 12) END"""


@dataclass(frozen=True)
class Index:
    """The rows that are left, each a response of its own. Shape: rows (ascending) and their rewards (N,)."""

    rows: Int64
    rewards: Float64


class Feed:
    """A generator of record batches that DuckDB reads; keeps the generator's own error, which DuckDB would retell."""

    def __init__(self, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
        self.error: BaseException | None = None
        self.reader = pa.RecordBatchReader.from_batches(schema, self._caught(batches))

    def _caught(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except Exception as error:
            self.error = error
            raise

    @contextmanager
    def feeding(self) -> Iterator[None]:
        """Raises the generator's error where a query over `reader` fails because of it."""
        try:
            yield
        except Exception:
            if self.error is not None:
                raise self.error from None
            raise


@contextmanager
def database(spill: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB in memory, spilling to the folder `spill`; it fetches no extension and keeps no order for its own sake."""
    with duckdb.connect(
        config={
            "memory_limit": MEMORY,
            "temp_directory": str(spill),
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
    ) as connection:
        yield connection


def build_index(scan: Scan, rules: Rules, counts: Counts, spill: Path) -> Index:
    """Read every row once, apply the rules and merge duplicates.

    Args:
        counts: gets every row that is dropped here, the sampling models, and the total.
        spill: folder for what doesn't fit into memory.
    """
    with database(spill) as connection:
        ties = _read_rows(connection, scan, rules, counts)
        return _group(connection, rules, counts, ties=ties)


def skipped(scan: Scan, rules: Rules) -> dict[str, Reason]:
    """Files, by path, whose folders alone drop all of their rows.

    Raises:
        DataError: a partition's value can't be read.
    """
    verdicts = {file.path: Partitions.of(file).verdict(rules) for file in scan.files}
    return {path: reason for path, reason in verdicts.items() if reason is not None}


def _read_rows(connection: duckdb.DuckDBPyConnection, scan: Scan, rules: Rules, counts: Counts) -> bool:
    """Fill the table `rows`; returns whether it has the column `tie`, by which one of several duplicates is chosen."""
    skip = skipped(scan, rules)

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in scan.batches(frozenset(skip)):
            counts.rows += batch.rows
            if isinstance(batch, Unread):
                counts.drop(skip[batch.file.path], batch.rows)
            else:
                yield record_batch(batch, rules, counts)

    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("use", pa.bool_()),
            ("key", pa.large_string()),
            ("response", pa.large_string()),
            ("reward", pa.float64()),
            # Duplicates differ in what is not compared: the one that stays must not depend on the order of files.
            *([("prompt", pa.large_string())] if rules.match != "exact" else []),
            *([("logps", pa.list_(pa.float32())), ("ids", pa.list_(pa.int64()))] if rules.columns.logps else []),
        ]
    )
    ties = [name for name in ("prompt", "logps", "ids") if name in schema.names]
    last = "CASE WHEN logps IS NULL THEN 1::UBIGINT << 63 ELSE 0 END + " if "logps" in ties else ""
    tie = f", {last}(hash({', '.join(ties)}) >> 1) AS tie" if ties else ""
    feed = Feed(schema, batches())
    connection.register("reader", feed.reader)
    with feed.feeding():
        connection.execute(
            f"""CREATE TABLE rows AS
                SELECT row, hash(key) AS prompt, hash(response) AS response, reward{tie}
                FROM reader WHERE use"""
        )
    connection.unregister("reader")
    return bool(ties)


def record_batch(batch: Batch, rules: Rules, counts: Counts) -> pa.RecordBatch:
    """What DuckDB is fed of a batch: texts in canonical form, rewards, and whether the rules leave each row (`use`).

    Args:
        counts: gets the rows that the rules drop, and the sampling models of the others.
    """
    partitions = Partitions.of(batch.file)
    texts = canonical(batch.columns["input"], batch.columns["output"], form=rules.form, match=rules.match)
    reasons = row_reasons(batch, texts, partitions, rules)
    for reason, number in enumerate(np.bincount(reasons, minlength=len(Reason)).tolist()):
        if reason != Reason.USED:
            counts.drop(Reason(reason), number)
    use = reasons == Reason.USED
    for entry in models_of(batch, partitions).filter(pa.array(use)).value_counts().to_pylist():
        name = entry["values"] or "(not recorded)"
        counts.models[name] = counts.models.get(name, 0) + entry["counts"]
    columns: dict[str, Any] = {
        "row": pa.array(np.arange(batch.start, batch.start + batch.rows)),
        "use": pa.array(use),
        "key": large(texts.key),
        "response": large(texts.response),
        "reward": pa.array(rewards_of(batch, rules)),
    }
    if rules.match != "exact":
        columns["prompt"] = large(texts.prompt)
    if rules.columns.logps and rules.columns.token_ids:
        columns |= {"logps": batch.columns[rules.columns.logps], "ids": batch.columns[rules.columns.token_ids]}
    return pa.RecordBatch.from_pydict(columns)


def large(values: pa.Array) -> pa.Array:
    """`values` with 64-bit offsets; the text itself is shared."""
    return values.cast(pa.large_string())


def _group(connection: duckdb.DuckDBPyConnection, rules: Rules, counts: Counts, *, ties: bool) -> Index:
    """Merge duplicates and leave out groups that can't be used."""
    chosen = "min(struct_pack(tie, row)).row" if ties else "min(row)"
    connection.execute(
        f"""CREATE TABLE responses AS
            SELECT prompt, {chosen} AS row, count(*) AS copies, min(reward) <> max(reward) AS differ,
                   {MERGED_REWARD} AS reward
            FROM rows GROUP BY prompt, response"""
    )
    connection.execute("DROP TABLE rows")
    merged, conflicting = _one(connection, "SELECT sum(copies - 1), count(*) FILTER (differ) FROM responses")
    counts.drop(Reason.DUPLICATE, int(merged or 0))
    counts.conflicting += int(conflicting or 0)
    groups = connection.execute(
        "SELECT prompt, count(*) AS size, max(reward) AS best, min(reward) AS worst FROM responses GROUP BY prompt"
    ).fetchnumpy()
    reasons = group_reasons(groups["size"], groups["best"], groups["worst"], rules)
    drop_groups(counts, reasons, groups["size"])
    connection.register("usable", pa.table({"prompt": groups["prompt"][reasons == Reason.USED]}))
    kept = connection.execute("SELECT row, reward FROM responses SEMI JOIN usable USING (prompt)").fetchnumpy()
    order = np.argsort(kept["row"])
    return Index(rows=kept["row"][order], rewards=kept["reward"][order])


def drop_groups(counts: Counts, reasons: Reasons, sizes: Int64) -> None:
    """Count the rows of every group that is dropped. Shape: reasons and sizes (N,)."""
    for reason, rows in enumerate(np.bincount(reasons, weights=sizes, minlength=len(Reason))):
        if reason != Reason.USED:
            counts.drop(Reason(reason), int(rows))


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    row = connection.execute(query).fetchone()
    assert row is not None  # aggregates always give one
    return row
