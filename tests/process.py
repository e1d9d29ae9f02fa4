"""Starts the program as a user does, in an environment that holds nothing of this machine's by accident."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Variables that would make a run another run: a launcher's, or keys and caches of whoever started the tests.
FOREIGN = ("AWS_", "HF_", "HYDRA_", "MLFLOW_", "NNODES", "NODE_RANK", "MASTER_", "TORCHELASTIC_", "VK_", "OMP_")
FOREIGN_NAMES = {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "COLUMNS", "PYTHONWARNINGS"}


def scrubbed(extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment without launchers' and credentials' variables, offline, one thread; plus `extra`.

    A value of None removes the variable.
    """
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(FOREIGN) and name not in FOREIGN_NAMES
    }
    env |= {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "3",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),  # wherever the process is started
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_OFFLINE": "1",
    }
    for name, value in (extra or {}).items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = value
    return env


def run_entrypoint(
    *args: str | Path,
    env: Mapping[str, str | None] | None = None,
    module: str = "entrypoint",
    cwd: Path | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """`python -m <module> <args>`, waited for; `env` is added to `scrubbed()`. Never raises on an exit code."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        env=scrubbed(env),
        cwd=cwd or ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
