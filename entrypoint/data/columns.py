"""The columns that are read, the types they may have, and one normalised form for each.

input, output   text                                        -> string (or large string)
reward          any number                                  -> float64
user_consent    boolean                                     -> boolean
model           text                                        -> string
timestamp       any timestamp (UTC if it names no zone) or date -> day since 1970-01-01 UTC
log-probs       list of numbers                             -> list of float32
token ids       list of integers                            -> list of int64
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from entrypoint.data.locations import TraceFile
from entrypoint.errors import DataError

PARTITION_KEYS = {"timestamp": ("date",), "model": ("model",), "user_consent": ("consent", "user_consent")}
SECONDS_A_DAY = 86_400
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True)
class Columns:
    """Which columns a run needs. `consent`, `date` and `model` say whether rows are chosen by them.

    `optional` ones are read from the files that have them.
    """

    reward: str
    consent: bool
    date: bool
    model: bool
    logps: str | None = None
    token_ids: str | None = None
    optional: tuple[tuple[str, Kind], ...] = ()

    def required(self) -> list[tuple[str, Kind]]:
        """Columns that every file has, unless a partition stands for one."""
        wanted: list[tuple[str, Kind]] = [("input", TEXT), ("output", TEXT), (self.reward, NUMBER)]
        wanted += [("user_consent", BOOLEAN)] if self.consent else []
        wanted += [("timestamp", TIME)] if self.date else []
        wanted += [("model", TEXT)] if self.model else []
        wanted += [(self.logps, NUMBERS)] if self.logps else []
        wanted += [(self.token_ids, INTEGERS)] if self.token_ids else []
        return wanted


@dataclass(frozen=True)
class Kind:
    """What a column may hold: words for a message, a test of the Arrow type, and the normal form."""

    words: str
    fits: Callable[[pa.DataType], bool]
    normal: Callable[[pa.Array], Any]


def partition_of(file: TraceFile, column: str) -> tuple[bool, str | None]:
    """Whether a partition key of `file` stands for `column`, and its value."""
    for key in PARTITION_KEYS.get(column, ()):
        if key in file.partitions:
            return True, file.partitions[key]
    return False, None


def check(file: TraceFile, schema: pa.Schema, columns: Columns) -> dict[str, Kind]:
    """The columns of `file` to read.

    Raises:
        DataError: a needed column is missing, there twice, or of a type that can't mean what it should.
    """
    found: dict[str, Kind] = {}
    wanted = columns.required()
    names = {name for name, _ in wanted}
    # What nobody filters by is still looked at where the file has it: models are counted, partitions compared.
    optional = [*columns.optional, ("model", TEXT)]
    optional += [("timestamp", TIME)] if partition_of(file, "timestamp")[0] else []
    for name, kind in wanted + [(name, kind) for name, kind in optional if name not in names]:
        times = schema.names.count(name)
        if times > 1:
            raise DataError(f"{file.path}: column {name!r} is there {times} times; expected once; rename the others")
        if times:
            _check_type(file, name, schema.field(name).type, kind)
            found[name] = kind
        elif name in names and not partition_of(file, name)[0]:
            raise DataError(_missing(file, name, kind, schema.names))
    return found


def normalise(
    file: TraceFile, batch: pa.RecordBatch, kinds: dict[str, Kind], first_row: int, *, checked: bool = True
) -> dict[str, Any]:
    """The columns of `batch` by name, each in its normal form.

    Args:
        first_row: for messages.
        checked: whether text must be UTF-8 (Parquet's readers don't look).

    Raises:
        DataError: a value can't be read as what the column holds.
    """
    found = {}
    for name, kind in kinds.items():
        column = batch.column(name)
        if isinstance(column, pa.ExtensionArray):  # Parquet's logical type JSON comes as one
            column = column.storage
        try:
            if checked and kind is TEXT:
                column.validate(full=True)
            found[name] = kind.normal(column)
        except (pa.ArrowInvalid, OverflowError) as error:
            rows = f"rows {first_row}..{first_row + len(column) - 1}"
            raise DataError(
                f"{file.path} {rows}: column {name!r} can't be read as {kind.words} ({' '.join(str(error).split())});"
                " mend or leave out these rows"
            ) from error
    return found


def _check_type(file: TraceFile, name: str, kind: pa.DataType, expected: Kind) -> None:
    plain = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_null(plain) or expected.fits(plain):
        return
    raise DataError(f"{file.path}: column {name!r} has type {kind}; expected {expected.words}; cast it when writing")


def _missing(file: TraceFile, name: str, kind: Kind, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    keys = PARTITION_KEYS.get(name, ())
    or_key = f", or a partition {keys[0]}=…" if keys else ""
    have = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    hint = f" (nearest: {near[0]!r})" if near else ""
    return f"{file.path}: no column {name!r}{hint}; expected {kind.words}{or_key}; the file has: {have or 'no columns'}"


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _text(column: pa.Array) -> pa.Array:
    if pa.types.is_large_string(column.type) or pa.types.is_string(column.type):
        return column
    return column.cast(pa.large_string())


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _number(column: pa.Array) -> pa.Array:
    """As float64. 0.7 stored in fewer bits is a little less than 0.7: the digits that the type can hold are meant."""
    if pa.types.is_float32(column.type):
        return pc.round(column.cast(pa.float64()), 7)
    if pa.types.is_float16(column.type):
        return pc.round(column.cast(pa.float64()), 3)
    floats = column.cast(pa.float64(), safe=False)
    if pa.types.is_decimal(column.type):  # Arrow's division is off by one bit at times
        return pc.round(floats, min(column.type.scale, 15))
    return floats


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _days(column: pa.Array) -> pa.Array:
    """Days since 1970-01-01 UTC, by integer division alone: no timestamp, however wild, overflows."""
    if pa.types.is_null(column.type):
        return column.cast(pa.int64())
    if pa.types.is_date32(column.type):
        return column.view(pa.int32()).cast(pa.int64())
    a_day = SECONDS_A_DAY * (1000 if pa.types.is_date64(column.type) else UNITS[column.type.unit])
    whole = column.view(pa.int64())
    days = np.floor_divide(whole.fill_null(0).to_numpy(zero_copy_only=False), a_day)
    return pa.array(days, mask=whole.is_null().to_numpy(zero_copy_only=False))


def _is_list_of(fits: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    def check_list(kind: pa.DataType) -> bool:
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return bool(lists and (fits(kind.value_type) or pa.types.is_null(kind.value_type)))

    return check_list


def _cast(kind: pa.DataType) -> Callable[[pa.Array], pa.Array]:
    return lambda column: column.cast(kind, safe=False)


TEXT = Kind("text (a string column)", _is_text, _text)
NUMBER = Kind("a number in 0..1", _is_number, _number)
BOOLEAN = Kind("a boolean", lambda kind: bool(pa.types.is_boolean(kind)), _cast(pa.bool_()))
TIME = Kind("a timestamp or a date", _is_time, _days)
NUMBERS = Kind("a list of numbers", _is_list_of(_is_number), _cast(pa.list_(pa.float32())))
INTEGERS = Kind(
    "a list of integers", _is_list_of(lambda kind: bool(pa.types.is_integer(kind))), _cast(pa.list_(pa.int64()))
)
