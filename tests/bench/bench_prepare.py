"""Bench (a): the index of a million traces of about 2 kB against a warm plain pyarrow scan of the same columns.

    python -m tests.bench.bench_prepare                                   # the ratio, and the rest of the preparation
    python -m tests.bench.bench_prepare --rows 10000000 --peak-memory     # peak memory of a whole preparation

CHECK=1 makes a ratio above 2 an error. The traces are synthetic (groups of about 8, prompts of 600 bytes, responses of
700 to 2,100) and are kept in --folder for the next time.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entrypoint.conf.data import Data
from entrypoint.data.gather import Split, Writer, sorted_rows
from entrypoint.data.index import Index, build_index
from entrypoint.data.locations import Opener, find_files
from entrypoint.data.prepare import prepare
from entrypoint.data.report import Counts
from entrypoint.data.rules import Rules
from entrypoint.data.scan import BATCH_ROWS, Scan
from entrypoint.data.tokens import Tokens

LIMIT = 2.0  # of the ratio
ROUNDS = 5
FILE_ROWS = 100_000
WORDS = 20_000
BYTES = 2_000  # of text in a row, about
TOKENISED = 50_000  # rows that the rate of tokenising is measured on
COLUMNS = ["input", "output", "final_reward", "user_consent", "model"]
MAX_LENGTH = 4096


def words() -> list[str]:
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return ["".join(random.choice(letters, random.integers(2, 10))) for _ in range(WORDS)]


def traces(folder: Path, rows: int, codec: str) -> Path:
    """Write the traces once."""
    lake = folder / f"traces-2-{codec}-{rows}"
    if lake.is_dir():
        return lake
    partial = folder / f"{lake.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    vocabulary = np.array(words())
    random = np.random.default_rng(1)
    # Words as often as in language (Zipf's law); of equally frequent ones the text would hardly compress.
    frequency = 1 / np.arange(1, WORDS + 1)
    picks = vocabulary[random.choice(WORDS, 2_000_000, p=frequency / frequency.sum())]
    text = " ".join(picks)
    starts = np.cumsum([0, *(len(word) + 1 for word in picks)])[: len(picks) * 9 // 10]  # where words begin
    for number in range(-(-rows // FILE_ROWS)):
        size = min(FILE_ROWS, rows - number * FILE_ROWS)
        prompt = random.integers(0, max(rows // 8, 1), size)
        begins = starts[prompt * 7919 % len(starts)].tolist()
        answers = starts[random.integers(0, len(starts), size)].tolist()
        lengths = random.integers(700, 2100, size).tolist()
        table = pa.table(
            {
                "id": np.arange(size) + number * FILE_ROWS,
                "input": [f"{text[at : at + 600]} {p}" for at, p in zip(begins, prompt.tolist(), strict=True)],
                "output": [text[at : at + length] for at, length in zip(answers, lengths, strict=True)],
                "model": ["base"] * size,
                "user_consent": random.random(size) < 0.97,
                "final_reward": random.random(size).round(3),
            }
        )
        pq.write_table(table, partial / f"{number:05d}.parquet", compression=codec)
    partial.rename(lake)
    return lake


def plain_scan(lake: Path) -> int:
    """The fastest way that pyarrow reads these columns here: file by file, columns in parallel, the same batches."""
    rows = 0
    for path in sorted(lake.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            rows += sum(batch.num_rows for batch in file.iter_batches(BATCH_ROWS, columns=COLUMNS))
    return rows


def index(lake: Path, spill: Path) -> tuple[Index, Scan, Counts]:
    rules = Rules.of(Data(path=str(lake)))
    scan, counts = Scan(find_files(str(lake)), rules.columns, Opener()), Counts()
    return build_index(scan, rules, counts, spill), scan, counts


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of wall clock and of CPU (all threads), and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def tokenizer(piece: int = 0) -> Any:
    """One token a word: a cheap tokenizer with a realistic number of tokens; or one a `piece` of so many letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *dict.fromkeys(words())])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.FixedLength(piece) if piece else pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


