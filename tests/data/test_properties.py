"""Whatever the rows: every one is used or counted, the groups keep their promises, and only DataError is raised."""

# ruff: noqa: PT017 (the error itself is what is examined, where there is one)
from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from entrypoint.data.prepare import Prepared
from entrypoint.data.report import NoGroupLeft
from entrypoint.errors import ConfigError, DataError
from tests.data.traces import SCHEMA, contents, prepared, write

Tokenizer = PreTrainedTokenizerBase

ROLES = st.sampled_from(["system", "user", "assistant", "wizard", ""])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=5)}), max_size=3)
ODD_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
TEXTS = st.one_of(
    st.sampled_from(["p", "q", "P ", " p", "a", "b", "[", "[]", "\u00a0", "<|im_end|>"]),
    st.none(),
    st.text(max_size=8),
    MESSAGES.map(json.dumps),
    ODD_JSON.map(json.dumps),
)
REWARDS = st.one_of(
    st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.9, 1.0]), st.none(), st.floats(allow_nan=True, allow_infinity=True)
)
ROW = st.fixed_dictionaries(
    {
        "timestamp": st.none() | st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)),
        "input": TEXTS,
        "output": TEXTS,
        "model": st.sampled_from(["base", "other", "", None]),
        "user_consent": st.sampled_from([True, True, True, False, None]),
        "final_reward": REWARDS,
    }
)
KEYS = st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from(["auto", "text", "chat"]),
        "match": st.sampled_from(["exact", "normalized"]),
        "threshold_scope": st.sampled_from(["group", "row"]),
        "min_reward_threshold": st.sampled_from([0.0, 0.5, 1.0]),
        "require_consent": st.booleans(),
        "models": st.sampled_from([[], ["base"], ["base", "other"]]),
        "date_from": st.sampled_from([None, "2000-01-01"]),
        "date_to": st.sampled_from([None, "2030-12-31"]),
        "held_out_share": st.sampled_from([0.0, 0.5]),
        "max_length": st.sampled_from([1, 12, 200]),
        "behaviour_model": st.sampled_from([None, "base"]),
    },
)
FOLDERS = st.sampled_from(
    [".", "date=2026-03-14", "model=base", "consent=true", "date=2026-03-14/model=other/consent=false"]
)
SCHEMA_OF_TIMES = SCHEMA.set(0, pa.field("timestamp", pa.timestamp("us")))


def promises(result: Prepared, rows: int, max_length: int, data: dict[str, Any]) -> None:
    counts = result.counts
    assert counts.rows == rows
    assert counts.adds_up
    assert counts.train_groups == len(result.train) > 0
    assert counts.held_out_groups == len(result.held_out)
    assert counts.train_rows == result.train.offsets[-1]
    for groups in (result.train, result.held_out):
        hashes = [g.prompt_hash for g in groups]
        assert hashes == sorted(set(hashes))
        for group in groups:
            assert len(group.rewards) >= 2
            assert group.rewards.max() > group.rewards.min()
            assert group.rewards.max() > data.get("min_reward_threshold", 0.5)
            assert (group.rewards[:-1] >= group.rewards[1:]).all()
            assert ((group.rewards >= 0) & (group.rewards <= 1)).all()
            longest = max(len(ids) for ids in group.response_ids)
            assert len(group.prompt_ids) + longest <= max_length
            assert len(group.response_ids) == len(group.rewards) == len(group.behaviour_logps)
    assert not {g.prompt_hash for g in result.train} & {g.prompt_hash for g in result.held_out}


def outcome(make: Callable[[Path], object], tokenizer: Tokenizer, rows: int, keys: dict[str, Any]) -> Any:
    """The groups and counts; or the table of reasons, if no group is left."""
    keys = dict(keys)
    max_length = keys.pop("max_length", 200)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "lake")
        try:
            result = prepared(tokenizer, f"{folder}/lake", Path(folder) / "cache", max_length=max_length, **keys)
        except NoGroupLeft as error:
            assert error.counts.rows == rows
            assert error.counts.adds_up
            assert "\n" not in str(error)
            return error.counts.to_dict()
        promises(result, rows, max_length, keys)
        return contents(result), result.counts.to_dict()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, max_size=14), keys=KEYS, cut=st.integers(0, 14), folder=FOLDERS, reverse=st.booleans())
