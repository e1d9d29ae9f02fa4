"""`output`: the hand-off to the eval gate."""

from __future__ import annotations

from dataclasses import dataclass

from entrypoint.conf.key import REQUIRED, key


@dataclass
class Output:
    path: str = key(REQUIRED, "Where the final model and run.json go: a folder, or s3://.")
    dtype: str = key(
        "auto",
        "dtype of the final model's weights; auto: the base model's.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    iteration: int = key(0, "Number of the pipeline's iteration, written to run.json and the model's tags.", minimum=0)
