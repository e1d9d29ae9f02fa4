"""Fixtures that every test may ask for; each is made once a pytest worker, and only where it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

# Before anything imports a library that looks: no test reaches for the network or for this machine's AWS keys.
for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
    del os.environ[name]
os.environ |= {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "3",  # who listens nowhere is given up after a second
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
}

from tests.faults.zygote import Zygote
from tests.servers.faults import FaultProxy, fault_proxy
from tests.servers.mlflow import MlflowServer
from tests.servers.mlflow import mlflow_server as start_mlflow_server
from tests.servers.s3 import S3Server, s3_server
from tests.servers.toxiproxy import Toxiproxy
from tests.servers.toxiproxy import toxiproxy as start_toxiproxy

MLFLOW = ("tests/test_tracking.py", "tests/servers/")  # share a server that takes 20 s to start
# A module looks at the same runs, or the same image, from many sides.
BY_MODULE = (
    "tests/cluster/test_gang.py",
    "tests/e2e/",
    "tests/faults/",
    "tests/image/test_cpu_target.py",
    "tests/trainers/test_world_size.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadgroup`: tests that share what is slow to make run on one worker, others where there is room.

    By their paths: marks (`xdist_group`) group nothing since pytest 9.2, see pytest-dev/pytest-xdist#1386.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(MLFLOW):
                return "mlflow"
            return nodeid.partition("::")[0] if nodeid.startswith(BY_MODULE) else nodeid

    return Together(config, log)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server that refuses wrong keys and anonymous access."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def faults(s3: S3Server) -> Iterator[FaultProxy]:
    """The S3 server behind a proxy that breaks what its plan says; without a plan, nothing."""
    with fault_proxy(s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def toxiproxy(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toxiproxy]:
    """The S3 server behind a real TCP proxy."""
    with start_toxiproxy(tmp_path_factory.mktemp("toxiproxy"), s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real MLflow server with a model registry; some 20 s to start, so few test modules should ask for it."""
    with start_mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its tokenizer, in Hugging Face's layout. Read-only: it is shared."""
    from tests.tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """A process that has imported what a run imports, and forks runs; it has a tiny model too."""
    with closing(Zygote(tmp_path_factory.mktemp("zygote") / "tiny")) as made:
        yield made
