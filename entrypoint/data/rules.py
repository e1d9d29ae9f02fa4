"""The rules for single rows and for groups, each written once, over whole arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from entrypoint.conf.data import Data
from entrypoint.data.chat import Texts
from entrypoint.data.columns import Columns, partition_of
from entrypoint.data.groups import Float64, Int64
from entrypoint.data.locations import TraceFile
from entrypoint.data.report import Reason
from entrypoint.data.scan import Batch
from entrypoint.errors import ConfigError, DataError

Reasons = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]
EPOCH = date(1970, 1, 1).toordinal()
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


@dataclass(frozen=True)
class Rules:
    """What decides about a row, from `data.*`. Days count from 1970-01-01 UTC."""

    reward: str
    threshold: float
    row_scope: bool
    first_day: int | None
    last_day: int | None
    models: tuple[str, ...]
    consent: bool
    form: str
    match: str
    columns: Columns = field(repr=False)

    @classmethod
    def of(cls, data: Data) -> Rules:
        first, last = _day("date_from", data.date_from), _day("date_to", data.date_to)
        if (data.logprobs_column is None) != (data.token_ids_column is None):
            raise ConfigError(
                f"data.logprobs_column is {data.logprobs_column!r} and data.token_ids_column {data.token_ids_column!r};"
                " expected both or neither: log-probs count only where their tokens are the same"
            )
        columns = Columns(
            reward=data.reward_column,
            consent=data.require_consent,
            date=first is not None or last is not None,
            model=bool(data.models),
            logps=data.logprobs_column,
            token_ids=data.token_ids_column,
        )
        return cls(
            reward=data.reward_column,
            threshold=data.min_reward_threshold,
            row_scope=data.threshold_scope == "row",
            first_day=first,
            last_day=last,
            models=tuple(data.models),
            consent=data.require_consent,
            form=data.format,
            match=data.match,
            columns=columns,
        )


@dataclass(frozen=True)
class Partitions:
    """What a file's folders say about all of its rows; `has_*` tells a null from nothing said.

    Raises, when made by `of`:
        DataError: a value that can't be read.
    """

    has_day: bool
    day: int | None
    has_model: bool
    model: str | None
    consent: bool | None  # None: nothing said

    @classmethod
    def of(cls, file: TraceFile) -> Partitions:
        has_day, day = partition_of(file, "timestamp")
        has_model, model = partition_of(file, "model")
        has_consent, consent = partition_of(file, "user_consent")
        return cls(
            has_day=has_day,
            day=None if day is None else _partition_day(file, day),
            has_model=has_model,
            model=model,
            consent=_partition_consent(file, consent) if has_consent else None,
        )

    def verdict(self, rules: Rules) -> Reason | None:
        """The reason that drops every row of the file, where the folders alone decide; None: read the file."""
        if rules.columns.date:
            if not self.has_day:
                return None
            if not _in_range(self.day, rules):
                return Reason.OTHER_DATE
        if rules.models:
            if not self.has_model:
                return None
            if self.model not in rules.models:
                return Reason.OTHER_MODEL
        return Reason.NO_CONSENT if rules.consent and self.consent is False else None


def row_reasons(batch: Batch, texts: Texts, partitions: Partitions, rules: Rules) -> Reasons:
    """Why each row can't be used, or USED. Shape: (batch.rows,)."""
    columns, rows = batch.columns, batch.rows
    result = np.zeros(rows, np.int8)
    days, models = columns.get("timestamp"), columns.get("model")
    if rules.columns.date:
        _mark(result, Reason.OTHER_DATE, ~_days_in_range(days, partitions, rules, rows))
    if rules.models:
        _mark(result, Reason.OTHER_MODEL, ~_models_in(models, partitions, rules, rows))
    if rules.consent:
        given = columns.get("user_consent")
        consent = np.full(rows, True) if given is None else _true(given)
        _mark(
            result,
            Reason.NO_CONSENT,
            ~consent | (partitions.consent is False) | (given is None and not partitions.consent),
        )
    if partitions.day is not None and days is not None:
        _mark(result, Reason.CONTRADICTION, _true(pc.not_equal(days, partitions.day)))
    if partitions.model is not None and models is not None:
        _mark(result, Reason.CONTRADICTION, _true(pc.not_equal(models, partitions.model)))
    rewards = rewards_of(batch, rules)
    _mark(result, Reason.EMPTY, texts.empty)
    _mark(result, Reason.REWARD, ~((rewards >= 0) & (rewards <= 1)))
    _mark(result, Reason.UNPARSABLE, texts.unparsable)
    if rules.row_scope:
        _mark(result, Reason.BELOW_THRESHOLD, ~(rewards > rules.threshold))
    return result


