"""The CPU target's own install steps, run here; the program started from what they leave, as a pod would start it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from entrypoint import __version__
from tests.image.dockerfile import Container, Image, build
from tests.process import ROOT

# The machine's caches and its way to a package index. Wheels are linked from uv's cache, not compiled: minutes less.
KEPT = ("HOME", "XDG_CACHE_HOME", "PIP_", "UV_", "SSL_", "HTTPS_PROXY", "https_proxy")
HERE = {
    "PATH": os.environ["PATH"],
    "PYTHON": os.path.realpath(sys.executable),
    "UV_LINK_MODE": "hardlink",
    "UV_COMPILE_BYTECODE": "0",
}

RUN = {
    "method": {"name": "dpo"},
    "data": {"path": "/opt/demo/traces", "held_out_share": 0.4},
    "model": {"path": "/opt/demo/model", "lora": {"enabled": True, "rank": 2}},
    "train": {"max_steps": 2, "batch_size": 2, "max_length": 160, "eval_pairs": 2, "logging_steps": 1},
    "checkpoint": {"path": "/storage/run", "keep": 1, "save_every": 2},
    "output": {"path": "/storage/model"},
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    folder = tmp_path_factory.mktemp("image")
    env = {name: value for name, value in os.environ.items() if name.startswith(KEPT)} | HERE
    return build((ROOT / "Dockerfile").read_text(), "cpu", folder, env)


@pytest.fixture
def container(image: Image, tmp_path: Path) -> Container:
    run, storage = tmp_path / "run", tmp_path / "storage"
    for folder in (run, storage):
        folder.mkdir()
    (run / "run.yaml").write_text(yaml.safe_dump(RUN))
    storage.chmod(0o777)
    return Container(image, tmp_path / "root", run, storage)


def test_nothing_of_it_can_be_written_but_tmp_and_the_storage(container: Container) -> None:
    """And it is nobody: user 1000, no name, no capability."""
    script = (
        "id -u; grep CapEff /proc/self/status; for f in / /opt /opt/venv /etc /etc/run /usr /root /tmp /storage; do"
    )
    said = container("sh", "-c", f"{script} touch $f/x 2>/dev/null && echo $f; done; true").stdout.split()
    assert said == ["1000", "CapEff:", "0000000000000000", "/tmp", "/storage"]


def test_it_says_its_version_and_its_keys(container: Container) -> None:
    said = container(*container.image.entrypoint, "--version")
    assert (said.returncode, said.stdout.strip(), said.stderr) == (0, __version__, "")
    assert "train.learning_rate" in container(*container.image.entrypoint, "--help").stdout
    assert container("python", "-c", "import gguf").returncode == 1  # the wheel that brought the model stays behind


@pytest.mark.slow
def test_preflight_passes_and_a_run_trains_there(container: Container) -> None:
    file = ("--config-dir", "/etc/run", "--config-name", "run")
    said = container("python", "-m", "entrypoint.preflight", *file)
    assert said.returncode == 0, said.stderr
    assert "model: ok, /opt/demo/model: " in said.stdout
    ended = container(*container.image.entrypoint, *file)
    assert ended.returncode == 0, ended.stderr
    record = json.loads((container.storage / "model/run.json").read_text())
    assert record["training"]["steps"] == 2
    assert (container.storage / "model/adapter_model.safetensors").stat().st_uid == 1000
