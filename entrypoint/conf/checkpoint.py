"""`checkpoint`: what is kept of a run that is not done."""

from __future__ import annotations

from dataclasses import dataclass

from entrypoint.conf.key import key


@dataclass
class Checkpoint:
    path: str | None = key(
        None, "Folder that all ranks see; default: <output.path>/checkpoints, needed where output.path is on S3."
    )
    save_every: int = key(100, "Steps between two checkpoints.", minimum=1)
    keep: int = key(2, "How many of the newest complete checkpoints are kept.", minimum=1)
    resume: str = key(
        "auto",
        "auto: from the newest complete checkpoint of this run, if there is one; never: from the start; must: refuse "
        "where there is none.",
        choices=("auto", "never", "must"),
    )
