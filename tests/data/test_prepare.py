"""Preparing: the same groups from the same rows, whatever the files; once a key; nothing half done is used."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from entrypoint.conf.data import Data
from entrypoint.data import prepare as module
from entrypoint.data.gather import Split, sorted_rows
from entrypoint.data.locations import find_files
from entrypoint.data.prepare import is_prepared, load_prepared, prepare, prepared_key
from entrypoint.errors import DataError
from tests.data.traces import contents, group, prepared, row, write

Tokenizer = PreTrainedTokenizerBase


def traces() -> list[dict[str, Any]]:
    """120 rows: text and chat prompts, ties, duplicates with other rewards, rows without consent."""
    random.seed(7)
    rows = []
    for number in range(30):
        prompt = f"question {number}"
        if number % 3 == 0:
            prompt = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}])
        for answer in range(4):
            reward = random.choice([0.0, 0.1, 0.2, 0.45, 0.6, 0.8, 0.9])
            text = f"answer {random.randrange(4)}"
            consent = random.random() < 0.95
            rows.append(row(prompt, text, reward, user_consent=consent, model=f"m{answer % 2}"))
    return rows


def test_the_order_of_rows_and_files_changes_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One file; shuffled over three; over partitions, with small row groups: byte for byte the same groups."""
    rows = traces()
    write(tmp_path / "one" / "a.parquet", rows)
    random.seed(8)
    random.shuffle(rows)
    for number in range(3):
        write(tmp_path / "three" / f"{number}.parquet", rows[number::3], compression="zstd")
    for name in ("m0", "m1"):
        some = [r for r in reversed(rows) if r["model"] == name]
        write(tmp_path / "hive" / f"date=2026-03-14/model={name}/x.parquet", some, row_group_size=7)
    results = [
        prepared(tokenizer, tmp_path / name, tmp_path / f"cache {name}", held_out_share=0.3)
        for name in ("one", "three", "hive")
    ]
    first = contents(results[0])
    assert len(first) > 15
    for other in results[1:]:
        assert contents(other) == first
        assert len(other.train) == len(results[0].train)
        assert other.counts == results[0].counts


def test_groups_are_ordered_by_their_hash_and_responses_by_reward(
    tokenizer: Tokenizer, lake: Path, cache: Path
) -> None:
    write(lake / "a.parquet", group("q", 0.1, 0.9, 0.9) + group("p", 0.2, 0.8))
    result = prepared(tokenizer, lake, cache)
    expected = sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in "pq")
    assert [g.prompt_hash for g in result.train] == [prompt_hash for prompt_hash, _ in expected]
    for found, (_, text) in zip(result.train, expected, strict=True):
        assert found.prompt_ids.tolist() == tokenizer(text)["input_ids"]
        assert all(a >= b for a, b in pairwise(found.rewards))
    q = result.train[[text for _, text in expected].index("q")]
    # Equal rewards: by text. `answer 1` and `answer 2` were 0.9, `answer 0` 0.1.
    texts = [tokenizer.decode(ids[:-1]) for ids in q.response_ids]
    assert texts == ["answer 1", "answer 2", "answer 0"]
    assert {ids[-1] for ids in q.response_ids} == {tokenizer.eos_token_id}


