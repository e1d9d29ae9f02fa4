"""The traces, by a bounded sample: whether they can be read, and how many groups the run would learn from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from entrypoint.conf import Dpo, Run
from entrypoint.config.places import sources_of
from entrypoint.data.index import skipped
from entrypoint.data.locations import Opener, TraceFile, find_files
from entrypoint.data.pairs import no_pair
from entrypoint.data.report import Counts
from entrypoint.data.rules import Rules
from entrypoint.data.scan import Scan
from entrypoint.inspect import count_used, room_to_sort
from entrypoint.inspection import statistics
from entrypoint.inspection.responses import Reader, Responses

SAMPLE_FILES = 64
SAMPLE_ROWS = 200_000  # seconds to read, also from S3


@dataclass(frozen=True)
class Sample:
    """What was read of the traces.

    `files` and `rows` are of all files that the folders' names do not rule out; `rows` is an estimate unless the
    sample is complete. `pairs` is None for a method without pairs.
    """

    counts: Counts
    left: int  # responses that the rules for single rows leave
    files: int
    read_files: int
    rows: int
    complete: bool
    pairs: int | None

    def text(self) -> str:
        """What the sample has and, where it is not all, what may be there in all."""
        counts = self.counts
        groups = f"{counts.train_groups:,} groups to train on, {counts.held_out_groups:,} held out"
        found = groups if self.pairs is None else f"{groups}, {self.pairs:,} pairs"
        if self.complete:
            return f"all {counts.rows:,} rows of {self.files:,} files read: {found}"
        scale = self.rows / max(counts.rows, 1)
        whole = f"{_about(counts.train_groups * scale)} groups"
        whole += "" if self.pairs is None else f", {_about(self.pairs * scale)} pairs"
        return (
            f"{counts.rows:,} of some {_about(self.rows)} rows read, in {self.read_files:,} of {self.files:,} files: "
            f"at least {found}; some {whole} if a prompt's rows lie together, else a sample can't tell"
        )


def check_data(run: Run, warn: Callable[[str], None]) -> str:
    """Read a sample of the traces; returns what to say of it.

    Raises:
        DataError: they can't be read, or certainly leave nothing to train on.
    """
    sample = take_sample(run)
    where = ", ".join(sources_of(run.data))
    # Of a sample, groups that lack responses prove nothing; rows that are all dropped one by one do.
    if not sample.counts.train_groups:
        if sample.complete or not sample.left:
            raise sample.counts.no_group_left(where if sample.complete else f"{where} (a sample)")
        warn(f"{where}: no group to train on in the sample; `python -m entrypoint.inspect` reads all of it")
    elif sample.pairs == 0:
        if sample.complete:
            raise no_pair(sample.counts.train_groups, run.data)
        warn(f"{where}: no pair in the sample; `python -m entrypoint.inspect` reads all of it")
    return sample.text()


def take_sample(run: Run) -> Sample:
    """Read the first rows of files that are spread evenly over all.

    Raises:
        DataError: a file can't be read.
    """
    data = run.data
    files = find_files(data.path, data.endpoint_url)
    rules = Rules.of(data)
    opener = Opener(data.endpoint_url)
    ruled_out = skipped(Scan(files, rules.columns, opener), rules)
    # Where the folders rule out every file, some are read all the same: for the table that says so.
    wanted = [file for file in files if file.path not in ruled_out] or files
    chosen = _spread(wanted, SAMPLE_FILES)
    scan = Scan(chosen, rules.columns, opener, most=max(1, SAMPLE_ROWS // len(chosen)))
    reader = Reader(scan, rules, data.held_out_share, Counts())
    with room_to_sort(), tempfile.TemporaryDirectory() as spill:
        responses = reader.read(Path(spill))
    usable = responses.usable(rules, reader.counts)
    count_used(usable, reader.counts)
    rows = scan.rows * sum(file.size for file in wanted) / max(1, sum(file.size for file in chosen))
    return Sample(
        counts=reader.counts,
        left=len(responses),
        files=len(wanted),
        read_files=len(chosen),
        rows=round(rows),
        complete=len(chosen) == len(wanted) and reader.counts.rows == scan.rows,
        pairs=_pairs(run, usable),
    )


def _spread(files: Sequence[TraceFile], most: int) -> list[TraceFile]:
    """At most so many of `files`, evenly spread."""
    if len(files) <= most:
        return list(files)
    return [files[number * len(files) // most] for number in range(most)]


def _pairs(run: Run, usable: Responses) -> int | None:
    if not isinstance(run.method, Dpo):
        return None
    found = statistics.pairs(
        usable.where(~usable.held_out),
        chosen=run.data.chosen_threshold,
        rejected=run.data.rejected_threshold,
        limit=run.method.pairs_per_prompt,
    )
    return int(found["by_pairing"][run.method.pairing])


def _about(number: float) -> str:
    """Two digits that count: more would be claimed than is known."""
    return f"{int(float(f'{number:.1e}')):,}"
