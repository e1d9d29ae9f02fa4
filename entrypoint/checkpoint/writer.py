"""Writing a staged state with torch's distributed checkpoint: summed up as it is written, sealed, renamed.

Everything goes into `step-N.partial`, each file fsynced; then comes the manifest, then the folder's new name. All ranks
write together, in a thread each, and speak through a process group of their own: the training's collectives go on.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta

from entrypoint.checkpoint.manifest import DamagedError, File, Manifest
from entrypoint.errors import RefusedElsewhere, RunError
from entrypoint.storage import explain, sync

PARTIAL = ".partial"
LARGE = 1 << 20  # bytes from which a second thread pays

# A lone process is no process group, and that is how it is meant. For good: a thread can't take a filter back.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class SaveRefused(Exception):
    """The storage did not take a checkpoint: one line that says why, the same on every rank."""


class Writer:
    """This rank's part in writing.

    Args:
        folder: of the run's checkpoints.
        group: of all ranks, on CPU, and of nobody else; None: there is one rank.
        check: called on rank 0 before the checkpoint gets its name; raises OSError where it must not.
    """

    def __init__(self, folder: Path, group: dist.ProcessGroup | None, check: Callable[[], None]) -> None:
        self.folder = folder
        self.group = group
        self.check = check

    def write(self, state: dict[str, Any], documents: Mapping[str, str], manifest: Manifest) -> tuple[Path, Manifest]:
        """Write a checkpoint; on every rank, and complete when this returns.

        Args:
            state: of this rank, on CPU.
            documents: small files beside the tensors, by name, from rank 0.
            manifest: without files.

        Raises:
            SaveRefused: the storage has failed on a rank; on all of them, and nothing is left of it.
        """
        final = self.folder / f"step-{manifest.step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        files, refused, fault = self._write_tensors(state, partial)
        heard = self._exchange((files, refused, fault is not None))
        refused = next((said for _, said, _ in heard if said), None)
        if refused is None and not any(failed for _, _, failed in heard):
            whole = replace(manifest, files={name: file for files, _, _ in heard for name, file in files.items()})
            if self.is_main:
                refused, fault = self._seal(partial, final, documents, whole)
            said = str(fault) if isinstance(fault, RunError) else None
            refused, whole, failed, said = self._exchange((refused, whole, fault is not None, said))[0]
            if said is not None:
                raise fault or RefusedElsewhere(f"rank 0 refused the run: {said}")
            if refused is None and not failed:
                return final, whole
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk has room for the metrics again
        if refused is not None:
            raise SaveRefused(refused) from fault
        raise fault or RuntimeError("rank 0 could not complete a checkpoint, see its error")

    @property
    def is_main(self) -> bool:
        return self.group is None or dist.get_rank(self.group) == 0

    def _write_tensors(
        self, state: dict[str, Any], partial: Path
    ) -> tuple[dict[str, File], str | None, BaseException | None]:
        """This rank's files; why the storage refused them; what else went wrong."""
        writer = _Storage(partial)
        try:
            dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        except CheckpointException as error:
            failures = [failure for failure, _ in error.failures.values()]
            storage = writer.fs.failed or next((each for each in failures if isinstance(each, OSError)), None)
            return {}, explain(storage, str(partial)) if storage else None, failures[0]
        finally:
            writer.fs.close()
        return writer.fs.written, None, None

    def _seal(
        self, partial: Path, final: Path, documents: Mapping[str, str], manifest: Manifest
    ) -> tuple[str | None, BaseException | None]:
        """The rest of the files, the manifest, the name. On rank 0."""
        assert isinstance(manifest.files, dict)
        try:
            for name, text in documents.items():
                (partial / name).write_bytes(content := text.encode())
                sync(partial / name)
                manifest.files[name] = File(len(content), hashlib.sha256(content).hexdigest())
            manifest.check_sizes(partial)
            manifest.write(partial)  # which syncs the folder too
            self.check()
            partial.rename(final)
            sync(self.folder)
        except OSError as error:
            return explain(error, str(partial)), error
        except DamagedError as error:  # already
            return f"{partial}: {error}", error
        except Exception as error:  # the other ranks wait to hear of it
            return None, error
        return None, None

    def _exchange(self, mine: Any) -> list[Any]:
        """What every rank says, on every rank."""
        if self.group is None:
            return [mine]
        heard: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(heard, mine, group=self.group)
        return heard


class _Storage(dcp.FileSystemWriter):
    """torch's writer over `_Files`; what it writes down of itself names no path."""

    fs: _Files

    def __init__(self, path: Path) -> None:
        # One thread: torch loses what another raises. No copying ahead: what is written is on the CPU already.
        super().__init__(path, thread_count=1, per_thread_copy_ahead=0, overwrite=True)
        self.fs = _Files()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


class _Files(FileSystem):
    """Files that are summed up while they are written, so that none is read again."""

    def __init__(self) -> None:
        self.written: dict[str, File] = {}
        self.failed: OSError | None = None  # torch makes a RuntimeError of it
        self._helper = ThreadPoolExecutor(1)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        try:
            with super().create_stream(path, mode) as raw:
                stream = _Summed(raw, self._helper)
                yield stream
            self.written[Path(path).name] = File(stream.size, stream.digest.hexdigest())
        except OSError as error:
            self.failed = error
            raise
        except Exception:
            self.failed = stream.failed
            raise

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)

    def close(self) -> None:
        self._helper.shutdown()


class _Summed(io.IOBase):
    """A file for writing from its start to its end, with its size and SHA-256 so far."""

    def __init__(self, raw: io.IOBase, helper: ThreadPoolExecutor) -> None:
        self.raw, self.helper = raw, helper
        self.size, self.digest = 0, hashlib.sha256()
        self.failed: OSError | None = None

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        # Hashing and writing both leave the interpreter: side by side the slower one is what they cost.
        hashed = self.helper.submit(self.digest.update, view) if len(view) >= LARGE else None
        try:
            if self.raw.write(view) != len(view):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as error:
            self.failed = error
            raise
        finally:
            hashed.result() if hashed else self.digest.update(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self.raw.closed:
            self.raw.flush()

    def fileno(self) -> int:
        return self.raw.fileno()

    def close(self) -> None:
        self.raw.close()
        super().close()
