"""Traces written for a test: rows with sensible defaults, and what preparing them gives."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from entrypoint.conf.data import Data
from entrypoint.data.prepare import Prepared, prepare

DAY = datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC)
SCHEMA = pa.schema(
    [
        ("timestamp", pa.timestamp("us", "UTC")),
        ("input", pa.string()),
        ("output", pa.string()),
        ("model", pa.string()),
        ("user_consent", pa.bool_()),
        ("final_reward", pa.float64()),
    ]
)


def row(prompt: str | None, response: str | None, reward: float | None, **others: Any) -> dict[str, Any]:
    """One trace; `others` overrides any column."""
    return {
        "timestamp": DAY,
        "input": prompt,
        "output": response,
        "model": "base",
        "user_consent": True,
        "final_reward": reward,
    } | others


def group(prompt: str, *rewards: float, **others: Any) -> list[dict[str, Any]]:
    """One prompt with a response for each reward."""
    return [row(prompt, f"answer {number}", reward, **others) for number, reward in enumerate(rewards)]


def write(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema | None = SCHEMA, **options: Any) -> Path:
    """Write rows as Parquet; columns that `rows` have beyond `schema` are added with the type that Arrow infers."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if schema is not None:
        extra = [name for name in dict.fromkeys(itertools.chain.from_iterable(rows)) if name not in schema.names]
        for name in extra:
            schema = schema.append(pa.field(name, pa.array([row.get(name) for row in rows]).type))
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), path, **options)
    return path


def drop_column(rows: Iterable[Mapping[str, Any]], *names: str) -> tuple[list[dict[str, Any]], pa.Schema]:
    """Rows and schema without some columns, to be passed on to `write`."""
    left = [field for field in SCHEMA if field.name not in names]
    return [{k: v for k, v in row.items() if k not in names} for row in rows], pa.schema(left)


def prepared(
    tokenizer: PreTrainedTokenizerBase,
    path: Path | str | list[str],
    cache: Path,
    max_length: int = 200,
    **data: Any,
) -> Prepared:
    """`prepare` with nothing held out unless a test says so."""
    given = str(path) if isinstance(path, Path) else path
    return prepare(Data(path=given, **({"held_out_share": 0.0} | data)), max_length, tokenizer, cache)


def contents(result: Prepared, *, source: bool = False) -> list[dict[str, Any]]:
    """Every group of train and held out as plain values, `source` left out: that may differ where nothing else does."""
    rows = [*result.train.dataset.to_list(), *result.held_out.dataset.to_list()]
    return [{key: value for key, value in row.items() if source or key != "source"} for row in rows]
