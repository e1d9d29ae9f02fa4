"""Labelled traces for whole runs: easy to learn, in all the forms that a lake holds, with rows that must be dropped."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]

DAY = datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("timestamp", pa.timestamp("us", "UTC")),
        ("user_id", pa.string()),
        ("session_id", pa.string()),
        ("input", pa.string()),
        ("output", pa.string()),
        ("model", pa.string()),
        ("latency_ms", pa.int64()),
        ("token_count", pa.int64()),
        ("metadata", pa.string()),
        ("user_consent", pa.bool_()),
        ("ragas_reward", pa.float64()),
        ("judge_score", pa.float64()),
        ("final_reward", pa.float64()),
    ]
)
# What tells good from bad is in the words that all prompts share, so it holds for prompts that were never trained on.
ANSWERS = (("yes, please do {}", 0.9), ("yes, gladly {}", 0.8), ("no, never {}", 0.3), ("no, stop {}", 0.1))
NAMES = ("pod", "node", "gang", "fox", "dog", "job")


def row(prompt: str, response: str | None, reward: float | None, *, day: int = 0, **others: Any) -> Row:
    """One trace, `day` days after DAY; `others` overrides any column."""
    return {
        "timestamp": DAY + timedelta(days=day),
        "user_id": "u1",
        "session_id": "s1",
        "input": prompt,
        "output": response,
        "model": "base",
        "latency_ms": 120,
        "token_count": 12,
        "metadata": "{}",
        "user_consent": True,
        "ragas_reward": reward,
        "judge_score": reward,
        "final_reward": reward,
    } | others


def group(prompt: str, number: int, **others: Any) -> list[Row]:
    """One prompt with two good and two bad answers."""
    return [row(prompt, answer.format(number), reward, **others) for answer, reward in ANSWERS]


def text(number: int) -> str:
    """A prompt in plain text."""
    return f"May {NAMES[number % len(NAMES)]} {number} start?"


def chat(number: int) -> str:
    """A prompt as chat messages: a system message and an earlier turn belong to it."""
    turns = [
        {"role": "system", "content": "answer in one sentence."},
        {"role": "user", "content": f"Is there {NAMES[number % len(NAMES)]} {number}?"},
        {"role": "assistant", "content": "there is."},
        {"role": "user", "content": "May it start?"},
    ]
    return json.dumps(turns)


def learnable(prompts: int = 24) -> list[Row]:
    """Prompts in text and in chat by turns, over two days, all of them usable."""
    return [
        row
        for number in range(prompts)
        for row in group(chat(number) if number % 2 else text(number), number, day=number % 4 // 2)
    ]


def spoiled() -> tuple[list[Row], dict[str, int]]:
    """Rows that must be dropped, and how many under which reason."""
    ends_with_the_assistant = json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}])
    rows = [
        *group("nobody may learn from this", 1, user_consent=False),
        row(text(0), "no label", None),
        row(text(0), "label beyond the scale", 1.5),
        row(text(0), " ", 0.5),
        row(text(0), "yes, please do 0", 0.8),  # there with 0.9 already: merged, 0.85
        row(text(0), "yes " * 200, 0.9),
        row(ends_with_the_assistant, "nothing left to say", 0.9),
        row("asked once", "answered once", 0.9),
        row("both alike", "one", 0.9),
        row("both alike", "other", 0.9),
        row("all bad", "bad", 0.4),
        row("all bad", "worse", 0.2),
    ]
    return rows, {
        "NO_CONSENT": 4,
        "REWARD": 2,
        "EMPTY": 1,
        "DUPLICATE": 1,
        "TOO_LONG": 1,
        "UNPARSABLE": 1,
        "ONE_RESPONSE": 1,
        "NO_SPREAD": 2,
        "BELOW_THRESHOLD": 2,
    }


def write_hive(folder: Path, rows: Iterable[Row], *, misfiled: Sequence[Row] = ()) -> Path:
    """Rows as `date=…/model=…/consent=…/part-0.parquet`; model and consent are said by the folders alone.

    Args:
        misfiled: rows that lie in the first folder although their timestamp is another day's.
    """
    parts: dict[str, list[Row]] = defaultdict(list)
    for one in rows:
        day, consent = one["timestamp"].date(), str(one["user_consent"]).lower()
        parts[f"date={day}/model={one['model']}/consent={consent}"].append(one)
    parts[next(iter(parts))] += misfiled
    for name, content in parts.items():
        write(folder / name / "part-0.parquet", content, leave_out=("model", "user_consent"))
    return folder


def write_scattered(folder: Path, rows: Sequence[Row]) -> Path:
    """The same rows in another order, in three files of other names, one of them deeper."""
    mixed = random.Random(7).sample(list(rows), len(rows))
    for number, name in enumerate(("zebra.parquet", "deep/er/apple.parquet", "2024.parquet")):
        write(folder / name, mixed[number::3])
    return folder


def write(path: Path, rows: Iterable[Mapping[str, Any]], *, leave_out: Sequence[str] = ()) -> Path:
    """Rows as one Parquet file; columns beyond SCHEMA get the type that Arrow infers."""
    numbered = [{"id": f"{path.stem}-{number}", **one} for number, one in enumerate(rows)]
    names = list(dict.fromkeys(SCHEMA.names + [key for one in numbered for key in one]))
    columns = {
        name: pa.array([one.get(name) for one in numbered], SCHEMA.field(name).type if name in SCHEMA.names else None)
        for name in names
        if name not in leave_out
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path
