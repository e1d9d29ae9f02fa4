"""Reads trace files as record batches in one normal form, whatever types the files use; nothing is dropped here.

All files' rows are numbered through, in the order of the files. A wrong type, a missing column and a torn file are
named, also when the damage shows only in the middle of a column.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entrypoint.data.columns import Columns, check, normalise
from entrypoint.data.locations import Opener, TraceFile
from entrypoint.errors import DataError
from entrypoint.storage import explained, is_s3

BATCH_ROWS = 8192  # some 16 MB of usual traces: what was just decoded is still in the processor's cache
BATCH_BYTES = 64 << 20  # of a batch's columns; rows that are longer than usual come in smaller batches
PREFETCH_BYTES = 256 << 20  # a row group's columns are fetched whole, in few requests, up to this compressed size
STREAM_BYTES = 8 << 20  # a larger one is read column by column in pieces of this size
SMALL_BYTES = 16 << 20  # an S3 object up to this size is fetched in one request
AHEAD = 8  # S3 objects on their way at a time

Opening = Callable[[], tuple[Any, pq.FileMetaData]]


@dataclass(frozen=True)
class Batch:
    """Rows `start`.. of all files. `columns` has the normal form of every column that the file has, by name."""

    file: TraceFile
    start: int
    rows: int
    columns: dict[str, Any]


@dataclass(frozen=True)
class Unread:
    """A file whose rows need no reading."""

    file: TraceFile
    start: int
    rows: int


class Scan:
    """The rows of all files, in order. After a pass, `source` says where a row is, `rows` how many there are.

    Args:
        most: about how many rows of each file are read, for a sample; None: all.
    """

    def __init__(
        self, files: Sequence[TraceFile], columns: Columns, opener: Opener, *, most: int | None = None
    ) -> None:
        self.files = files
        self.columns = columns
        self.starts: list[int] = []
        self.rows = 0
        self._most = most
        self._seen = [0, 0]  # rows that were read, and bytes of their columns
        self._open = opener

    def batches(self, unread: frozenset[str] = frozenset(), *, checked: bool = True) -> Iterator[Batch | Unread]:
        """Every row once, in order.

        Args:
            unread: paths of files of which only the number of rows is looked up.
            checked: whether text must be UTF-8; a look at every byte, so a pass that decodes little may leave it out.

        Raises:
            DataError: a file is torn, lacks a column, has one of a wrong type, or can't be read.
        """
        start, starts = 0, []
        for file, opening in self._ahead(unread):
            starts.append(start)
            with explained(file.path, DataError), _named(file):
                opened, metadata = opening()
                with opened:
                    if file.path in unread:
                        yield Unread(file, start, metadata.num_rows)
                    else:
                        yield from self._read(file, opened, metadata, start, checked=checked)
            start += metadata.num_rows
        if self.starts not in ([], starts):
            raise DataError(
                f"{self.files[0].path} and others: changed while they were read; start again when they rest"
            )
        self.starts, self.rows = starts, start

    @property
    def batch_rows(self) -> int:
        """How many of the rows that were read fit into a batch of usual size."""
        return _batch_rows(*self._seen)

    def source(self, row: int) -> str:
        """`s3://bucket/key.parquet row 41` for the number of a row; a file's first row is row 0."""
        number = bisect.bisect_right(self.starts, row) - 1
        return f"{self.files[number].path} row {row - self.starts[number]}"

    def _ahead(self, unread: frozenset[str]) -> Iterator[tuple[TraceFile, Opening]]:
        """Each file in turn; what lies on S3 is already on its way, since every request there waits for the network."""
        with ThreadPoolExecutor(AHEAD) as pool:
            coming: deque[tuple[TraceFile, Opening]] = deque()
            try:
                for file in self.files:
                    opening = partial(self._open_file, file, whole=file.path not in unread)
                    coming.append((file, pool.submit(opening).result if is_s3(file.path) else opening))
                    if len(coming) > AHEAD:
                        yield coming.popleft()
                yield from coming
            finally:
                pool.shutdown(cancel_futures=True)

    def _open_file(self, file: TraceFile, *, whole: bool) -> tuple[Any, pq.FileMetaData]:
        opened = self._open(file, whole=whole and file.size <= SMALL_BYTES)
        return opened, pq.read_metadata(opened)

    def _read(
        self, file: TraceFile, opened: Any, metadata: pq.FileMetaData, start: int, *, checked: bool
    ) -> Iterator[Batch]:
        kinds = check(file, metadata.schema.to_arrow_schema(), self.columns)
        row = start
        for group in range(metadata.num_row_groups):
            packed, unpacked, rows = _sizes(metadata.row_group(group), kinds)
            batch_rows = _batch_rows(rows, unpacked)
            self._seen = [self._seen[0] + rows, self._seen[1] + unpacked]
            whole = packed <= PREFETCH_BYTES and self._most is None
            # A reader for each row group: what a reader has pre-buffered stays in memory until it goes.
            reader = pq.ParquetFile(
                opened,
                metadata=metadata,
                pre_buffer=whole,
                buffer_size=0 if whole else STREAM_BYTES,
                page_checksum_verification=True,
            )
            for batch in reader.iter_batches(batch_rows, row_groups=[group], columns=list(kinds)):
                columns = normalise(file, batch, kinds, row - start, checked=checked)
                yield Batch(file, row, batch.num_rows, columns)
                row += batch.num_rows
                if self._most is not None and row - start >= self._most:
                    return
        if row - start != metadata.num_rows:
            raise pa.ArrowInvalid(f"{row - start} rows where the footer says {metadata.num_rows}")


def _batch_rows(rows: int, size: int) -> int:
    return max(64, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))


def _sizes(group: pq.RowGroupMetaData, names: Any) -> tuple[int, int, int]:
    """Compressed and plain bytes of the columns `names`, and rows, of a row group."""
    columns = [group.column(i) for i in range(group.num_columns)]
    wanted = [column for column in columns if column.path_in_schema.split(".")[0] in names]
    packed = sum(column.total_compressed_size for column in wanted)
    return packed, sum(column.total_uncompressed_size for column in wanted), group.num_rows


@contextmanager
def _named(file: TraceFile) -> Iterator[None]:
    """Name a damaged file. Arrow has no type for damage: it raises an ArrowException, or a bare OSError."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        of_storage = type(error) is not OSError or error.errno is not None or error.__cause__ is not None
        if isinstance(error, OSError) and of_storage:
            raise
        message = " ".join(str(error).split())[:300]
        raise DataError(
            f"{file.path}: torn or not Parquet ({message}); expected a whole file; write it anew or leave it out"
        ) from error
