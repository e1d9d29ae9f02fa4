"""Metrics log: `metrics.jsonl` and TensorBoard files in the checkpoint folder, always written.

A line of metrics.jsonl is {"step", "epoch", "time", "metrics": {name: value}}: time in UTC, a value that is not finite
is null. A resumed run cuts what lies beyond its checkpoint, so that no step of a curve is there twice.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from entrypoint.storage import explain, write_atomically

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsLog:
    """Both files of one run, open for its steps after `resumed_at`.

    Args:
        folder: where they are.
        resumed_at: steps that are done; lines of later ones are cut.
        fresh: another run's files are there, or none: begin with empty ones.
    """

    def __init__(self, folder: Path, *, resumed_at: int, fresh: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS
        self._silent = False
        lines = [] if fresh else [line for line in read_metrics(self._path) if line["step"] <= resumed_at]
        self._there = {(line["step"], frozenset(line["metrics"])) for line in lines}
        write_atomically(self._path, "".join(_line(line) for line in lines).encode())
        self._file = self._path.open("a", encoding="utf-8")
        if fresh:
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        # TensorBoard drops what it has read of purge_step and later.
        self._board = SummaryWriter(log_dir=str(folder / TENSORBOARD), purge_step=None if fresh else resumed_at + 1)

    def log(self, step: int, metrics: Mapping[str, float], *, epoch: float | None) -> bool:
        """Write one line; False: it was there already. Where the disk takes none, training goes on: see `_write`."""
        key = (step, frozenset(metrics))
        if key in self._there:
            return False
        self._there.add(key)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._write(_line({"step": step, "epoch": epoch, "time": now, "metrics": dict(metrics)}))
        try:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        except OSError as error:  # TensorBoard's writer does not recover
            self._complain(error)
        return True

    def _write(self, line: str) -> None:
        """Lines that the disk does not take stay in the buffer and come with a later one."""
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._silent:
            print(f"entrypoint: warning: metrics are held back: {explain(error, str(self._path))}", file=sys.stderr)
        self._silent = True

    def holds(self, step: int, prefix: str) -> bool:
        """Whether a metric of this step is there whose name begins so."""
        return any(at == step and any(name.startswith(prefix) for name in names) for at, names in self._there)

    def read(self) -> list[dict[str, Any]]:
        """The lines that are there."""
        return read_metrics(self._path)

    def close(self) -> None:
        """Close both; what the disk still does not take is lost then."""
        for closes in (self._file.close, self._board.close):
            try:
                closes()
            except OSError as error:
                self._silent = False
                self._complain(error)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a crash has torn is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            lines.append(
                {
                    "step": int(line["step"]),
                    "epoch": line["epoch"],
                    "time": line["time"],
                    "metrics": dict(line["metrics"]),
                }
            )
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def _line(line: dict[str, Any]) -> str:
    finite = {
        name: value if value is not None and math.isfinite(value) else None for name, value in line["metrics"].items()
    }
    return json.dumps({**line, "metrics": finite}, allow_nan=False) + "\n"