def test_every_row_is_used_or_counted_in_any_order(
    tokenizer: Tokenizer, rows: list[dict[str, Any]], keys: dict[str, Any], cut: int, folder: str, reverse: bool
) -> None:
    def whole(lake: Path) -> None:
        write(lake / folder / "a.parquet", rows, SCHEMA_OF_TIMES)

    def parts(lake: Path) -> None:
        some = rows[::-1] if reverse else rows
        write(lake / folder / "b.parquet", some[:cut], SCHEMA_OF_TIMES, row_group_size=2)
        write(lake / folder / "a.parquet", some[cut:], SCHEMA_OF_TIMES)

    first, second = (outcome(make, tokenizer, len(rows), keys) for make in (whole, parts))
    for found in (first, second):  # which refused prompt came first is for people alone
        (found if isinstance(found, dict) else found[1]).pop("refusal")
    assert first == second


ANY_TYPE = st.sampled_from(
    [
        pa.string(),
        pa.binary(),
        pa.large_binary(),
        pa.bool_(),
        pa.int8(),
        pa.uint64(),
        pa.float16(),
        pa.float32(),
        pa.decimal128(38, 10),
        pa.decimal256(76, 10),
        pa.date32(),
        pa.date64(),
        pa.time64("ns"),
        pa.duration("s"),
        pa.timestamp("ns", "Asia/Tokyo"),
        pa.list_(pa.float32()),
        pa.large_list(pa.int64()),
        pa.list_(pa.int8(), 2),
        pa.map_(pa.string(), pa.int32()),
        pa.struct({"a": pa.int8()}),
        pa.dictionary(pa.int16(), pa.string()),
        pa.null(),
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    types=st.fixed_dictionaries({}, optional=dict.fromkeys([*SCHEMA.names, "lp", "ids"], ANY_TYPE)),
    missing=st.sets(st.sampled_from(SCHEMA.names), max_size=1),
    keys=KEYS,
    recorded=st.booleans(),
    folder=FOLDERS,
)
def test_columns_of_any_type_are_read_or_refused_in_one_line(
    tokenizer: Tokenizer,
    types: dict[str, pa.DataType],
    missing: set[str],
    keys: dict[str, Any],
    recorded: bool,
    folder: str,
) -> None:
    """Nulls of that type: the type alone decides whether a column can be read."""
    schema = SCHEMA.append(pa.field("lp", pa.list_(pa.float32()))).append(pa.field("ids", pa.list_(pa.int32())))
    schema = pa.schema([(f.name, types.get(f.name, f.type)) for f in schema if f.name not in missing])
    if recorded:
        keys = keys | {"logprobs_column": "lp", "token_ids_column": "ids"}
    try:
        outcome(lambda lake: write(lake / folder / "a.parquet", [{}] * 3, schema), tokenizer, 3, keys)
    except DataError as error:
        assert "\n" not in str(error)
        assert "a.parquet: " in str(error)


@pytest.mark.parametrize(
    "options", [{}, {"compression": "none"}, {"compression": "zstd", "write_page_checksum": True}], ids=str
)
def test_no_damage_ends_in_a_traceback(tokenizer: Tokenizer, tmp_path: Path, options: dict[str, Any]) -> None:
    """A file with bytes overwritten at 60 places in turn, or cut off there: refused, or read all the same."""
    rows = [
        {"input": f"p{n // 4}", "output": f"a{n}", "final_reward": n % 4 / 3, "user_consent": True, "model": "base"}
        for n in range(80)
    ]
    path = write(tmp_path / "lake/a.parquet", rows, **options)
    good = path.read_bytes()
    refused = 0
    for number in range(60):
        at = len(good) * number // 60
        for bad in (good[:at] + bytes([255, 127, 0, 128]) + good[at + 4 :], good[:at]):
            path.write_bytes(bad)
            try:
                prepared(tokenizer, str(path), tmp_path / "cache", max_length=200)
            except DataError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 60  # every cut, and damage to anything but plain values


@pytest.mark.parametrize("name", ["date_from", "date_to"])
def test_days_that_are_none(tokenizer: Tokenizer, lake: Path, cache: Path, name: str) -> None:
    write(lake / "a.parquet", [])
    day: dict[str, Any] = {name: "14.3.2026"}
    with pytest.raises(ConfigError, match=f"data.{name}: got '14.3.2026'; expected a day as YYYY-MM-DD"):
        prepared(tokenizer, lake, cache, **day)
