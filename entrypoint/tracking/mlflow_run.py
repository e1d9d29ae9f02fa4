"""MLflow run: parameters, metrics and the registered model on a tracking server.

A server that can't be reached at the start of a run is a refusal: nothing is lost yet. After that nothing that MLflow
does can stop or slow a run: metrics are sent by a thread, kept while the server is away and sent when it is back; one
line says so when it begins and one at the end says what never arrived. A run that resumes does not refuse either:
64 would end it for good.
Credentials come from MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN in the environment, never from the configuration.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from entrypoint.errors import ConfigError
from entrypoint.storage import is_s3, write_atomically

RUN_FILE = "mlflow.json"  # in the checkpoint folder: which MLflow run a resumed run goes on with
LONGEST_PARAMETER = 6000  # characters, MLflow's limit
AT_ONCE = 100  # parameters; metrics would be 1000
KEPT = 100_000  # metrics kept while the server is away: days of a run
FINISH = 30.0  # seconds that the end of a run waits for the last metrics
# Bounds of one request, where the environment does not say otherwise; MLflow's own are 120 s and 7 retries.
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
T = TypeVar("T")


class MlflowRun:
    """One MLflow run, continued where this run was started before.

    Args:
        uri, experiment, name: where it is and what it is called.
        folder: keeps the run's id.
        parameters: flat; those that the server has already are left as they are.
        resumed: whether steps are done already: then an unreachable server is no refusal.
        fresh: whether to begin a new MLflow run in any case.

    Attributes:
        reached: whether the server was there, so that it is known what it has.

    Raises:
        ConfigError: the server can't be reached or refuses, and no step is done yet.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        name: str,
        *,
        folder: Path,
        parameters: Mapping[str, Any],
        resumed: bool,
        fresh: bool,
    ) -> None:
        for variable, value in {**LIMITS, "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        self._uri, self._client = uri, MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._waiting: list[Any] = []  # appended to by the run, emptied by the thread
        self._news, self._stop, self._sending = threading.Event(), threading.Event(), threading.Lock()
        self._sent: set[tuple[str, int]] = set()
        self._failures, self._dropped, self._closed = 0, 0, False
        self._outage = False  # whether it was said that metrics don't get through
        known = None if fresh else self.known(folder, uri)
        self.run_id, self.reached = known or "", False  # an empty id: there is none
        try:
            self.run_id = self._open(experiment, name, known, parameters)
            self.reached = True
        except Exception as error:  # requests', MLflow's and the operating system's
            if not resumed:
                raise ConfigError(
                    f"tracking.mlflow_uri: {uri} can't be used ({_first_line(error)}); "
                    "start the server, correct the address or MLFLOW_TRACKING_*, or leave the key out"
                ) from error
            self._failed("going on without it", error)
        if self.run_id:
            write_atomically(folder / RUN_FILE, json.dumps({"uri": uri, "run_id": self.run_id}).encode())
            threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    @staticmethod
    def known(folder: Path, uri: str) -> str | None:
        """The id of the MLflow run that this run has on this server already."""
        try:
            said = json.loads((folder / RUN_FILE).read_bytes())
            return str(said["run_id"]) if said["uri"] == uri else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Have metrics sent; returns at once. What the server had at the start is not sent twice."""
        from mlflow.entities import Metric

        if not self.run_id:
            return
        now = int(time.time() * 1000)  # kept through retries: MLflow then knows a repeated one by it
        for name, value in metrics.items():
            key = re.sub(r"[^\w\-./ :]", "_", name)
            if math.isfinite(value) and (key, step) not in self._sent:
                if len(self._waiting) < KEPT:
                    self._waiting.append(Metric(key, value, now, step))
                else:
                    self._dropped += 1
        self._news.set()

    def finish(self, model_name: str, source: str, tags: Mapping[str, str]) -> None:
        """Register the model at `source` as a new version, once, tag it and the run, and end the run."""
        if not self.run_id:
            return
        try:
            for key, value in tags.items():
                self._client.set_tag(self.run_id, key, value)
            self._register(model_name, source, tags)
        except Exception as error:
            self._failed(f"the model at {source} is not registered as {model_name}", error, always=True)
        self.close("FINISHED")

    def close(self, status: str = "KILLED") -> None:
        """Send what is left, within a bounded time, and set the run's status; the second time does nothing."""
        if self._closed or not self.run_id:
            return
        self._closed = True
        self._stop.set()
        self._news.set()
        try:
            if self._sending.acquire(timeout=FINISH):
                self._send()
            self._client.set_terminated(self.run_id, status=status)
        except Exception as error:
            self._failed("the end of the run was not sent", error)
        lost = len(self._waiting) + self._dropped
        if self._failures:
            _say(
                f"{self._uri}: {self._failures} requests failed, {lost} metric values never arrived; see metrics.jsonl"
            )

    def _open(self, experiment: str, name: str, known: str | None, parameters: Mapping[str, Any]) -> str:
        """Find or make the run and send what of the parameters is new; returns its id."""
        from mlflow.entities import Param

        there: Mapping[str, str] = {}
        if known is not None and (found := self._find(known)) is not None:
            run_id, there = known, found.data.params
            self._client.update_run(known, status="RUNNING")
            for key in found.data.metrics:
                self._sent |= {(key, point.step) for point in self._client.get_metric_history(known, key)}
        else:
            run_id = str(self._client.create_run(self._experiment(experiment), run_name=name).info.run_id)
        new = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in parameters.items() if key not in there]
        for part in _parts(new, AT_ONCE):
            self._client.log_batch(run_id, params=part)
        return run_id

    def _find(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage != "active":
            raise ConfigError(f"experiment {name!r} was deleted on the server: restore it or name another")
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self._experiment(name)  # another run was faster

    def _register(self, model_name: str, source: str, tags: Mapping[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if self._client.search_model_versions(f"run_id='{self.run_id}'"):
            return  # by a start that was killed after it
        if not is_s3(source):
            # A server refuses its clients' local folders as sources: the run stands in, a tag says where the model is.
            tags, source = {**tags, "path": source}, f"{self._client.get_run(self.run_id).info.artifact_uri}/model"
        self._client.create_model_version(model_name, source, run_id=self.run_id, tags=dict(tags))

    def _work(self) -> None:
        while not self._stop.is_set():
            self._news.wait()
            self._news.clear()
            with self._sending:
                if self._stop.is_set():
                    return
                try:
                    self._send()
                except Exception as error:
                    self._failed("metrics are kept and sent later", error, always=not self._outage)
                    self._outage = True

    def _send(self) -> None:
        while part := self._waiting[:AT_ONCE]:
            self._client.log_batch(self.run_id, metrics=part)
            del self._waiting[: len(part)]

    def _failed(self, consequence: str, error: Exception, *, always: bool = False) -> None:
        self._failures += 1
        if self._failures == 1 or always:
            _say(f"{self._uri}: {consequence} ({_first_line(error)})")


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _say(line: str) -> None:
    print(f"mlflow: {line}", file=sys.stderr, flush=True)
