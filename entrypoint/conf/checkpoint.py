"""`checkpoint`: what is kept of a run that is not done."""

from __future__ import annotations

from dataclasses import dataclass

from entrypoint.conf.key import Form, key

MINUTES = Form("[1-9][0-9]{0,4}m", "minutes, such as 10m")


@dataclass
class Checkpoint:
    path: str | None = key(
        None, "Folder that all ranks see; default: <output.path>/checkpoints, needed where output.path is on S3."
    )
    save_every: int | str = key(
        100,
        "Steps, or minutes (10m), between two checkpoints: what a crash costs at most.",
        minimum=1,
        form=MINUTES,
    )
    keep: int = key(
        2,
        "How many of the newest complete checkpoints are kept, beside the one with the best held-out accuracy. The "
        "disk must have room for one more.",
        minimum=1,
    )
    resume: str = key(
        "auto",
        "auto: from the newest complete checkpoint of this run, if there is one; never: from the start; must: refuse "
        "where there is none.",
        choices=("auto", "never", "must"),
    )
    mirror: str | None = key(
        None,
        "s3:// prefix of this run's own; complete checkpoints are copied there in the background, and taken from there "
        "where checkpoint.path holds none as new.",
    )
    grace_seconds: int = key(
        120,
        "Seconds between the signal to stop and the end of the process: what a save, and its copy, must fit in.",
        minimum=1,
    )
    hold_seconds: int = key(
        60,
        "Seconds over which nodes that were not told to stop leave one after another, unless they are told meanwhile: "
        "all pods that end in one instant can make the scheduler give the run up.",
        minimum=0,
    )
    max_crashes: int = key(
        3, "Crashes in a row, without a newer checkpoint between them, after which a restart ends with 64.", minimum=1
    )

    @property
    def save_seconds(self) -> float | None:
        """`save_every` where it is a time."""
        return None if isinstance(self.save_every, int) else 60.0 * int(self.save_every.removesuffix("m"))
