"""Where metrics go: the files that are always written, what a restart does to them, and a real MLflow server."""

from __future__ import annotations

import io
import json
import math
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entrypoint.conf import Checkpoint, Data, Dpo, Model, Output, Run, Tracking
from entrypoint.conf import train as train_conf
from entrypoint.errors import ConfigError
from entrypoint.tracking.metrics_log import read_metrics
from entrypoint.tracking.mlflow_run import MlflowRun
from entrypoint.tracking.progress import Progress
from entrypoint.tracking.tracker import Tracker, finish_again
from tests.servers.mlflow import MlflowServer

RECORD = {
    "base_model": "/models/base",
    "method": "dpo",
    "iteration": 3,
    "date": "2026-11-23T06:00:00+00:00",
}


def run_of(folder: Path, *, resume: str = "auto", rate: float = 5e-7, **tracking: Any) -> Run:
    return Run(
        method=Dpo(),
        data=Data(path="/traces"),
        model=Model(path="/models/base"),
        train=train_conf.DpoTrain(learning_rate=rate),
        checkpoint=Checkpoint(path=str(folder / "checkpoints"), resume=resume),
        output=Output(path=tracking.pop("output", str(folder / "run-042"))),
        tracking=Tracking(**tracking),
    )


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "checkpoints" / "metrics.jsonl")]


def board_of(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "checkpoints" / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_every_line_holds_step_epoch_time_and_metrics(tmp_path: Path) -> None:
    tracker = Tracker(run_of(tmp_path), resumed_at=0, total_steps=20)
    tracker.log(10, {"loss": 0.5, "grad_norm": math.inf, "epoch": 0.25})
    text = (tmp_path / "checkpoints" / "metrics.jsonl").read_text()  # before any close: a crash loses no line
    tracker.log_held_out(20, {"accuracy": 0.75})
    tracker.finish(RECORD)
    line = json.loads(text, parse_constant=pytest.fail)
    assert line.pop("time").endswith("+00:00")
    assert line == {"step": 10, "epoch": 0.25, "metrics": {"loss": 0.5, "grad_norm": None}}
    last = read_metrics(tmp_path / "checkpoints" / "metrics.jsonl")[-1]
    assert (last["step"], last["metrics"]) == (20, {"held_out/accuracy": 0.75})
    assert board_of(tmp_path, "loss") == [(10, 0.5)]
    assert board_of(tmp_path, "held_out/accuracy") == [(20, 0.75)]


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    """Killed in step 35, with its newest checkpoint at 20: what was logged at 30 goes, also a torn last line."""
    tracker = Tracker(run_of(tmp_path), resumed_at=0, total_steps=40)
    for step in (0, 10, 20, 30):
        tracker.log(step, {"loss": step / 10})
    with open(tmp_path / "checkpoints" / "metrics.jsonl", "a") as file:
        file.write('{"step": 35, "epo')
    tracker.close()
    tracker = Tracker(run_of(tmp_path), resumed_at=20, total_steps=40)
    assert steps_of(tmp_path) == [0, 10, 20]
    for step in (20, 30, 40):  # 20 is there already
        tracker.log(step, {"loss": step / 10})
    tracker.close()
    assert steps_of(tmp_path) == [0, 10, 20, 30, 40]
    assert board_of(tmp_path, "loss") == [(0, 0.0), (10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)]


def test_a_restart_without_a_checkpoint_keeps_what_was_measured_of_the_base(tmp_path: Path) -> None:
    tracker = Tracker(run_of(tmp_path), resumed_at=0, total_steps=40)
    tracker.log(0, {"held_out/accuracy": 0.5})
    tracker.log(10, {"loss": 1.0})
    tracker.close()
    Tracker(run_of(tmp_path), resumed_at=0, total_steps=40).close()
    assert steps_of(tmp_path) == [0]


@pytest.mark.parametrize("change", [{"resume": "never"}, {"rate": 1e-6}])
def test_another_run_in_the_same_folder_starts_with_empty_files(tmp_path: Path, change: dict[str, Any]) -> None:
    tracker = Tracker(run_of(tmp_path), resumed_at=0, total_steps=40)
    tracker.log(0, {"held_out/accuracy": 0.5})
    tracker.close()
    tracker = Tracker(run_of(tmp_path, **change), resumed_at=0, total_steps=40)
    tracker.log(0, {"held_out/accuracy": 0.25})
    tracker.close()
    assert [line["metrics"] for line in read_metrics(tmp_path / "checkpoints" / "metrics.jsonl")] == [
        {"held_out/accuracy": 0.25}
    ]
    assert board_of(tmp_path, "held_out/accuracy") == [(0, 0.25)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO) -> str:
    progress = Progress(total=1000, done=0, stream=stream)
    progress.step(0)
    for step in range(1, 21):
        progress.step(step)
    progress.show(20, {"loss": 0.693147, "kl": 0.01234, "learning_rate": 1e-5, "other": 1.0})
    progress.show(20, {"held_out/accuracy": 0.5, "held_out/margin": -0.25})
    progress.close()
    return stream.getvalue()


def test_a_log_file_gets_plain_lines() -> None:
    lines = show(io.StringIO()).splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"step 20/1000 loss=0\.6931 kl=0\.01234 lr=1e-05 \S+ s/step eta \d+:\d\d:\d\d", lines[0])
    assert lines[1] == "step 20/1000 held-out accuracy=0.5 margin=-0.25"


