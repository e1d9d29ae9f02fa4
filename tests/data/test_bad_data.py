"""Data sets that can't be used, or only in part: each ends in one line that names the trouble, or in a count."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from entrypoint.errors import EXIT_REFUSED, DataError
from tests.data.traces import SCHEMA, drop_column, group, prepared, row, write

GOOD = group("good", 0.9, 0.6, 0.1)
LONG = group("good " * 50, *(number / 2000 for number in range(2000)))
CHAT = json.dumps([{"role": "user", "content": "Hi"}])
Make = Callable[[Path], Any]


@dataclass(frozen=True)
class Refused:
    """A data set that is refused: how to make it, what the line says, and the keys of the run."""

    make: Make
    says: str
    data: dict[str, Any]


def rows(*some: dict[str, Any], **data: Any) -> tuple[Make, dict[str, Any]]:
    return lambda lake: write(lake / "a.parquet", some), data


def typed(name: str, kind: pa.DataType, value: Any) -> Make:
    """Good rows whose column `name` has another type."""
    schema = SCHEMA.set(SCHEMA.get_field_index(name), pa.field(name, kind))
    return lambda lake: write(lake / "a.parquet", [r | {name: value} for r in GOOD], schema)


def without(*names: str) -> Make:
    return lambda lake: write(lake / "a.parquet", *drop_column(GOOD, *names))


def contents(content: bytes, name: str = "a.parquet") -> Make:
    def make(lake: Path) -> None:
        (lake / name).parent.mkdir(parents=True, exist_ok=True)
        (lake / name).write_bytes(content)

    return make


def damaged(change: Callable[[bytes], bytes], **options: Any) -> Make:
    """A good file and a damaged one beside it."""

    def make(lake: Path) -> None:
        write(lake / "a.parquet", GOOD)
        path = write(lake / "b.parquet", LONG, **options)
        path.write_bytes(change(path.read_bytes()))

    return make


def flipped(position: float) -> Callable[[bytes], bytes]:
    """The bits of 64 bytes flipped, somewhere between the first byte (0) and the last (1)."""

    def change(content: bytes) -> bytes:
        at = int(position * len(content))
        return content[:at] + bytes(255 - byte for byte in content[at : at + 64]) + content[at + 64 :]

    return change


def twice(lake: Path) -> None:
    table = pa.Table.from_pylist(GOOD, SCHEMA)
    lake.mkdir()
    pq.write_table(table.append_column("output", table["output"]), lake / "a.parquet")


def not_utf8(lake: Path) -> None:
    """Text that says it is UTF-8 and isn't: Parquet's writers don't look."""
    table = pa.Table.from_pylist(GOOD, SCHEMA)
    broken = pa.array([b"good", b"caf\xe9", b"x"]).view(pa.string())
    lake.mkdir()
    pq.write_table(table.set_column(2, "output", broken), lake / "a.parquet")


def empty_folder(lake: Path) -> None:
    (lake / "deeper").mkdir(parents=True)


def partition(folder: str) -> Make:
    return lambda lake: write(lake / folder / "a.parquet", GOOD)


def loop(lake: Path) -> None:
    lake.mkdir()
    (lake / "a.parquet").symlink_to(lake / "b.parquet")
    (lake / "b.parquet").symlink_to(lake / "a.parquet")


def folder_called_parquet(lake: Path) -> None:
    (lake / "a.parquet").mkdir(parents=True)


def case(make: Make | tuple[Make, dict[str, Any]], says: str, **data: Any) -> Refused:
    maker, keys = make if isinstance(make, tuple) else (make, {})
    return Refused(maker, says, keys | data)


ANSWER = "output"
NONE_LEFT = "no group left to train on: of {} rows {} were dropped as '{}'"

