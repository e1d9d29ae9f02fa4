"""An MLflow tracking server with its model registry, on SQLite."""

from __future__ import annotations

import contextlib
import os
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from entrypoint.launch.topology import free_port
from tests.servers.server import serve


@dataclass(frozen=True)
class MlflowServer:
    """A running server; run artifacts lie in `artifacts`, proxied by the server."""

    uri: str
    artifacts: Path


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """Start a server on a free loopback port; ready after some 20 s, most of them imports."""
    port = free_port()
    artifacts = folder / "artifacts"
    artifacts.mkdir(parents=True)
    # A run's artifacts are addressed as mlflow-artifacts:/…, so a registered model's `source` may be any remote
    # address (s3://…); of local folders MLflow accepts only a run's own.
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
        *("--artifacts-destination", str(artifacts)),
    ]
    env = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 2 processes instead of 10
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    with serve(command, env=env, log=folder / "mlflow.log", ready=ready, timeout=180):
        yield MlflowServer(f"http://127.0.0.1:{port}", artifacts)