def test_a_terminal_gets_a_bar_and_evaluations_stand_above_it() -> None:
    text = show(Terminal())
    assert "\r" in text
    assert "20/1000" in text
    assert "loss=0.6931 kl=0.01234 lr=1e-05" in text
    assert "step 20/1000 held-out accuracy=0.5 margin=-0.25\n" in text


# MLflow


@pytest.fixture
def away() -> Iterator[str]:
    """The address of a server that is away."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused at once
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def test_a_server_that_is_away_is_refused_at_the_start_and_bearable_later(
    quick: None, away: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        Tracker(run_of(tmp_path, mlflow_uri=away), resumed_at=0, total_steps=40)
    assert str(refused.value).startswith(f"tracking.mlflow_uri: {away} can't be used")
    assert "\n" not in str(refused.value)
    capfd.readouterr()
    tracker = Tracker(run_of(tmp_path, mlflow_uri=away), resumed_at=10, total_steps=40)
    tracker.log(20, {"loss": 1.0})
    tracker.finish(RECORD)
    err = capfd.readouterr().err
    assert err.count("mlflow: ") == 1
    assert "going on without it" in err


def test_a_run_its_metrics_and_its_model_are_on_the_server(
    mlflow_server: MlflowServer, away: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_server.uri)
    run = run_of(
        tmp_path,
        mlflow_uri=mlflow_server.uri,
        experiment="tests",
        registered_model="tuned",
        output="s3://models/runs/run-042/",
    )
    tracker = Tracker(run, resumed_at=0, total_steps=40)
    for step in (0, 10, 20, 30):
        tracker.log(step, {"loss": step / 10, "clip_ratio/region_mean": 0.0, "odd (name)": math.nan})
    tracker.close()  # stopped; its newest checkpoint is of step 20
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (stopped,) = client.search_runs([experiment.experiment_id])
    assert stopped.info.status == "KILLED"

    run.train.logging_steps = 5  # may change at a resume; MLflow does not let a parameter change
    tracker = Tracker(run, resumed_at=20, total_steps=40)
    for step in (30, 40):
        tracker.log(step, {"loss": step / 10})
    tracker.log_held_out(40, {"accuracy": 0.75})
    tracker.finish(RECORD)
    (done,) = client.search_runs([stopped.info.experiment_id])
    assert done.info.run_id == stopped.info.run_id
    assert (done.info.status, done.info.run_name) == ("FINISHED", "run-042")
    assert done.data.params["train.batch_size"] == "32"
    assert done.data.params["method.name"] == "dpo"
    assert done.data.params["train.logging_steps"] == "10"
    history = [(point.step, point.value) for point in client.get_metric_history(done.info.run_id, "loss")]
    assert history == [(0, 0.0), (10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)]
    assert done.data.metrics["held_out/accuracy"] == 0.75
    (version,) = client.search_model_versions("name='tuned'")
    assert version.source == "s3://models/runs/run-042/"
    assert version.run_id == done.info.run_id
    tags = {"base_model": "/models/base", "method": "dpo", "iteration": "3", "date": "2026-11-23T06:00:00+00:00"}
    assert version.tags == tags
    assert tags.items() <= done.data.tags.items()
    # As if a kill had come between the output, after which nothing is logged, and MLflow: the next start sends the last
    # metrics and registers the model, once.
    client.delete_model_version("tuned", version.version)
    with open(tmp_path / "checkpoints" / "metrics.jsonl", "a") as file:
        last = {"held_out/margin": 0.5, "held_out/loss": None}
        file.write(json.dumps({"step": 40, "epoch": None, "time": "", "metrics": last}) + "\n")
    for _ in range(2):
        finish_again(run, {**RECORD, "training": {"steps": 40}})
    (again,) = client.search_model_versions("name='tuned'")
    assert (again.source, again.run_id, again.tags) == (version.source, version.run_id, tags)
    finished = client.get_run(done.info.run_id)
    assert finished.info.status == "FINISHED"
    assert finished.data.metrics == {**done.data.metrics, "held_out/margin": 0.5}
    for name, steps in (("loss", [0, 10, 20, 30, 40]), ("held_out/margin", [40]), ("held_out/accuracy", [40])):
        assert [point.step for point in client.get_metric_history(done.info.run_id, name)] == steps
    # Where the folder was deleted there is nothing to do.
    finish_again(run_of(tmp_path / "deleted", mlflow_uri=mlflow_server.uri), RECORD)
    assert not (tmp_path / "deleted").exists()
    assert "mlflow: " not in capfd.readouterr().err

    # A second model of this name, in a local folder, which no server accepts as a source.
    local = run_of(tmp_path / "local", mlflow_uri=mlflow_server.uri, experiment="tests", registered_model="tuned")
    Tracker(local, resumed_at=0, total_steps=1).finish(RECORD)
    newest = max(client.search_model_versions("name='tuned'"), key=lambda version: int(version.version))
    assert (int(newest.version), newest.tags["path"]) == (3, local.output.path)

    # A server that goes away in the middle costs one line at once and one at the end, and no time.
    gone = run_of(tmp_path / "gone", mlflow_uri=mlflow_server.uri, experiment="tests")
    tracker = Tracker(gone, resumed_at=0, total_steps=40)
    assert isinstance(tracker._mlflow, MlflowRun)
    tracker._mlflow._client = MlflowClient(away)
    start = time.monotonic()
    for step in range(1, 31):
        tracker.log(step, {"loss": 1.0})
    assert time.monotonic() - start < 30
    tracker.finish(RECORD)
    assert steps_of(tmp_path / "gone") == list(range(1, 31))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mlflow: ")]
    # Metrics go out by a thread of their own: either failure may be told first.
    assert any("metrics are kept and sent later" in line for line in lines[:2])
    assert "30 metric values never arrived" in lines[-1]
    assert len(lines) == 3  # between them: the model is not registered


def test_metrics_of_an_outage_arrive_after_it(
    quick: None, mlflow_server: MlflowServer, away: str, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_server.uri)
    mlflow_run = MlflowRun(
        mlflow_server.uri, "outage", "run", folder=tmp_path, parameters={"long": "x" * 9000}, resumed=False, fresh=True
    )
    mlflow_run._client = MlflowClient(away)
    mlflow_run.log(1, {"loss": 1.0})
    until = time.monotonic() + 60
    while not mlflow_run._failures:
        assert time.monotonic() < until
        time.sleep(0.01)
    mlflow_run._client = client
    mlflow_run.log(2, {"loss": 2.0})
    mlflow_run.close()
    assert [point.value for point in client.get_metric_history(mlflow_run.run_id, "loss")] == [1.0, 2.0]
    assert len(client.get_run(mlflow_run.run_id).data.params["long"]) == 6000
