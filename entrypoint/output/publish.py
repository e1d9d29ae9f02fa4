"""Output: the hand-off to the eval gate: the final model and `run.json` at `output.path`, on disk or S3.

Readers look for `run.json` and nothing else: it is written last, so whoever sees it sees every file that it names.

    format               1; another number: another meaning
    method               grpo or dpo
    base_model           model.path as configured
    base_model_identity  SHA-256 of the base model's content
    iteration            output.iteration
    date                 UTC, ISO 8601
    fingerprint          what makes this run this run: data, model and training keys
    counts               rows used and dropped, by reason
    metrics              {before: {name: value}, after: {name: value}} on the held-out pairs
    training             steps, epochs, seconds and what a unit of the batch was
    story                starts, interruptions and crashes, and what they cost; see docs/metrics.md
    versions             of Python, this program and the libraries that decide the numbers
    configuration        the composed run file
    files                {name: {sha256, size in bytes}} of every file of the model
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from entrypoint.errors import CheckpointError, RunError
from entrypoint.model.final import save_model
from entrypoint.output.target import Target, open_target
from entrypoint.storage import explained, file_sha256

__all__ = ["claim_output", "find_output", "publish", "save_model"]

log = logging.getLogger(__name__)

FORMAT = 1
RUN_FILE = "run.json"
UNFINISHED = ".run.json.unfinished"  # there while the files are written: names the run that does
MODEL_FILES = ("config.json", "adapter_config.json")
MODEL_SUFFIXES = (".safetensors", ".bin", ".gguf")
HASHERS = 4  # SHA-256 at once; the interpreter's lock is not held


def find_output(url: str, endpoint_url: str | None = None) -> dict[str, Any] | None:
    """The run.json at `url`; None: there is none.

    Raises:
        CheckpointError: the place or the file can't be read.
    """
    with explained(url, CheckpointError):
        return _read(open_target(url, endpoint_url), RUN_FILE)


def claim_output(
    url: str, fingerprint: Any, *, endpoint_url: str | None = None, partial: bool = False
) -> dict[str, Any] | None:
    """Make sure, before anything costly, that this run's output can go to `url`, by writing there for a moment.

    Args:
        fingerprint: what makes this run this run; anything that JSON can hold.
        partial: whether `fingerprint` lacks keys that are not known yet; they are not compared.

    Returns:
        The run.json of this very run where its output is complete: nothing is left to do. None: it is to be made.

    Raises:
        CheckpointError: another run's output or a foreign model is there, or the place can't be read or written.
    """
    with explained(url, CheckpointError):
        target = open_target(url, endpoint_url)
        sizes = target.sizes()
        run = _read(target, RUN_FILE) if RUN_FILE in sizes else None
        owner = run or (_read(target, UNFINISHED) if UNFINISHED in sizes else None)
        if owner is not None and partial and isinstance(owner.get("fingerprint"), dict):
            fingerprint = {**owner["fingerprint"], **fingerprint}
        if owner is not None and owner.get("fingerprint") != _plain(fingerprint):
            _refuse_other(url, owner, fingerprint)
        if run is not None and not (damaged := _damaged(run, sizes)):
            return run
        if run is not None:
            log.warning("%s: %s is missing or has another size than %s says: made again", url, damaged, RUN_FILE)
        foreign = sorted(name for name in sizes if name in MODEL_FILES or name.endswith(MODEL_SUFFIXES))
        if owner is None and foreign:
            raise CheckpointError(
                f"{url}: holds a model ({foreign[0]}) without {RUN_FILE}; name another output.path or empty this one"
            )
        target.probe()
    return None


def publish(folder: Path, url: str, endpoint_url: str | None, record: Mapping[str, Any]) -> dict[str, Any]:
    """Put the files of `folder` (top level) to `url`, and `run.json` last.

    Local files are moved, so `folder` is left empty where both are on one file system. A publication that was cut off
    is recognised by `claim_output` and made again.

    Args:
        record: run.json without `format`, `files` and, if left out, `date`.

    Returns:
        The whole of run.json.

    Raises:
        StorageDownError: the storage can't be reached now; the same command goes on from the last checkpoint.
        CheckpointError: it refuses.
    """
    try:
        with explained(url, CheckpointError, local=folder):
            return _publish(folder, open_target(url, endpoint_url), record)
    except RunError as error:
        raise type(error)(f"the final model was not written: {error}") from error.__cause__


def _publish(folder: Path, target: Target, record: Mapping[str, Any]) -> dict[str, Any]:
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    with ThreadPoolExecutor(HASHERS) as pool:
        sums = list(pool.map(file_sha256, paths))
    files = {
        path.name: {"sha256": digest, "size": path.stat().st_size} for path, digest in zip(paths, sums, strict=True)
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    run: dict[str, Any] = _plain({"format": FORMAT, "date": now, **record, "files": files})
    before = _read(target, UNFINISHED) or _read(target, RUN_FILE) or {}
    if before and before.get("fingerprint") != run["fingerprint"]:  # it came after this run had claimed the place
        _refuse_other(target.url, before, run["fingerprint"])
    target.write(UNFINISHED, _dump({"fingerprint": run["fingerprint"], "date": run["date"], "files": files}))
    target.remove(RUN_FILE)  # a damaged output of this run: nobody must read it while it is mended
    target.tidy()
    for stale in {*before.get("files", {})} - {*files}:  # a former try's, cut into other shards
        target.remove(stale)
    for path in paths:
        target.put(path)
    sizes = target.sizes()
    if damaged := _damaged(run, sizes):
        raise CheckpointError(
            f"{target.url}/{damaged}: {sizes.get(damaged)} bytes arrived, {files[damaged]['size']} sent"
        )
    target.write(RUN_FILE, _dump(run))
    target.remove(UNFINISHED)
    return run


def _refuse_other(url: str, owner: Mapping[str, Any], fingerprint: Any) -> None:
    theirs, ours = owner.get("fingerprint"), _plain(fingerprint)
    differing = ""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        differing = f", which differs in {', '.join(keys[:5])}" + (f" and {len(keys) - 5} more" if keys[5:] else "")
    raise CheckpointError(
        f"{url}: holds the output of another run of {owner.get('date')}{differing}; name another output.path"
    )


def _damaged(run: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
    """The first file of run.json that is not there as it says; run.json itself where it names none."""
    files = run.get("files") or {}
    return next((name for name, said in files.items() if sizes.get(name) != said["size"]), None if files else RUN_FILE)


def _read(target: Target, name: str) -> dict[str, Any] | None:
    content = target.read(name)
    if content is None:
        return None
    try:
        value = json.loads(content)
    except ValueError as error:
        raise CheckpointError(
            f"{target.url}/{name}: can't be read as JSON ({error}); empty the place or name another"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{target.url}/{name}: no JSON object; empty the place or name another output.path")
    return value


def _plain(value: Any) -> Any:
    """What JSON makes of a value: so is compared what was read with what was never written. NaN becomes null."""
    return json.loads(_dump(value), parse_constant=lambda _: None)


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode()
