"""Save: the final model and `run.json` at `output.path`, for the eval gate."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from entrypoint import __version__
from entrypoint.errors import CheckpointError
from entrypoint.model.fetch import base_dtype
from entrypoint.output.publish import publish, save_model
from entrypoint.session import Session
from entrypoint.storage import explained

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def save(session: Session) -> None:
    """Write the final model under a staging name, then publish it with its record, `run.json` last.

    Raises:
        RunError: it can't be written to `output.path`; on every rank.
    """
    state = full_state(session)
    session.world.once(lambda: _publish(session, state))
    session.world.say(f"done: {session.run.output.path} holds the model and run.json")


def _publish(session: Session, state: dict[str, Any] | None) -> None:
    run = session.run
    staging = session.loaded.checkpoints.folder / "final.partial"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed here
    name = base_dtype(session.loaded.model_folder) if run.output.dtype == "auto" else run.output.dtype
    with explained(str(staging), CheckpointError):
        save_model(
            session.trainer.accelerator.unwrap_model(session.trainer.model),
            session.loaded.tokenizer,
            staging,
            dtype=getattr(torch, name),
            state_dict=state,
            merge=run.model.lora.merge,
            base=run.model.path,
        )
    record = publish(staging, run.output.path, run.data.endpoint_url, describe(session))
    shutil.rmtree(staging, ignore_errors=True)
    if session.tracker:
        session.tracker.finish(record)


def full_state(session: Session) -> dict[str, Any] | None:
    """All weights on rank 0's CPU where they are sharded over the ranks; None: the model itself has them."""
    if not session.trainer.is_fsdp_enabled:
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(session.trainer.model_wrapped, options=options))


def describe(session: Session) -> dict[str, Any]:
    """What `run.json` says of the run, beside the files' checksums."""
    run, state = session.run, session.trainer.state
    sampler = session.plan.sampler
    return {
        "method": run.method.name,
        "base_model": run.model.path,
        "base_model_identity": session.loaded.model_identity,
        "iteration": run.output.iteration,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": session.loaded.fingerprint,
        "counts": session.loaded.traces.counts.to_dict(),
        "metrics": {"before": session.before, "after": session.after},
        "training": {
            "steps": state.global_step,
            "epochs": session.plan.epochs,
            "seconds": session.seconds,
            "units": len(sampler.units),
            "unit": "group" if run.method.name == "grpo" else "pair",
            "held_out_pairs": len(session.held),
            "world_size": session.world.size,
        },
        "story": session.story.summary() if session.story else {},
        "versions": {
            "entrypoint": __version__,
            "python": platform.python_version(),
            **{library: version(library) for library in LIBRARIES},
        },
        "configuration": asdict(run),
    }