def compare(lake: Path, rows: int) -> float:
    """Print the ratio and the rest of the preparation; returns the ratio."""
    with tempfile.TemporaryDirectory(dir=lake.parent) as scratch:
        spill = Path(scratch)
        plain_scan(lake)  # warms the page cache
        index(lake, spill)
        plain, ours = [], []
        for _ in range(ROUNDS):
            plain.append(timed(lambda: plain_scan(lake))[:2])
            ours.append(timed(lambda: index(lake, spill))[:2])
        (plain_wall, plain_cpu), (our_wall, our_cpu) = (
            [statistics.median(column) for column in zip(*rounds, strict=True)] for rounds in (plain, ours)
        )
        ratio: float = our_wall / plain_wall
        print(f"plain scan   {plain_wall:7.2f} s   (CPU {plain_cpu:.2f} s)")
        print(f"index        {our_wall:7.2f} s   (CPU {our_cpu:.2f} s)   median of {ROUNDS}, interleaved")
        print(f"ratio        {ratio:7.2f}     (CPU {our_cpu / plain_cpu:.2f}), limit {LIMIT}")
        rest(lake, spill, rows)
    return ratio


def rest(lake: Path, folder: Path, rows: int) -> None:
    """Print what the second pass costs: reading again and sorting, then tokenising and writing."""
    found, scan, counts = index(lake, folder)
    rules = Rules.of(Data(path=str(lake)))

    def sort() -> int:
        return sum(table.num_rows for table in sorted_rows(scan, rules, found, folder))

    wall, _, left = timed(sort)
    print(f"read, sort   {wall:7.2f} s   {left:,} of {rows:,} rows by prompt")
    few = Index(found.rows[:TOKENISED], found.rewards[:TOKENISED])
    tables = list(sorted_rows(scan, rules, few, folder))
    writer = Writer(Tokens(tokenizer()), rules, counts, scan, Split(0.1), MAX_LENGTH, folder)

    def write() -> None:
        writer.write(_whole(tables))

    wall, _, _ = timed(write)
    print(
        f"tokenise     {wall:7.2f} s   for {len(few.rows):,} rows, one token a word: {len(few.rows) / wall:,.0f} rows/s"
    )


def _whole(tables: list[pa.Table]) -> Iterator[pa.Table]:
    yield from tables


def peak(lake: Path) -> None:
    """Prepare everything in this process and print its peak memory.

    Tokens are pieces of 32 letters, about 45 a row, so that ten million rows take minutes: a batch of 8,192 rows with
    the usual 400 tokens each would hold some 100 MB more.
    """
    with tempfile.TemporaryDirectory(dir=lake.parent) as scratch:
        wall, cpu, result = timed(lambda: prepare(Data(path=str(lake)), MAX_LENGTH, tokenizer(32), Path(scratch)))
        print(result.counts.text())
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"prepare      {wall:7.0f} s   (CPU {cpu:.0f} s), peak memory {memory:.2f} GiB")


def main() -> int:
    """Run the bench; the exit code says whether CHECK=1 is content."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--codec", default="snappy", help="compression of the Parquet files; default: pyarrow's")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench-prepare")
    parser.add_argument("--peak-memory", action="store_true", help="a whole preparation in a process of its own")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    lake = traces(given.folder, given.rows, given.codec)
    if given.inside:
        peak(lake)
        return 0
    size = sum(path.stat().st_size for path in lake.iterdir())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine, python = platform.processor() or platform.machine(), platform.python_version()
    print(f"{machine}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {python}")
    print(f"pyarrow {pa.__version__}, duckdb {duckdb.__version__}, datasets {datasets.__version__}")
    print(
        f"load {os.getloadavg()[0]:.1f} before, {given.rows:,} rows, {size / 2**30:.2f} GiB of Parquet ({given.codec})",
        flush=True,
    )
    if given.peak_memory:
        command = [sys.executable, "-m", "tests.bench.bench_prepare", *sys.argv[1:], "--inside"]
        return subprocess.run(command, check=False).returncode
    ratio = compare(lake, given.rows)
    return int(ratio > LIMIT and os.environ.get("CHECK") == "1")


if __name__ == "__main__":
    sys.exit(main())