def test_the_split_is_the_hash_of_the_prompt(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """Held out where the first 8 bytes of SHA-256, as a fraction, are below the share; more data moves nobody."""
    prompts = [f"prompt {number}" for number in range(40)]
    write(lake / "a.parquet", [r for prompt in prompts for r in group(prompt, 0.9, 0.1)])
    result = prepared(tokenizer, lake, cache, held_out_share=0.25)
    hashes = [hashlib.sha256(prompt.encode()) for prompt in prompts]
    expected = {h.hexdigest() for h in hashes if int.from_bytes(h.digest()[:8], "big") / 2**64 < 0.25}
    assert {g.prompt_hash for g in result.held_out} == expected
    assert 2 < len(expected) < 20
    assert result.counts.held_out_rows == 2 * len(expected)
    write(lake / "b.parquet", [r for prompt in prompts for r in group(prompt + " new", 0.9, 0.1)])
    again = prepared(tokenizer, lake, cache, held_out_share=0.25)
    assert expected <= {g.prompt_hash for g in again.held_out}
    assert not expected & {g.prompt_hash for g in again.train}


def test_long_rows_come_in_small_batches(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """A batch's 64 MiB are 64 rows of 1 MiB, here 65 since two short ones lower the mean; of 80 all are too long."""
    from entrypoint.data.locations import Opener
    from entrypoint.data.rules import Rules
    from entrypoint.data.scan import Scan

    rows = [row("p", f"{number} " + "~" * 2**20, number / 80) for number in range(80)]
    write(lake / "a.parquet", rows + group("q", 0.9, 0.1), use_dictionary=False, compression="zstd")
    scan = Scan(find_files(str(lake)), Rules.of(Data()).columns, Opener())
    assert max(batch.rows for batch in scan.batches()) == scan.batch_rows == 65
    assert prepared(tokenizer, lake, cache).counts.dropped == {"TOO_LONG": 80}


def test_split_bounds() -> None:
    assert Split(0.5).held_out(["7ff" + "0" * 61, "8" + "0" * 63]).tolist() == [True, False]
    assert Split(0.0).held_out(["0" * 64]).tolist() == [False]


def test_a_second_run_reads_no_trace(
    tokenizer: Tokenizer, lake: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(lake / "a.parquet", traces())
    first = prepared(tokenizer, lake, cache)

    def fail(*_: Any) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(module, "_write", fail)
    again = prepared(tokenizer, lake, cache)
    assert again.key == first.key
    assert again.counts == first.counts
    assert contents(load_prepared(cache, first.key)) == contents(first)


def test_the_key_moves_with_what_matters_alone(tokenizer: Tokenizer, lake: Path, tmp_path: Path) -> None:
    write(lake / "a.parquet", group("p", 0.9, 0.1))
    write(tmp_path / "elsewhere" / "b.parquet", group("p", 0.9, 0.1))

    def key(path: Path = lake, max_length: int = 100, **data: Any) -> str:
        return prepared_key(find_files(str(path)), Data(path=str(path), **data), max_length, tokenizer)

    same = key()
    assert key(tmp_path / "elsewhere") == same
    assert key(chosen_threshold=0.9, cache_path="/x", endpoint_url="http://localhost:1") == same
    changed = [key(max_length=101)]
    for change in (
        {"reward_column": "x"},
        {"min_reward_threshold": 0.4},
        {"threshold_scope": "row"},
        {"match": "normalized"},
        {"format": "text"},
        {"date_from": "2026-01-01"},
        {"date_to": "2026-01-01"},
        {"models": ["m"]},
        {"require_consent": False},
        {"behaviour_model": "m"},
        {"logprobs_column": "l", "token_ids_column": "t"},
        {"logprobs_column": "l", "token_ids_column": "u"},
        {"held_out_share": 0.2},
    ):
        changed.append(key(**change))
    write(lake / "a.parquet", group("p", 0.9, 0.2))
    changed.append(key())
    assert len({same, *changed}) == len(changed) + 1


def test_the_key_moves_with_tokenizer_and_template(tokenizer: Tokenizer, lake: Path, tmp_path: Path) -> None:
    from entrypoint.data.tokens import load_tokenizer

    write(lake / "a.parquet", group("p", 0.9, 0.1))
    files, data = find_files(str(lake)), Data(path=str(lake))
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert prepared_key(files, data, 100, copy) == prepared_key(files, data, 100, tokenizer)
    copy(["a", "longer"], padding=True, truncation=True, max_length=2)  # a call's state is not the tokenizer
    assert prepared_key(files, data, 100, copy) == prepared_key(files, data, 100, tokenizer)
    copy.chat_template = copy.chat_template + "x"
    assert prepared_key(files, data, 100, copy) != prepared_key(files, data, 100, tokenizer)
    copy = load_tokenizer(tmp_path / "copy")
    copy.add_tokens(["<new>"])
    assert prepared_key(files, data, 100, copy) != prepared_key(files, data, 100, tokenizer)


def dead_process() -> int:
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


def test_leftovers_of_the_dead_are_cleaned_up(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """Killed half way: its folder is not used, and goes. Another machine's goes after an hour of silence."""
    write(lake / "a.parquet", group("p", 0.9, 0.1))
    key = prepared_key(find_files(str(lake)), Data(path=str(lake), held_out_share=0.0), 200, tokenizer)
    host = socket.gethostname()
    old, ours, silent = (
        f"{key}.partial-{tail}" for tail in (f"{host}-{dead_process()}", f"{host}-{os.getpid()}", "x-1")
    )
    alive = [f"{key}.partial-{host}-{os.getppid()}", f"{key}.partial-other-host-1", f"other{key}.partial-x-1"]
    for name in (old, ours, silent, *alive):
        (cache / name / "spill").mkdir(parents=True)
        (cache / name / "train.arrow").write_bytes(b"half")
    for path in [cache / silent, *(cache / silent).iterdir()]:
        os.utime(path, (0, 0))
    assert not is_prepared(cache, key)
    result = prepared(tokenizer, lake, cache)
    assert result.key == key
    assert {path.name for path in cache.iterdir()} == {key, *alive}
    assert {path.name for path in (cache / key).iterdir()} == {"train.arrow", "held_out.arrow", "counts.json"}


def test_a_failure_leaves_nothing_behind(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    write(lake / "a.parquet", [row("p", "a", 0.9)])
    with pytest.raises(DataError, match="no group left"):
        prepared(tokenizer, lake, cache)
    assert list(cache.iterdir()) == []


def test_a_faster_run_wins(tokenizer: Tokenizer, lake: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run publishes the same key while this one is preparing: its folder is the one that is used."""
    write(lake / "a.parquet", group("p", 0.9, 0.1))
    first = prepared(tokenizer, lake, cache)
    monkeypatch.setattr(module, "is_prepared", lambda folder, key: False)
    again = prepared(tokenizer, lake, cache)
    assert contents(again) == contents(first)
    assert [path.name for path in cache.iterdir()] == [first.key]


@pytest.mark.parametrize("damage", ["train.arrow", "counts.json", "all"])
def test_damaged_prepared_folders_are_named(tokenizer: Tokenizer, lake: Path, cache: Path, damage: str) -> None:
    write(lake / "a.parquet", group("p", 0.9, 0.1))
    result = prepared(tokenizer, lake, cache)
    if damage == "all":
        with pytest.raises(DataError, match="not found"):
            load_prepared(cache, "0" * 32)
        return
    (result.folder / damage).write_bytes(b"{]")
    with pytest.raises(DataError, match=f"{result.key}: prepared traces are damaged"):
        load_prepared(cache, result.key)


def test_files_that_change_between_the_passes_are_refused(
    tokenizer: Tokenizer, lake: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are addressed by number: a file that was replaced by a longer one would give other rows."""
    write(lake / "a.parquet", group("p", 0.9, 0.1))
    write(lake / "b.parquet", group("q", 0.9, 0.1))

    def replaced(*arguments: Any) -> Any:
        write(lake / "a.parquet", group("p", 0.9, 0.5, 0.1))
        return sorted_rows(*arguments)

    monkeypatch.setattr(module, "sorted_rows", replaced)
    with pytest.raises(DataError, match="changed while they were read"):
        prepared(tokenizer, lake, cache)


def test_no_room_is_one_line(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 MB to sort in 20 MB of memory, and a spill folder that can't be one."""
    from entrypoint.data import index

    lake.touch()
    monkeypatch.setattr(index, "MEMORY", "20MB")
    with pytest.raises(DataError, match="lake: no room to sort the traces") as refused, index.database(lake) as opened:
        opened.execute("CREATE TABLE t AS SELECT repeat('a', 1000) || range AS x FROM range(100000) ORDER BY x")
    assert "\n" not in str(refused.value)


def test_a_folder_that_cannot_be_written(tokenizer: Tokenizer, lake: Path, tmp_path: Path) -> None:
    write(lake / "a.parquet", group("p", 0.9, 0.1))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file/cache"):
        prepare(Data(path=str(lake)), 100, tokenizer, tmp_path / "file" / "cache")


def test_large_rows_and_many_batches(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """Groups that span several sorted batches, prompts that span row groups: 3 prompts, 9,000 rows."""
    rows = [row(f"p{number % 3}", f"a{number}", number / 9000) for number in range(9000)]
    write(lake / "a.parquet", rows, row_group_size=1000)
    result = prepared(tokenizer, lake, cache)
    assert result.train.sizes.tolist() == [3000] * 3
    assert sorted(result.train.rewards.tolist()) == [number / 9000 for number in range(9000)]
    assert result.counts.adds_up
