"""Load: the base model's files, the prepared traces and what is there of this run already, on every rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from entrypoint import host
from entrypoint.checkpoint import Checkpoints
from entrypoint.checkpoint.lock import Lock
from entrypoint.checkpoint.mirror import Mirror
from entrypoint.checkpoint.probe import check_shared
from entrypoint.conf import Run
from entrypoint.config import fingerprint_keys
from entrypoint.data.locations import TraceFile, find_files
from entrypoint.data.prepare import Prepared, load_prepared, prepare, prepared_key
from entrypoint.data.tokens import load_tokenizer
from entrypoint.errors import CheckpointError, ModelError
from entrypoint.model.fetch import fetch_model, model_identity
from entrypoint.model.folder import check_model, parameters
from entrypoint.output.publish import claim_output
from entrypoint.storage import explained
from entrypoint.tracking.tracker import finish_again
from entrypoint.world import World

FP32 = 4  # bytes
GIB = 2**30


@dataclass(frozen=True)
class Loaded:
    """What a run starts from."""

    model_folder: Path
    model_identity: str
    tokenizer: PreTrainedTokenizerBase
    traces: Prepared
    fingerprint: dict[str, Any]
    checkpoints: Checkpoints
    resume_from: Path | None
    cache: Path

    def reference_folder(self, dtype: str) -> Path:
        """Where this model's log-probs of these traces are kept, computed in `dtype`."""
        return self.cache / f"reference-{self.model_identity[:16]}-{dtype}"

    @property
    def resume_step(self) -> int:
        """Steps that are done already."""
        return int(self.resume_from.name.removeprefix("step-")) if self.resume_from else 0


def load(run: Run, world: World) -> Loaded | None:
    """Everything but the model's weights; None where this run's output is complete already.

    Rank 0 reads the traces, once, into a folder that all ranks see; a restart finds them there.

    Raises:
        RunError: something of it can't be used; see `World.once` for the other ranks.
    """
    folder, tokenizer, max_length = world.each(lambda: load_base(run))
    if max_length < run.train.max_length:
        world.warn(f"train.max_length={run.train.max_length}, but the model has {max_length} positions")
    cache, checkpoint_folder = Path(str(run.data.cache_path)), Path(str(run.checkpoint.path))
    files: list[TraceFile] = []
    lock = Lock(checkpoint_folder, patience=run.checkpoint.grace_seconds, warn=world.warn)

    def claim() -> dict[str, Any]:
        """Rank 0 finds out what this run is, and takes the places it writes to."""
        files.extend(find_files(run.data.path, run.data.endpoint_url))
        key = prepared_key(files, run.data, max_length, tokenizer)
        identity = model_identity(folder)
        fingerprint = {**fingerprint_keys(run), "traces": key, "model": identity}
        if record := claim_output(run.output.path, fingerprint, endpoint_url=run.data.endpoint_url):
            finish_again(run, record)
            return {"done": True}
        with explained(str(checkpoint_folder), CheckpointError):
            checkpoint_folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        return {"key": key, "identity": identity, "fingerprint": fingerprint}

    said = world.once(claim)
    if said.get("done"):
        return None
    check_shared(checkpoint_folder, world)
    checkpoints = Checkpoints(
        checkpoint_folder,
        keep=run.checkpoint.keep,
        fingerprint=said["fingerprint"],
        world=world,
        mirror=_mirror(run, world),
        check=lock.check,
    )

    def once() -> str | None:
        """What rank 0 does for all."""
        with explained(str(checkpoint_folder), CheckpointError):
            found = checkpoints.find(run.checkpoint.resume)
        prepare(run.data, max_length, tokenizer, cache, files=files)
        return str(found) if found else None

    resume_from = world.once(once)
    return Loaded(
        model_folder=folder,
        model_identity=said["identity"],
        tokenizer=tokenizer,
        traces=load_prepared(cache, said["key"]),
        fingerprint=said["fingerprint"],
        checkpoints=checkpoints,
        resume_from=Path(resume_from) if resume_from else None,
        cache=cache / said["key"],
    )


def _mirror(run: Run, world: World) -> Mirror | None:
    """Where rank 0 copies checkpoints to."""
    if run.checkpoint.mirror is None or not world.is_main:
        return None
    return Mirror(run.checkpoint.mirror, run.data.endpoint_url, keep=run.checkpoint.keep, warn=world.warn)


def load_base(run: Run) -> tuple[Path, PreTrainedTokenizerBase, int]:
    """The base model's folder on this node, its tokenizer, and the tokens of the longest row that counts."""
    folder = fetch_model(run.model.path, run.data.endpoint_url, run.model.cache_path, os.environ)
    check_memory(folder)
    tokenizer = load_tokenizer(folder)
    return folder, tokenizer, context_of(folder, tokenizer, run.train.max_length)


def check_memory(folder: Path) -> None:
    """Whether the ranks of this node can hold the model, each in fp32 and whole, before any of it goes to a device.

    Raises:
        ModelError: they can't: the kernel would kill them, at every start.
    """
    count, ranks = parameters(check_model(folder)), host.ranks_here()
    need, there = FP32 * count * ranks, host.total()
    if need > there:
        raise ModelError(
            f"{folder}: {count:,} parameters, loaded in fp32 by each of this node's {ranks} ranks, are "
            f"{need / GIB:,.4g} GiB, expected at most the {there / GIB:,.4g} GiB that the node or the pod has; give "
            "the pod more memory (the chart's resources.memoryGiB) or the node fewer ranks; an adapter does not help"
        )


def context_of(folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """Tokens of the longest row that counts: train.max_length, but never more than the model has positions for.

    Raises:
        ModelError: the tokenizer has ids that the model doesn't embed.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer):,} ids, the model embeds {config.vocab_size:,}; "
            "expected a tokenizer that belongs to the model"
        )
    return min(max_length, getattr(config, "max_position_embeddings", None) or max_length)


def load_model(folder: Path) -> PreTrainedModel:
    """The base model in fp32: at a learning rate of 5e-7 a bf16 weight would not move.

    Raises:
        ModelError: it can't be read, or not without code that comes with it.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(f"{folder}: the model can't be read: {_first_line(error)}") from error
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
