"""Labelled traces to groups of token ids, once: rank 0 prepares into a folder that all ranks see, the others load.

    files -> index (which rows are worth it) -> rows by prompt -> token ids -> <folder>/<key>/{train,held_out}.arrow

The key names what the result depends on, so a restart, and another run over the same traces, finds it complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from entrypoint.conf.data import Data
from entrypoint.data.gather import Split, Writer, sorted_rows
from entrypoint.data.groups import Groups
from entrypoint.data.index import build_index
from entrypoint.data.locations import Opener, TraceFile, find_files
from entrypoint.data.report import Counts
from entrypoint.data.rules import Partitions, Rules
from entrypoint.data.scan import Scan
from entrypoint.data.tokens import Tokens, tokenizer_key
from entrypoint.errors import DataError
from entrypoint.storage import explained, sync, write_atomically

FORMAT = 1  # of what is prepared: raise it with every change of rules or layout, and old folders are left alone
STALE = 3600  # seconds; a partial folder of another machine in which nothing moved for so long belongs to nobody

# Keys of `data` that change what is prepared. Where files lie is not among them: what they hold is.
KEYS = (
    "reward_column",
    "min_reward_threshold",
    "threshold_scope",
    "match",
    "format",
    "date_from",
    "date_to",
    "require_consent",
    "behaviour_model",
    "logprobs_column",
    "token_ids_column",
    "held_out_share",
)


@dataclass(frozen=True)
class Prepared:
    """Traces ready for training: `train` and `held_out` groups, memory-mapped, and what became of every row."""

    key: str
    folder: Path
    train: Groups
    held_out: Groups
    counts: Counts


def prepare(
    data: Data,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    files: Sequence[TraceFile] | None = None,
) -> Prepared:
    """Prepare the traces of `data` into `folder`/<key>, or reuse what is there.

    Args:
        data: which traces, and the rules.
        max_length: tokens of prompt and response together; longer rows are dropped.
        tokenizer: the base model's (see `load_tokenizer`).
        folder: seen by all ranks.
        files: what `find_files` gave, where the key is known already: another listing might give another key.

    Raises:
        NoGroupLeft: nothing is left to train on; carries the table of reasons.
        DataError: the traces can't be used.
    """
    files = find_files(data.path, data.endpoint_url) if files is None else files
    key = prepared_key(files, data, max_length, tokenizer)
    if is_prepared(folder, key):
        return load_prepared(folder, key)
    with explained(str(folder), DataError):
        folder.mkdir(parents=True, exist_ok=True)
        _clean_up(folder, key)
        partial = folder / f"{key}.partial-{socket.gethostname()}-{os.getpid()}"
        partial.mkdir()
        try:
            _write(files, data, max_length, tokenizer, partial)
            _publish(partial, folder / key)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return load_prepared(folder, key)


def prepared_key(files: Sequence[TraceFile], data: Data, max_length: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the result depends on, as 32 hexadecimal digits; no trace is read for it.

    A file whose folder alone rules it out, such as tomorrow's partition, changes nothing of what is prepared.
    """
    rules = Rules.of(data)
    files = [file for file in files if Partitions.of(file).verdict(rules) is None]
    parts = {
        "format": FORMAT,
        "files": sorted([file.identity, sorted((k, v or "") for k, v in file.partitions.items())] for file in files),
        "data": {name: getattr(data, name) for name in KEYS},
        "models": sorted(data.models),
        "max_length": max_length,
        "tokenizer": tokenizer_key(tokenizer),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def is_prepared(folder: Path, key: str) -> bool:
    """Whether `folder`/<key> is there; it appears complete or not at all."""
    return (folder / key / "counts.json").is_file()


def load_prepared(folder: Path, key: str) -> Prepared:
    """Map what `prepare` wrote.

    Raises:
        DataError: it isn't there, or can't be read.
    """
    path = folder / key
    with explained(str(path), DataError):
        try:
            counts = Counts.from_dict(json.loads((path / "counts.json").read_text()))
            train, held_out = Groups.from_file(path / "train.arrow"), Groups.from_file(path / "held_out.arrow")
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}: prepared traces are damaged ({error}); delete this folder and start again"
            ) from error
    return Prepared(key, path, train, held_out, counts)


def _write(
    files: Sequence[TraceFile], data: Data, max_length: int, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Prepare into `folder`, which is empty."""
    rules = Rules.of(data)
    scan = Scan(files, rules.columns, Opener(data.endpoint_url))
    counts = Counts()
    spill = folder / "spill"
    index = build_index(scan, rules, counts, spill)
    writer = Writer(Tokens(tokenizer), rules, counts, scan, Split(data.held_out_share), max_length, folder)
    writer.write(sorted_rows(scan, rules, index, spill))
    shutil.rmtree(spill, ignore_errors=True)
    if data.behaviour_model is not None:
        counts.other_models = sum(rows for name, rows in counts.models.items() if name != data.behaviour_model)
    if not counts.train_groups:
        raise counts.no_group_left(str(data.path))
    write_atomically(folder / "counts.json", json.dumps(counts.to_dict(), indent=1).encode())


def _publish(partial: Path, final: Path) -> None:
    """Make `partial` last, then visible under its final name at once."""
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    try:
        os.rename(partial, final)
    except OSError:
        if not (final / "counts.json").is_file():  # another run was faster: the same key, the same content
            raise
    sync(final.parent)


def _clean_up(folder: Path, key: str) -> None:
    """Remove what killed processes left of this key: this machine's dead, and what nobody touched for an hour."""
    for partial in folder.glob(f"{key}.partial-*"):
        host, _, pid = partial.name.split(".partial-", 1)[1].rpartition("-")
        here = host == socket.gethostname() and pid.isdigit()
        if (here and (int(pid) == os.getpid() or not _alive(int(pid)))) or _idle(partial) > STALE:
            shutil.rmtree(partial, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _idle(folder: Path) -> float:
    """Seconds since anything in `folder` was written."""
    newest = 0.0
    for root, _, names in os.walk(folder):
        for path in [root, *(os.path.join(root, name) for name in names)]:
            try:
                newest = max(newest, os.stat(path).st_mtime)
            except FileNotFoundError:  # its owner is alive
                return 0.0
    return time.time() - newest
