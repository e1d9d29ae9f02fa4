"""What must hold between keys: checked before anything is downloaded, and without torch.

A refusal says which key, what is wrong with it and what to write; a warning is for what is allowed and seldom meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date
from urllib.parse import urlsplit

from entrypoint.conf import Data, Run, Train
from entrypoint.config.places import check_places, check_sources, sources_of
from entrypoint.errors import ConfigError
from entrypoint.storage import is_s3

DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
NOT_REWARDS = {"id", "timestamp", "user_id", "session_id", "input", "output", "model", "metadata", "user_consent"}
SMOOTHED = ("robust", "exo_pair")  # TRL's DPO losses, of ours, that read label_smoothing
UNCLIPPED = ("sapo", "vespo")  # TRL's GRPO losses that read no clip range


def check(run: Run, *, look: bool = True) -> list[str]:
    """Refuse a run whose keys contradict each other, or name places that can't be used; returns warnings.

    Args:
        run: composed and resolved (`entrypoint.config.resolve`).
        look: whether folders of this machine are looked at.

    Raises:
        ConfigError: the first contradiction, in one line.
    """
    warnings: list[str] = []
    _check_urls(run, warnings.append)
    check_places(run, look=look)
    check_data(run.data, run.method.name, warnings.append, look=look)
    {"grpo": _check_grpo, "dpo": _check_dpo}[run.method.name](run, warnings.append)
    _check_train(run.train, warnings.append)
    if run.checkpoint.resume == "never":
        warnings.append(
            "checkpoint.resume=never: each start begins at step 0; where a scheduler restarts the run, write auto"
        )
    if run.model.lora.enabled and not run.model.lora.merge and is_s3(run.model.path):
        warnings.append(
            "model.lora.merge=false: the adapter names its base as an s3:// path, which from_pretrained can't open"
        )
    save_every = run.checkpoint.save_every
    if run.train.max_steps is not None and isinstance(save_every, int) and save_every > run.train.max_steps:
        warnings.append(
            f"checkpoint.save_every={save_every} is more than train.max_steps={run.train.max_steps}: "
            "a run that is killed without a signal starts from the beginning"
        )
    return warnings


def _check_urls(run: Run, warn: Callable[[str], None]) -> None:
    _check_url("tracking.mlflow_uri", run.tracking.mlflow_uri, bare=False)
    addresses = [*sources_of(run.data), run.model.path, run.output.path, run.checkpoint.mirror or ""]
    if run.data.endpoint_url and not any(is_s3(address) for address in addresses):
        warn("data.endpoint_url is not used: no path is on s3://")
    if set("/:") & set(run.tracking.registered_model):
        raise ConfigError("tracking.registered_model: MLflow allows no / and no : in a registered model's name")


def _check_url(name: str, url: str | None, *, bare: bool) -> None:
    """Refuse what is no http(s) address; its text is not repeated where a password may be in it."""
    if url is None:
        return
    if "@" in url:
        raise ConfigError(f"{name}: holds credentials; remove them: they come from the environment")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"{name}: expected http(s)://host[:port], got {url!r}") from None
    if parts.scheme not in ("http", "https") or not host or " " in url:
        raise ConfigError(f"{name}: expected http(s)://host[:port], got {url!r}")
    if parts.query or parts.fragment or (bare and parts.path.strip("/")):
        raise ConfigError(f"{name}: expected http(s)://host[:port] and nothing behind it, got {url!r}")


def check_data(data: Data, method: str, warn: Callable[[str], None], *, look: bool = True) -> None:
    """Refuse a `data` group that names no traces, contradicts itself or leaves `method` nothing to learn from.

    Raises:
        ConfigError: the first contradiction, in one line.
    """
    check_sources(data, look=look)
    _check_url("data.endpoint_url", data.endpoint_url, bare=True)
    _check_dates(data)
    _check_columns(data, method, warn)
    _check_thresholds(data, method, warn)
    if data.models and data.behaviour_model and data.behaviour_model not in data.models:
        raise ConfigError(
            f"data.behaviour_model: {data.behaviour_model!r} is not among data.models={data.models}, "
            "so none of its rows would be left"
        )
    if not data.require_consent:
        warn("data.require_consent=false: rows of users who did not consent are trained on")
    if data.held_out_share == 0:
        warn("data.held_out_share=0: nothing is held out, so there are no figures before and after the run")
    elif data.held_out_share > 0.5:
        warn(f"data.held_out_share={data.held_out_share}: more prompts are held out than trained on")


def _check_dates(data: Data) -> None:
    for name, day in (("data.date_from", data.date_from), ("data.date_to", data.date_to)):
        try:
            ok = day is None or (DAY.fullmatch(day) is not None and date.fromisoformat(day) is not None)
        except ValueError:
            ok = False
        if not ok:
            raise ConfigError(f"{name}: expected a day, YYYY-MM-DD, got {day!r}")
    if data.date_from and data.date_to and data.date_from > data.date_to:
        raise ConfigError(
            f"data.date_from: {data.date_from} is after data.date_to={data.date_to}; no row would be left"
        )


def _check_columns(data: Data, method: str, warn: Callable[[str], None]) -> None:
    if data.reward_column in NOT_REWARDS:
        raise ConfigError(f"data.reward_column: {data.reward_column!r} holds no reward; the usual one is final_reward")
    pair = {"data.logprobs_column": data.logprobs_column, "data.token_ids_column": data.token_ids_column}
    given = [name for name, column in pair.items() if column]
    if len(given) == 1:
        lacking = next(name for name in pair if name not in given)
        raise ConfigError(
            f"{lacking}: is required with {given[0]}: log-probs count only where their tokens are the same"
        )
    if given and data.logprobs_column == data.token_ids_column:
        raise ConfigError(
            f"data.token_ids_column: is the same column as data.logprobs_column, {data.logprobs_column!r}"
        )
    if given and method == "dpo":
        warn("data.logprobs_column and data.token_ids_column are not used: DPO has no behaviour policy")


def _check_thresholds(data: Data, method: str, warn: Callable[[str], None]) -> None:
    low, rejected, chosen = data.min_reward_threshold, data.rejected_threshold, data.chosen_threshold
    if rejected > chosen:
        raise ConfigError(
            f"data.rejected_threshold: {rejected} is above data.chosen_threshold={chosen}; one response would be both"
        )
    if low >= 1.0:
        raise ConfigError("data.min_reward_threshold: no reward is above 1.0; no group would be left")
    no_rejected = rejected == 0.0 or (data.threshold_scope == "row" and low >= rejected)
    if no_rejected:
        why = (
            "no reward is below 0"
            if rejected == 0.0
            else f"threshold_scope=row drops each row that is not above min_reward_threshold={low}"
        )
        if method == "dpo":
            raise ConfigError(f"data.rejected_threshold: {rejected} leaves no rejected response: {why}")
        warn(f"data.rejected_threshold={rejected} leaves no held-out pair to evaluate on: {why}")
    if data.threshold_scope == "row":
        warn("data.threshold_scope=row takes the contrast out of the groups: their low rewards are dropped")
    if low >= chosen:
        warn(f"data.min_reward_threshold={low} is not below data.chosen_threshold={chosen}: it decides what is chosen")


def _check_grpo(run: Run, warn: Callable[[str], None]) -> None:
    method = run.method
    if method.loss_type == "cispo":
        if method.clip_range < 1:
            warn(
                f"method.clip_range={method.clip_range} is the ratio's upper limit with loss_type=cispo: "
                "below 1 every token is at it from the start"
            )
    elif method.clip_range >= 1:
        raise ConfigError(f"method.clip_range: expected a number > 0 and < 1, got {method.clip_range}")
    if method.loss_type in UNCLIPPED and method.clip_range != type(method)().clip_range:
        warn(f"method.clip_range={method.clip_range} is not used by loss_type={method.loss_type}")
    if method.kl_coeff == 0:
        warn("method.kl_coeff=0: nothing but the clip holds the policy near the base model")


def _check_dpo(run: Run, warn: Callable[[str], None]) -> None:
    loss, smoothing = run.method.loss_type, run.method.label_smoothing
    if loss == "exo_pair" and smoothing == 0:
        raise ConfigError("method.label_smoothing: loss_type=exo_pair needs more than 0, such as 0.1")
    if smoothing > 0 and loss not in SMOOTHED:
        raise ConfigError(
            f"method.label_smoothing: loss_type={loss} does not use it; write 0, or loss_type={' or '.join(SMOOTHED)}"
        )
    if loss == "robust" and smoothing == 0:
        warn("method.loss_type=robust with method.label_smoothing=0 is the sigmoid loss")


def _check_train(train: Train, warn: Callable[[str], None]) -> None:
    if train.warmup_ratio > 0 and train.lr_scheduler == "constant":
        raise ConfigError("train.warmup_ratio: lr_scheduler=constant has no warm-up; write constant_with_warmup")
    if train.warmup_ratio == 0 and train.lr_scheduler == "constant_with_warmup":
        warn("train.lr_scheduler=constant_with_warmup with train.warmup_ratio=0 has no warm-up")
    if train.max_steps is not None and train.num_epochs != type(train)().num_epochs:
        warn(
            f"train.num_epochs={train.num_epochs} is not used: train.max_steps={train.max_steps} wins; write "
            "train.max_steps=null for epochs"
        )
    if train.max_steps is not None and train.logging_steps > train.max_steps:
        warn(
            f"train.logging_steps={train.logging_steps} is more than train.max_steps={train.max_steps}: the "
            "last step alone is logged"
        )
    if train.learning_rate >= 1e-3:
        warn(f"train.learning_rate={train.learning_rate} is far above what preference tuning bears (1e-7 to 1e-4)")
    if isinstance(train.micro_batch_tokens, int) and train.micro_batch_tokens < train.max_length:
        warn(
            f"train.micro_batch_tokens={train.micro_batch_tokens} is less than train.max_length={train.max_length}: "
            "the longest rows need more memory than the budget says"
        )
