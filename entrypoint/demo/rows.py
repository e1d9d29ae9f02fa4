"""The rows of the demo's traces: sampled responses as a gateway would log them, with flaws as real logs have them.

Each flaw is marked in `metadata.flaw`, so that a test can count what preparation must drop; other rows are as sampled.
Users, sessions and times are made up; latency and tokens are measured.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint.demo.model import NAME
from entrypoint.demo.prompts import Prompt
from entrypoint.demo.score import score

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]

FIRST_DAY = datetime(2026, 11, 16, tzinfo=UTC)
DAYS = 3
USERS = 40
USERS_WITHOUT_CONSENT = 2
TIED = (30, 60, 90)  # groups whose responses all got the same label: nothing to learn from
ALONE = (45, 75)  # groups of which one response was logged
THUMB = 0.8  # the one label that the tied groups got


@dataclass(frozen=True)
class Response:
    """One sampled response to one prompt."""

    prompt: Prompt
    text: str
    tokens: int
    latency_ms: float


def schema() -> pa.Schema:
    """The columns of labelled traces."""
    import pyarrow as pa

    return pa.schema(
        [
            ("id", pa.string()),
            ("timestamp", pa.timestamp("us", tz="UTC")),
            ("user_id", pa.string()),
            ("session_id", pa.string()),
            ("input", pa.string()),
            ("output", pa.string()),
            ("model", pa.string()),
            ("latency_ms", pa.float64()),
            ("token_count", pa.int32()),
            ("metadata", pa.string()),
            ("user_consent", pa.bool_()),
            ("ragas_reward", pa.float64()),
            ("judge_score", pa.float64()),
            ("final_reward", pa.float64()),
        ]
    )


def rows(responses: Iterable[Response], *, seed: int) -> list[Row]:
    """All rows, flaws included; responses to the same prompt stand together."""
    dice = random.Random(seed)
    users = [f"user-{dice.getrandbits(32):08x}" for _ in range(USERS)]
    found: list[Row] = []
    for number, (_, group) in enumerate(groupby(responses, key=lambda response: response.prompt)):
        made = [_row(response, users, dice) for response in group]
        if number in ALONE:
            made = made[:1]
            _mark(made[0], "single response")
        if number in TIED:
            for row in made:
                _mark(row, "tie", final_reward=THUMB)
        found += made
    return found + _flaws(found, users, dice)


def write(rows: Sequence[Row], out: Path) -> list[Path]:
    """One Parquet file a day and consent, in Hive's layout; returns the files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts: dict[Path, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["timestamp"], row["id"])):
        day, consent = row["timestamp"].date().isoformat(), str(row["user_consent"]).lower()
        parts.setdefault(out / f"date={day}" / f"model={row['model']}" / f"consent={consent}", []).append(row)
    for folder, part in parts.items():
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part, schema()), folder / "part-0.parquet", compression="zstd")
    return [folder / "part-0.parquet" for folder in parts]


def _row(response: Response, users: Sequence[str], dice: random.Random) -> Row:
    metadata = {"rule": asdict(response.prompt.rule), "sampling": {"temperature": 1.0, "top_p": 1.0}}
    labels = asdict(score(response.prompt.rule, response.text))
    measured = {"latency_ms": round(response.latency_ms, 1), "token_count": response.tokens}
    return {
        **_request(users, dice),
        "input": response.prompt.input,
        "output": response.text,
        "model": NAME,
        **measured,
        "metadata": json.dumps(metadata),
        **labels,
    }


def _request(users: Sequence[str], dice: random.Random) -> Row:
    """Who asked and when; a user's consent is the same for all of their rows."""
    user = dice.randrange(len(users))
    return {
        "id": str(uuid.UUID(int=dice.getrandbits(128), version=4)),
        "timestamp": FIRST_DAY + timedelta(seconds=round(dice.uniform(0, DAYS * 86_400 - 1), 3)),
        "user_id": users[user],
        "session_id": f"session-{dice.getrandbits(40):010x}",
        "user_consent": user >= USERS_WITHOUT_CONSENT,
    }


def _mark(row: Row, flaw: str, **changes: Any) -> None:
    row.update(changes, metadata=json.dumps({**json.loads(row["metadata"]), "flaw": flaw}))


def _flaws(sound: Sequence[Row], users: Sequence[str], dice: random.Random) -> list[Row]:
    """Flawed copies of sound rows, as retries, double labelling and broken labellers leave them."""
    flaws: list[tuple[str, int, Row]] = [
        ("null reward", 6, {"ragas_reward": None, "final_reward": None}),
        ("nan reward", 4, {"judge_score": float("nan"), "final_reward": float("nan")}),
        ("reward out of range", 2, {"final_reward": 1.7}),
        ("reward out of range", 2, {"final_reward": -0.2}),
        ("empty output", 4, {"output": "", "token_count": 0, "final_reward": 0.0}),
        ("empty input", 2, {"input": ""}),
        ("duplicate", 8, {}),
        ("relabelled duplicate", 6, {"final_reward": None}),
    ]
    able = [row for row in sound if row["user_consent"] and row["output"] and "flaw" not in json.loads(row["metadata"])]
    made: list[Row] = []
    for flaw, count, changes in flaws:
        for row in dice.sample(able, count):
            copy = {**row, **_request(users, dice), "user_consent": True, "user_id": row["user_id"]}
            _mark(copy, flaw, **changes)
            if flaw == "relabelled duplicate":  # a second labeller judged a little otherwise
                copy["final_reward"] = round(abs(row["final_reward"] - 0.06), 4)
            made.append(copy)
    return made
