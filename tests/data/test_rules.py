"""Every reason to drop a row, with counts derived by hand."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerBase

from entrypoint.data.report import NoGroupLeft
from tests.data.traces import DAY, SCHEMA, contents, drop_column, group, prepared, row, write

Tokenizer = PreTrainedTokenizerBase


def test_each_reason_once(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """18 rows. Kept: `good` with 0.9, 0.2 and the mean of 0.3 and 0.4. The rest goes, one reason after another."""
    good = [row("good", "a", 0.9), row("good", "b", 0.2), row("good", "c", 0.3), row("good", "c", 0.4)]
    bad = [
        row("good", "d", 0.5, user_consent=False),
        row("good", "e", 0.5, user_consent=None),
        row("", "f", 0.5),
        row("good", " \n", 0.5),
        row(None, None, 0.5),
        row("good", "g", None),
        row("good", "h", float("nan")),
        row("good", "i", 1.5),
        row(json.dumps([{"role": "assistant", "content": "done"}]), "j", 0.5),
        row("good", "word " * 300, 0.95),  # a word is at least one token
        *group("alone", 0.9),
        *group("flat", 0.8, 0.8),
        *group("weak", 0.5, 0.1),  # the best is not above 0.5
    ]
    write(lake / "a.parquet", good + bad)
    counts = prepared(tokenizer, lake, cache).counts
    assert counts.rows == len(good + bad) == 19
    assert (counts.train_rows, counts.train_groups, counts.held_out_rows) == (3, 1, 0)
    assert counts.dropped == {
        "NO_CONSENT": 2,
        "EMPTY": 3,
        "REWARD": 3,
        "UNPARSABLE": 1,
        "DUPLICATE": 1,
        "TOO_LONG": 1,
        "ONE_RESPONSE": 1,
        "NO_SPREAD": 2,
        "BELOW_THRESHOLD": 2,
    }
    assert counts.conflicting == 1
    assert counts.adds_up


def test_the_first_reason_counts(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """A row that fits every reason is outside the dates; without the filter it has another model, and so on."""
    worst = row("", "[", 7.0, user_consent=False, model="other", timestamp=datetime(2020, 1, 1))
    write(lake / "a.parquet", [*group("good", 0.9, 0.1), worst])
    filters: dict[str, Any] = {"date_from": "2026-01-01", "models": ["base"]}
    assert prepared(tokenizer, lake, cache, **filters).counts.dropped == {"OTHER_DATE": 1}
    assert prepared(tokenizer, lake, cache, models=["base"]).counts.dropped == {"OTHER_MODEL": 1}
    assert prepared(tokenizer, lake, cache).counts.dropped == {"NO_CONSENT": 1}
    assert prepared(tokenizer, lake, cache, require_consent=False).counts.dropped == {"EMPTY": 1}


def test_equal_responses_merge_into_their_mean(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """a: (0.6 + 0.8 + 1.0) / 3 = 0.8; b: 0.1 twice is 0.1 and no conflict; the best comes first."""
    rewards = {"a": [0.6, 0.8, 1.0], "b": [0.1, 0.1], "c": [0.9]}
    write(lake / "a.parquet", [row("p", text, reward) for text, many in rewards.items() for reward in many])
    result = prepared(tokenizer, lake, cache)
    assert result.train[0].rewards.tolist() == [0.9, 0.8, 0.1]
    assert result.counts.dropped == {"DUPLICATE": 3}
    assert result.counts.conflicting == 1


def test_merging_can_leave_one_response_or_no_spread(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """p: one response, its mean 0.75; q: means 0.5 and 0.5. r stays."""
    rows = [row("p", "a", 0.6), row("p", "a", 0.9), row("q", "a", 0.2), row("q", "a", 0.8), row("q", "b", 0.5)]
    write(lake / "a.parquet", rows + group("r", 0.9, 0.1))
    assert prepared(tokenizer, lake, cache).counts.dropped == {"DUPLICATE": 2, "ONE_RESPONSE": 1, "NO_SPREAD": 2}


def test_lengths_are_counted_in_tokens_and_groups_judged_again(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """Prompt and response of n letters are n tokens each at most, plus one end-of-sequence.

    `p` loses its good response and is below the threshold; `q` loses one of two; `r` loses its only other reward.
    """
    long = "~!@" * 40  # no merges: 120 tokens
    rows = [row("p", long, 0.9), row("p", "~", 0.1), row("p", "!", 0.2)]
    rows += [row("q", long, 0.1), row("q", "~", 0.9)]
    rows += [row("r", long, 0.1), row("r", "~", 0.9), row("r", "!", 0.9)]
    write(lake / "a.parquet", rows + group("s", 0.9, 0.1))
    counts = prepared(tokenizer, lake, cache, max_length=100).counts
    assert counts.dropped == {"TOO_LONG": 3, "BELOW_THRESHOLD": 2, "ONE_RESPONSE": 1, "NO_SPREAD": 2}
    assert counts.adds_up


def test_max_length_is_inclusive(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """Prompt `~` is 1 token, `!!!` 3 and end-of-sequence 1: five fit into 5, not into 4."""
    write(lake / "a.parquet", [row("~", "!!!", 0.9), row("~", "!", 0.1), row("~", "@", 0.2)])
    assert prepared(tokenizer, lake, cache, max_length=5).train[0].response_ids[0].shape == (4,)
    with pytest.raises(NoGroupLeft) as refused:
        prepared(tokenizer, lake, cache, max_length=4)
    assert refused.value.counts.dropped == {"TOO_LONG": 1, "BELOW_THRESHOLD": 2}


def test_row_scope_drops_each_row_that_is_not_above(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    write(lake / "a.parquet", group("p", 0.9, 0.6, 0.5, 0.1) + group("q", 0.9, 0.2))
    counts = prepared(tokenizer, lake, cache, threshold_scope="row").counts
    assert counts.dropped == {"BELOW_THRESHOLD": 3, "ONE_RESPONSE": 1}
    assert counts.train_rows == 2


def test_the_threshold_is_the_runs(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    write(lake / "a.parquet", group("p", 0.3, 0.1) + group("q", 0.2, 0.1))
    assert prepared(tokenizer, lake, cache, min_reward_threshold=0.2).counts.dropped == {"BELOW_THRESHOLD": 2}


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (pa.float32(), [0.7, 0.1], [0.7, 0.1]),  # not 0.699999988
        (pa.float16(), [0.7, 0.1], [0.7, 0.1]),
        (pa.int8(), [1, 0], [1.0, 0.0]),
        (pa.uint64(), [1, 0], [1.0, 0.0]),
        (pa.decimal128(4, 3), [Decimal("0.700"), Decimal("0.125")], [0.7, 0.125]),
        (pa.float64(), [1.0, -0.0], [1.0, 0.0]),
    ],
    ids=str,
)
def test_reward_types(
    tokenizer: Tokenizer, lake: Path, cache: Path, kind: pa.DataType, values: list[Any], expected: list[float]
) -> None:
    schema = SCHEMA.set(SCHEMA.get_field_index("final_reward"), pa.field("final_reward", kind))
    table_values = [np.float16(v) for v in values] if kind == pa.float16() else values
    write(lake / "a.parquet", [row("p", f"a{i}", value) for i, value in enumerate(table_values)], schema)
    assert prepared(tokenizer, lake, cache).train[0].rewards.tolist() == expected


def test_another_reward_column(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    rows = [row("p", "a", None, judge_score=0.9), row("p", "b", None, judge_score=0.2)]
    write(lake / "a.parquet", rows)
    assert prepared(tokenizer, lake, cache, reward_column="judge_score").train[0].rewards.tolist() == [0.9, 0.2]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_text_types(tokenizer: Tokenizer, lake: Path, cache: Path, kind: pa.DataType) -> None:
    schema = pa.schema([pa.field(f.name, kind) if f.type == pa.string() else f for f in SCHEMA])
    write(lake / "a.parquet", group("p", 0.9, 0.1), schema)
    result = prepared(tokenizer, lake, cache, models=["base"])
    assert result.counts.train_rows == 2
    assert result.counts.models == {"base": 2}


@pytest.mark.parametrize(
    "kind",
    [
        pa.timestamp("s"),
        pa.timestamp("ms", "UTC"),
        pa.timestamp("ns", "America/New_York"),
        pa.timestamp("us", "+05:30"),
        pa.date32(),
        pa.date64(),
    ],
    ids=str,
)
def test_timestamp_types(tokenizer: Tokenizer, lake: Path, cache: Path, kind: pa.DataType) -> None:
    """A day is a day in UTC: 14 March, 23:30 UTC is inside 14..14, half an hour later is not."""
    schema = SCHEMA.set(0, pa.field("timestamp", kind))
    late = datetime(2026, 3, 14, 23, 30)
    times: list[Any] = [late, late + timedelta(minutes=30), late - timedelta(days=1), None]
    if pa.types.is_date(kind):
        times = [time and time.date() for time in times]
    elif kind.tz:
        times = [time and time.replace(tzinfo=UTC) for time in times]
    write(lake / "a.parquet", group("p", 0.9, 0.1, timestamp=times[0]), schema)
    write(lake / "b.parquet", [row("p", f"other {i}", 0.5, timestamp=time) for i, time in enumerate(times[1:])], schema)
    counts = prepared(tokenizer, lake, cache, date_from="2026-03-14", date_to="2026-03-14").counts
    assert counts.dropped == {"OTHER_DATE": 3}


def test_timestamps_that_no_calendar_holds(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    schema = SCHEMA.set(0, pa.field("timestamp", pa.timestamp("ms")))
    table = pa.table(
        [
            pa.array([2**62, -(2**62), 1_773_446_400_000, 1_773_446_400_000], pa.int64()).cast(schema[0].type),
            *(pa.array([r[f.name] for r in group("p", 0.7, 0.5, 0.9, 0.1)], f.type) for f in list(schema)[1:]),
        ],
        schema=schema,
    )
    lake.mkdir()
    pa.parquet.write_table(table, lake / "a.parquet")
    assert prepared(tokenizer, lake, cache, date_to="2026-03-14", date_from="2000-01-01").counts.dropped == {
        "OTHER_DATE": 2
    }


def test_an_unconsented_column_need_not_exist_where_consent_is_not_required(
    tokenizer: Tokenizer, lake: Path, cache: Path
) -> None:
    rows, schema = drop_column(group("p", 0.9, 0.1), "user_consent", "timestamp", "model")
    write(lake / "a.parquet", rows, schema)
    result = prepared(tokenizer, lake, cache, require_consent=False)
    assert result.counts.models == {"(not recorded)": 2}


def test_models_are_counted_and_others_told(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    rows = [*group("p", 0.9, 0.1, model="base"), row("p", "x", 0.4, model="gpt"), row("p", "y", 0.3, model=None)]
    write(lake / "a.parquet", rows)
    counts = prepared(tokenizer, lake, cache, behaviour_model="base").counts
    assert counts.models == {"base": 2, "gpt": 1, "(not recorded)": 1}
    assert counts.other_models == 2
    assert prepared(tokenizer, lake, cache, models=["base"]).counts.dropped == {"OTHER_MODEL": 2}


def test_normalized_prompts_are_one_group(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """Exact: two prompts of one response each. Normalized: one of two; `HELLO  you` sorts first and is the prompt."""
    rows = [row("hello you", "a", 0.9), row("HELLO  you ", "b", 0.1)]
    write(lake / "a.parquet", rows)
    with pytest.raises(NoGroupLeft) as refused:
        prepared(tokenizer, lake, cache)
    assert refused.value.counts.dropped == {"ONE_RESPONSE": 2}
    result = prepared(tokenizer, lake, cache, match="normalized")
    assert result.train[0].prompt_ids.tolist() == tokenizer("HELLO  you ")["input_ids"]
    assert result.train[0].rewards.tolist() == [0.9, 0.1]


def test_dates_are_compared_as_days(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    assert date(2026, 3, 14) == DAY.date()
    write(lake / "a.parquet", group("p", 0.9, 0.1))
    assert len(contents(prepared(tokenizer, lake, cache, date_from="2026-03-14"))) == 1
    with pytest.raises(NoGroupLeft, match=r"2 were dropped as .outside data\.date_from"):
        prepared(tokenizer, lake, cache, date_from="2026-03-15")
