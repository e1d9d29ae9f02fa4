"""`python -m entrypoint.inspect`: what is in labelled traces, and which method they suit. Nothing is trained."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import duckdb

from entrypoint.command import explain, leave_pipe
from entrypoint.conf import Dpo, Run
from entrypoint.conf.key import REQUIRED
from entrypoint.config import load_data
from entrypoint.config.places import sources_of
from entrypoint.data.locations import Opener, TraceFile, find_files
from entrypoint.data.report import Counts
from entrypoint.data.rules import Rules
from entrypoint.data.scan import Scan
from entrypoint.errors import ConfigError, DataError, RunError
from entrypoint.inspection import advice, statistics
from entrypoint.inspection.lengths import Lengths, Tokenizer, estimate
from entrypoint.inspection.responses import Days, Reader, Responses, with_scores
from entrypoint.inspection.text import text
from entrypoint.storage import explained, write_atomically

EPOCH = date(1970, 1, 1)
USAGE = """\
Says what is in labelled traces, and whether they suit GRPO or DPO. Nothing is trained or written.

  python -m entrypoint.inspect data.path=/traces                        tokens are estimated
  python -m entrypoint.inspect data.path=/traces model.path=/models/b   tokens are counted by the model's tokenizer
  python -m entrypoint.inspect --config-dir /etc/run --config-name run  the traces of a run file
  python -m entrypoint.inspect … --json report.json                     the same numbers as JSON; - prints only JSON

Keys are those of `python -m entrypoint --help`; only data.path is required.
Exit codes: 0 done; 64 the configuration or the traces can't be used, or no group of them is left.
"""


@dataclass(frozen=True)
class Options:
    """The command line: where JSON goes (None: nowhere), whether help is wanted, and the words for the run."""

    json: str | None
    help: bool
    words: list[str]


def main(argv: list[str]) -> int:
    """Inspect the traces that `argv` names; returns the documented exit code."""
    try:
        options = parse(argv)
        if options.help:
            print(USAGE, end="")
            return 0
        show(inspect(load_data(options.words)), options.json)
    except RunError as error:
        explain(error)
        return error.exit_code
    except BrokenPipeError:  # `… | head` has seen enough
        leave_pipe()
    return 0


def parse(argv: list[str]) -> Options:
    """Take `--json` and `--help` out of `argv`.

    Raises:
        ConfigError: `--json` has no value, is given twice, or names a folder.
    """
    target: str | None = None
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        option, equals, value = word.partition("=")
        if option != "--json":
            words.append(word)
            continue
        value = value if equals else next(rest, "")
        if not value or target is not None:
            raise ConfigError("--json: expected one file, or - for standard output")
        target = value
    if target is not None and target != "-" and Path(target).is_dir():
        raise ConfigError(f"--json: expected a file, {target!r} is a folder")
    return Options(target, any(word in ("--help", "-h") for word in words), words)


def inspect(run: Run) -> dict[str, Any]:
    """The report on the traces of `run`: plain values under stable names, as `--json` writes them.

    Raises:
        NoGroupLeft: neither method could train; carries the table of reasons.
        DataError, ModelError: the traces, or the tokenizer, can't be read.
    """
    data = run.data
    files = find_files(data.path, data.endpoint_url)
    rules = with_scores(Rules.of(data))
    scan = Scan(files, rules.columns, Opener(data.endpoint_url))
    reader = Reader(scan, rules, data.held_out_share, Counts())
    # Preparation never asks for the scores: a second read doesn't either.
    plain = Rules.of(data)
    again = Scan(files, plain.columns, Opener(data.endpoint_url))
    with room_to_sort():
        with tempfile.TemporaryDirectory() as spill:
            responses = reader.read(Path(spill))
        usable = responses.usable(rules, reader.counts)
        lengths, usable = _lengths(run, usable, again, plain, reader.counts)
    count_used(usable, reader.counts)
    if not reader.counts.train_groups:
        raise reader.counts.no_group_left(", ".join(sources_of(data)))
    return {**_traces(run, files, reader.counts, reader.days), **_numbers(run, responses, usable, lengths)}


def show(report: dict[str, Any], target: str | None) -> None:
    """Print the report as text and write it as JSON to `target`; with `-` print only JSON."""
    content = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if target == "-":
        print(content, end="", flush=True)
        return
    print(text(report), flush=True)
    if target is not None:
        with explained(target, ConfigError):
            write_atomically(Path(target), content.encode())


@contextmanager
def room_to_sort() -> Iterator[None]:
    """Name the folder where the block's sorting runs out of room."""
    try:
        with explained("the temporary folder (TMPDIR)", DataError):
            yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{tempfile.gettempdir()}: no room to sort the traces ({reason}); set TMPDIR to a folder on a larger disk"
        ) from error


def _lengths(run: Run, usable: Responses, scan: Scan, rules: Rules, counts: Counts) -> tuple[Lengths, Responses]:
    if run.model.path == REQUIRED or not len(usable):
        return estimate(usable), usable
    tokenizer = Tokenizer(run.model.path, run.data.endpoint_url)
    return tokenizer.count(usable, scan, rules, counts, run.train.max_length)


def count_used(usable: Responses, counts: Counts) -> None:
    """Write down in `counts` what of the traces training and evaluation can use."""
    held_out = usable.held_out[usable.starts]
    counts.train_groups, counts.held_out_groups = int((~held_out).sum()), int(held_out.sum())
    counts.train_rows, counts.held_out_rows = int((~usable.held_out).sum()), int(usable.held_out.sum())


def _traces(run: Run, files: list[TraceFile], counts: Counts, days: Days) -> dict[str, Any]:
    keys = sorted({key for file in files for key in file.partitions})
    models = {name: rows for name, rows in counts.models.items() if name != run.data.behaviour_model}
    if run.data.behaviour_model is not None:
        counts.other_models = sum(models.values())
    return {
        "traces": {
            "path": sources_of(run.data),
            "files": len(files),
            "bytes": sum(file.size for file in files),
            "first_day": _day(days.first),
            "last_day": _day(days.last),
            "models": dict(sorted(counts.models.items())),
            "partitions": {key: len({file.partitions.get(key) for file in files}) for key in keys},
        },
        "rows": counts.to_dict(),
    }


def _numbers(run: Run, responses: Responses, usable: Responses, lengths: Lengths) -> dict[str, Any]:
    data = run.data
    chosen, rejected = data.chosen_threshold, data.rejected_threshold
    limit = (run.method if isinstance(run.method, Dpo) else Dpo()).pairs_per_prompt
    pairs = statistics.pairs(usable, chosen=chosen, rejected=rejected, limit=limit)
    noise, steps = statistics.noise(responses, usable), statistics.steps(run, usable)
    return {
        "thresholds": {"chosen": chosen, "rejected": rejected},
        "groups": statistics.groups(responses, usable),
        "rewards": statistics.rewards(responses, chosen=chosen, rejected=rejected),
        "pairs": pairs,
        "noise": noise,
        "length_bias": statistics.length_bias(responses),
        "tokens": statistics.tokens(lengths, run.train.max_length),
        "steps": steps,
        "recommendation": advice.recommend(noise, pairs, steps),
    }


def _day(day: int | None) -> str | None:
    try:
        return None if day is None else (EPOCH + timedelta(days=day)).isoformat()
    except OverflowError:  # a wild timestamp is no reason to stop
        return f"day {day}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