REFUSED: dict[str, Refused] = {
    # Where files should be
    "no folder": case(lambda lake: None, "lake: not found"),
    "empty folder": case(empty_folder, "lake: found nothing; expected Parquet files"),
    "folder called a.parquet": case(folder_called_parquet, "lake: found nothing"),
    "only other files": case(contents(b"a,b\n", "a.csv"), "found 1 files (a.csv, …), none called *.parquet"),
    "links in a circle": case(loop, "Too many levels of symbolic links"),
    # What is no Parquet
    "CSV called .parquet": case(contents(b"input,output\na,b\n"), "a.parquet: torn or not Parquet"),
    "JSON lines called .parquet": case(contents(b'{"input": "a"}\n' * 9), "a.parquet: torn or not Parquet"),
    "empty file": case(contents(b""), "a.parquet: torn or not Parquet"),
    "magic alone": case(contents(b"PAR1PAR1"), "a.parquet: torn or not Parquet"),
    "footer that lies about its length": case(contents(b"PAR1\xff\xff\xff\x7fPAR1"), "a.parquet: torn or not Parquet"),
    "encrypted": case(contents(b"PARE" + bytes(40) + b"PARE"), "a.parquet: torn or not Parquet"),
    "torn at half": case(damaged(lambda content: content[: len(content) // 2]), "b.parquet: torn or not Parquet"),
    "last byte missing": case(damaged(lambda content: content[:-1]), "b.parquet: torn or not Parquet"),
    "first half missing": case(damaged(lambda content: content[len(content) // 2 :]), "b.parquet: torn or not Parquet"),
    "garbage footer": case(damaged(lambda c: c[:-200] + bytes(192) + c[-8:]), "b.parquet: torn or not Parquet"),
    "flipped page, snappy": case(damaged(flipped(0.5), use_dictionary=False), "b.parquet: torn or not Parquet"),
    "flipped page, zstd": case(
        damaged(flipped(0.5), compression="zstd", use_dictionary=False), "b.parquet: torn or not Parquet"
    ),
    "flipped page, checksum": case(
        damaged(flipped(0.5), compression="none", write_page_checksum=True, use_dictionary=False),
        "b.parquet: torn or not Parquet",
    ),
    "zeroed pages": case(
        damaged(lambda c: c[:100] + bytes(len(c) - 2100) + c[-2000:]), "b.parquet: torn or not Parquet"
    ),
    # Columns
    "no input": case(without("input"), "a.parquet: no column 'input'"),
    "no output": case(without(ANSWER), "a.parquet: no column 'output'"),
    "no reward": case(without("final_reward"), "a.parquet: no column 'final_reward'; expected a number"),
    "no consent": case(
        without("user_consent"), "no column 'user_consent'; expected a boolean, or a partition consent="
    ),
    "misspelt reward": case(
        rows(*GOOD), "no column 'final_rewards' (nearest: 'final_reward')", reward_column="final_rewards"
    ),
    "no timestamp to filter by": case(without("timestamp"), "no column 'timestamp'", date_from="2026-01-01"),
    "no model to filter by": case(without("model"), "no column 'model'", models=["base"]),
    "no log-probs": case(rows(*GOOD), "no column 'lp'", logprobs_column="lp", token_ids_column="ids"),
    "no columns at all": case(lambda lake: write(lake / "a.parquet", [], pa.schema([])), "the file has: no columns"),
    "output twice": case(twice, "column 'output' is there 2 times"),
    # Types
    "binary input": case(typed("input", pa.binary(), b"good"), "'input' has type binary; expected text"),
    "number as output": case(typed(ANSWER, pa.int64(), 4), "'output' has type int64; expected text"),
    "list as output": case(typed(ANSWER, pa.list_(pa.string()), ["a"]), "'output' has type list<"),
    "nested messages": case(
        typed("input", pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})), []), "'input' has type list<"
    ),
    "struct as input": case(typed("input", pa.struct({"a": pa.string()}), {"a": "x"}), "'input' has type struct<"),
    "dictionary of numbers": case(typed(ANSWER, pa.dictionary(pa.int8(), pa.int64()), 4), "'output' has type int64"),
    "reward as text": case(
        typed("final_reward", pa.string(), "0.9"), "'final_reward' has type string; expected a number"
    ),
    "reward as boolean": case(typed("final_reward", pa.bool_(), True), "'final_reward' has type bool"),
    "list of rewards": case(typed("final_reward", pa.list_(pa.float64()), [0.9]), "'final_reward' has type list<"),
    "consent as text": case(
        typed("user_consent", pa.string(), "yes"), "'user_consent' has type string; expected a boolean"
    ),
    "consent as number": case(typed("user_consent", pa.int8(), 1), "'user_consent' has type int8"),
    "time as text": case(
        typed("timestamp", pa.string(), "2026-03-14"),
        "'timestamp' has type string; expected a timestamp",
        date_to="2026-12-31",
    ),
    "time as number": case(typed("timestamp", pa.int64(), 1), "'timestamp' has type int64", date_from="2026-01-01"),
    "model as number": case(typed("model", pa.int32(), 7), "'model' has type int32"),
    "log-probs as text": case(
        rows(*[r | {"lp": "x", "ids": [1]} for r in GOOD]),
        "'lp' has type string",
        logprobs_column="lp",
        token_ids_column="ids",
    ),
    "fractional token ids": case(
        rows(*[r | {"lp": [0.1], "ids": [0.5]} for r in GOOD]),
        "'ids' has type list<",
        logprobs_column="lp",
        token_ids_column="ids",
    ),
    "not UTF-8": case(not_utf8, "a.parquet rows 0..2: column 'output' can't be read as text"),
    # Partitions
    "a partition's date": case(partition("date=yesterday"), "partition date=yesterday; expected a day as YYYY-MM-DD"),
    "a date that is none": case(partition("date=2026-02-30"), "partition date=2026-02-30; expected a day"),
    "a partition's consent": case(partition("consent=maybe"), "partition consent=maybe; expected true or false"),
    # No group left
    "zero rows": case(rows(), "no rows in the files; expected labelled traces"),
    "no consent given": case(rows(*group("p", 0.9, 0.1, user_consent=False)), NONE_LEFT.format(2, 2, "no consent")),
    "all empty": case(rows(row("", "a", 0.9), row("p", " ", 0.1)), NONE_LEFT.format(2, 2, "empty input or output")),
    "all null": case(
        lambda lake: write(
            lake / "a.parquet", [dict.fromkeys(SCHEMA.names)] * 3, pa.schema([(n, pa.null()) for n in SCHEMA.names])
        ),
        NONE_LEFT.format(3, 3, "no consent"),
    ),
    "rewards out of range": case(
        rows(*group("p", float("nan"), float("inf"), -0.1, 1.0001, 5)),
        NONE_LEFT.format(5, 5, "reward null, NaN or outside 0..1"),
    ),
    "nothing but text in chat form": case(rows(*GOOD, format="chat"), NONE_LEFT.format(3, 3, "unparsable chat")),
    "roles that the template refuses": case(
        rows(*group(CHAT.replace("user", "wizard"), 0.9, 0.1)), NONE_LEFT.format(2, 2, "unparsable chat")
    ),
    "one response a prompt": case(
        rows(row("p", "a", 0.9), row("q", "a", 0.9)), NONE_LEFT.format(2, 2, "group left with one response")
    ),
    "no spread": case(rows(*group("p", 0.9, 0.9)), NONE_LEFT.format(2, 2, "group without spread")),
    "all weak": case(rows(*group("p", 0.4, 0.1)), NONE_LEFT.format(2, 2, "below threshold")),
    "all too long": case(
        rows(*[row("p", "~!" * 200 + str(n), n / 9) for n in range(9)]), NONE_LEFT.format(9, 9, "too long")
    ),
    "one response many times": case(
        rows(*[row("p", "a", 0.9)] * 5), NONE_LEFT.format(5, 4, "duplicate response (merged)")
    ),
    "all of another day": case(
        rows(*GOOD, date_to="2020-01-01"), NONE_LEFT.format(3, 3, "outside data.date_from..date_to")
    ),
    "all of another model": case(rows(*GOOD, models=["gpt"]), NONE_LEFT.format(3, 3, "not sampled from data.models")),
    "all contradicted": case(
        partition("date=2020-01-01"), NONE_LEFT.format(3, 3, "partition key contradicts the file's column")
    ),
    "all held out": case(rows(*GOOD, held_out_share=0.999999), "all 1 groups left are held out"),
}


@pytest.mark.parametrize("bad", REFUSED.values(), ids=REFUSED.keys())
def test_refused(tokenizer: PreTrainedTokenizerBase, lake: Path, cache: Path, bad: Refused) -> None:
    bad.make(lake)
    with pytest.raises(DataError) as refused:
        prepared(tokenizer, str(lake), cache, **bad.data)
    message = str(refused.value)
    assert bad.says in message
    assert "\n" not in message
    assert len(message) < 1000
    assert refused.value.exit_code == EXIT_REFUSED
    assert not cache.exists() or not list(cache.iterdir())


def test_there_are_at_least_forty() -> None:
    assert len(REFUSED) >= 40


ODD: dict[str, tuple[list[dict[str, Any]], dict[str, int]]] = {
    "infinite reward": ([row("good", "x", float("inf"))], {"REWARD": 1}),
    "deep nesting": ([row("good", "[" * 50_000, 0.2)], {"TOO_LONG": 1}),
    "deep nesting in a message": (
        [row('[{"role":"user","content":"x","n":' + "[" * 50_000 + "]" * 50_000 + "}]", "x", 0.2)],
        {"ONE_RESPONSE": 1},
    ),
    "a number of 10,000 digits": (
        [row(f'[{{"role":"user","content":"x","n":{"9" * 10_000}}}]', "y", 0.2)],
        {"ONE_RESPONSE": 1},
    ),
    "NUL and other controls": ([row("good", "\0\x01\x7f", 0.2)], {}),
    "emoji and right-to-left": ([row("good", "👩‍👩‍👧 שלום", 0.2)], {}),
    "lone surrogate in JSON": (
        [row('[{"role":"user","content":"\\ud83d"}]', "x", 0.2)],
        {"ONE_RESPONSE": 1},
    ),
    "an object as chat": ([row('{"role":"user","content":"x"}', "x", 0.2)], {"ONE_RESPONSE": 1}),
    "role of the assistant last": ([row('[{"role":"assistant","content":"x"}]', "x", 0.2)], {"UNPARSABLE": 1}),
    "a megabyte of spaces": ([row(" " * 1_000_000, "x", 0.2)], {"EMPTY": 1}),
    "special tokens inside": ([row("good", "a<|im_end|>b", 0.2)], {}),
    "two thousand duplicates": ([row("good", "same", 0.2)] * 2000, {"DUPLICATE": 1999}),
}


@pytest.mark.parametrize(("odd", "dropped"), ODD.values(), ids=ODD.keys())
def test_odd_rows_are_used_or_counted(
    tokenizer: PreTrainedTokenizerBase, lake: Path, cache: Path, odd: list[dict[str, Any]], dropped: dict[str, int]
) -> None:
    write(lake / "a.parquet", GOOD + odd)
    counts = prepared(tokenizer, lake, cache).counts
    assert counts.dropped == dropped
    assert counts.adds_up
    assert counts.train_rows == len(GOOD + odd) - sum(dropped.values())


def test_files_without_rows_and_row_groups_are_fine_beside_others(
    tokenizer: PreTrainedTokenizerBase, lake: Path, cache: Path
) -> None:
    write(lake / "a.parquet", [])
    write(lake / "b.parquet", GOOD)
    pq.ParquetWriter(lake / "c.parquet", SCHEMA).close()
    assert prepared(tokenizer, lake, cache).counts.train_rows == 3


def test_files_may_differ_in_types_and_order_of_columns(
    tokenizer: PreTrainedTokenizerBase, lake: Path, cache: Path
) -> None:
    write(lake / "a.parquet", GOOD)
    other = pa.schema(
        [(f.name, pa.large_string() if f.type == pa.string() else f.type) for f in reversed(list(SCHEMA))]
    )
    other = other.set(other.get_field_index("final_reward"), pa.field("final_reward", pa.float32()))
    write(lake / "b.parquet", [row("good", "new", 0.7)], other)
    assert prepared(tokenizer, lake, cache).train[0].rewards.tolist() == [0.9, 0.7, 0.6, 0.1]
