"""`data`: where the labelled traces are and which of their rows count."""

from __future__ import annotations

from dataclasses import dataclass

from entrypoint.conf.key import REQUIRED, key


@dataclass
class Data:
    path: str | list[str] = key(
        REQUIRED,
        "Parquet traces: a file, a folder, a glob or a list of these, local or s3://; Hive partitions are read.",
    )
    endpoint_url: str | None = key(
        None, "S3 endpoint, where it is not AWS's own; credentials come from the usual AWS chain, never from here."
    )
    reward_column: str = key("final_reward", "Column that holds the reward, in 0..1.")
    min_reward_threshold: float = key(
        0.5,
        "A group whose best response is not above this reward is left out (see threshold_scope).",
        minimum=0.0,
        maximum=1.0,
    )
    threshold_scope: str = key(
        "group",
        "What min_reward_threshold is applied to: `group` keeps the contrast inside a group, `row` drops each row.",
        choices=("group", "row"),
    )
    chosen_threshold: float = key(
        0.7, "DPO and held-out pairs: a chosen response has at least this reward.", minimum=0.0, maximum=1.0
    )
    rejected_threshold: float = key(
        0.5, "DPO and held-out pairs: a rejected response has less than this reward.", minimum=0.0, maximum=1.0
    )
    match: str = key(
        "exact",
        "When two rows have the same prompt: `exact`, or `normalized` (Unicode NFC, white space, case).",
        choices=("exact", "normalized"),
    )
    format: str = key(
        "auto",
        "What input and output hold: `text`, `chat` (a JSON list of {role, content}), or `auto`: chat where it parses.",
        choices=("auto", "text", "chat"),
    )
    date_from: str | None = key(None, "First day that counts, YYYY-MM-DD (UTC), inclusive.")
    date_to: str | None = key(None, "Last day that counts, YYYY-MM-DD (UTC), inclusive.")
    models: list[str] = key([], "Sampling models whose rows count; empty: all.")
    require_consent: bool = key(True, "Whether only rows whose user consented count.")
    behaviour_model: str | None = key(
        None, "Name, in the column `model`, of the model that sampled the traces; rows of another are warned about."
    )
    logprobs_column: str | None = key(
        None,
        "GRPO: column of per-token log-probs recorded at sampling; the behaviour policy where token_ids_column agrees.",
    )
    token_ids_column: str | None = key(None, "GRPO: column of the token ids that logprobs_column belongs to.")
    held_out_share: float = key(
        0.1, "Share of the prompts that is kept for evaluation, by hash of the prompt.", minimum=0.0, below=1.0
    )
    cache_path: str | None = key(
        None, "Folder for prepared traces, seen by all ranks, shared by runs; default: <checkpoint.path>/prepared."
    )