def rewards_of(batch: Batch, rules: Rules) -> Float64:
    """Rewards of a batch, NaN where null. Shape: (batch.rows,)."""
    values: Float64 = batch.columns[rules.reward].to_numpy(zero_copy_only=False)
    return values + 0.0  # −0.0 is 0


def models_of(batch: Batch, partitions: Partitions) -> pa.Array:
    """The sampling model of each row; null where neither file nor folder says it. Shape: (batch.rows,)."""
    models = batch.columns.get("model")
    if models is None:
        return pa.repeat(pa.scalar(partitions.model, pa.string()), batch.rows)
    return models if partitions.model is None else pc.fill_null(models, partitions.model)


def group_reasons(sizes: Int64, best: Float64, worst: Float64, rules: Rules) -> Reasons:
    """Why each group can't be used, or USED. Shape: sizes, best and worst reward (N,)."""
    result = np.zeros(len(sizes), np.int8)
    _mark(result, Reason.ONE_RESPONSE, sizes < 2)
    _mark(result, Reason.NO_SPREAD, best == worst)
    if not rules.row_scope:
        _mark(result, Reason.BELOW_THRESHOLD, ~(best > rules.threshold))
    return result


def _mark(result: Reasons, reason: Reason, where: Mask) -> None:
    result[where & (result == Reason.USED)] = reason


def _true(values: pa.Array) -> Mask:
    """Where a boolean array is true, neither false nor null."""
    found: Mask = values.fill_null(False).to_numpy(zero_copy_only=False)
    return found


def _days_in_range(days: pa.Array | None, partitions: Partitions, rules: Rules, rows: int) -> Mask:
    if partitions.has_day or days is None:
        return np.full(rows, _in_range(partitions.day, rules))
    inside: Mask = np.full(rows, True)
    if rules.first_day is not None:
        inside &= _true(pc.greater_equal(days, rules.first_day))
    if rules.last_day is not None:
        inside &= _true(pc.less_equal(days, rules.last_day))
    return inside


def _models_in(models: pa.Array | None, partitions: Partitions, rules: Rules, rows: int) -> Mask:
    if partitions.has_model or models is None:
        return np.full(rows, partitions.model in rules.models)
    return _true(pc.is_in(models, pa.array(rules.models, models.type)))


def _in_range(day: int | None, rules: Rules) -> bool:
    if day is None:
        return False
    return (rules.first_day is None or day >= rules.first_day) and (rules.last_day is None or day <= rules.last_day)


def _day(name: str, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return date.fromisoformat(str(value)).toordinal() - EPOCH
    except ValueError:
        raise ConfigError(f"data.{name}: got {value!r}; expected a day as YYYY-MM-DD") from None


def _partition_day(file: TraceFile, value: str) -> int:
    try:
        return date.fromisoformat(value).toordinal() - EPOCH
    except ValueError:
        raise DataError(_garbage(file, "date", value, "a day as YYYY-MM-DD")) from None


def _partition_consent(file: TraceFile, value: str | None) -> bool:
    if value is None or value.lower() in FALSE:
        return False
    if value.lower() in TRUE:
        return True
    raise DataError(_garbage(file, "consent", value, "true or false"))


def _garbage(file: TraceFile, key: str, value: Any, expected: str) -> str:
    return f"{file.path}: partition {key}={value}; expected {expected}; rename the folder or leave it out of data.path"
