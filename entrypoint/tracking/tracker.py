"""Tracking: where a run's metrics go, on rank 0: metrics.jsonl and TensorBoard always, MLflow where configured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrypoint.conf import Run
from entrypoint.config import flatten, run_key
from entrypoint.storage import write_atomically
from entrypoint.tracking.metrics_log import MetricsLog
from entrypoint.tracking.mlflow_run import MlflowRun
from entrypoint.tracking.progress import HELD_OUT, Progress

RUN_FILE = "tracking.json"  # in the checkpoint folder: whose metrics are there


class Tracker:
    """Takes the metrics of one run; made on rank 0 only.

    Args:
        run: composed and checked; `checkpoint.path` is set.
        resumed_at: steps that are done; what was logged of later ones is forgotten.
        total_steps: of the whole run.

    Raises:
        ConfigError: the MLflow server can't be used and no step is done yet.
        OSError: checkpoint.path can't be written.
    """

    def __init__(self, run: Run, *, resumed_at: int, total_steps: int) -> None:
        self._run = run
        folder = Path(str(run.checkpoint.path))
        name = run_key(run)
        fresh = not resumed_at and (run.checkpoint.resume == "never" or _tracked(folder) != name)
        self._mlflow = None
        if run.tracking.mlflow_uri:
            self._mlflow = MlflowRun(
                run.tracking.mlflow_uri,
                run.tracking.experiment,
                run.tracking.run_name or run.output.path.rstrip("/").rsplit("/", 1)[-1],
                folder=folder,
                parameters=flatten(run),
                resumed=resumed_at > 0,
                fresh=fresh,
            )
        self._log = MetricsLog(folder, resumed_at=resumed_at, fresh=fresh)
        if self._mlflow and self._mlflow.reached:
            for line in self._log.read():  # a start that was killed may not have sent all of them
                finite = {name: value for name, value in line["metrics"].items() if value is not None}
                self._mlflow.log(line["step"], finite)
        write_atomically(folder / RUN_FILE, json.dumps({"run": name}).encode())
        self._progress = Progress(total=total_steps, done=resumed_at)
        self._closed = False

    def step(self, step: int) -> None:
        """A step has ended, or (once, with the step that the run starts from) the steps begin."""
        self._progress.step(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics of a step down. What is there already, from before a restart, is not written twice.

        Args:
            step: optimiser steps done.
            metrics: by name; `epoch` among them is taken as the line's; `held_out/…` are an evaluation's.
        """
        values = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        if values and self._log.log(step, values, epoch=metrics.get("epoch")):
            self._progress.show(step, values)
            if self._mlflow:
                self._mlflow.log(step, values)

    def log_held_out(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write an evaluation after `step` down."""
        self.log(step, {f"{HELD_OUT}{name}": value for name, value in metrics.items()})

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation of this step is written down."""
        return self._log.holds(step, HELD_OUT)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Register the model and end the MLflow run; where a kill comes before, `finish_again` does.

        Args:
            record: run.json.
        """
        if self._mlflow:
            tags = {name: str(record[name]) for name in ("base_model", "method", "iteration", "date")}
            self._mlflow.finish(self._run.tracking.registered_model, self._run.output.path, tags)
        self.close()

    def close(self) -> None:
        """Close the files and, in a bounded time, the MLflow run (as killed, unless it was finished)."""
        if self._closed:
            return
        self._closed = True
        self._progress.close()
        self._log.close()
        if self._mlflow:
            self._mlflow.close()


def finish_again(run: Run, record: Mapping[str, Any]) -> None:
    """Finish the tracking of a complete output: the start that wrote it may have been killed before it had.

    Its last metrics are in metrics.jsonl, written before the output, and go to MLflow from there.

    Args:
        record: its run.json.
    """
    if run.tracking.mlflow_uri and MlflowRun.known(Path(str(run.checkpoint.path)), run.tracking.mlflow_uri):
        steps = int(record["training"]["steps"])
        Tracker(run, resumed_at=steps, total_steps=steps).finish(record)


def _tracked(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / RUN_FILE).read_bytes())["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
