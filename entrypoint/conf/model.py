"""`model`: the base model and, where wanted, the adapter that is trained instead of it."""

from __future__ import annotations

from dataclasses import dataclass

from entrypoint.conf.key import REQUIRED, key


@dataclass
class Lora:
    enabled: bool = key(False, "Train a LoRA adapter (peft) on all linear layers instead of the whole model.")
    rank: int = key(16, "Rank of the adapter's matrices.", minimum=1)
    alpha: int = key(32, "Scale of the adapter: alpha / rank.", minimum=1)
    merge: bool = key(False, "Whether the final model is the merged one; otherwise the adapter alone is saved.")


@dataclass
class Model:
    path: str = key(REQUIRED, "Base model in Hugging Face's layout: a folder, or s3:// (fetched once a node).")
    cache_path: str | None = key(
        None, "Folder on each node for a model fetched from S3; default: <system's temporary folder>/models."
    )
    lora: Lora = key(Lora, "Low-rank adaptation (arXiv 2106.09685).")
