"""Bench (b): seconds from the command to the first optimiser step's end, on the demo's model and traces.

    python -m tests.bench.bench_start                # 5 rounds of: first start, restart, resume, importing alone

A first start prepares the traces and computes the reference's log-probs; a restart finds both on disk; a resumed run
finds a checkpoint of step 1 too, verifies and loads it, and its clock stops at step 2. The floor is a process that
imports the same libraries and loads the same weights, and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from entrypoint.demo.model import unpack_model

DEMO = Path(__file__).resolve().parents[2] / "entrypoint" / "demo"
FLOOR = """
import sys
from entrypoint.load import load_model
import entrypoint.run
from pathlib import Path
load_model(Path(sys.argv[1]))
"""


def floor(model: Path) -> float:
    """Seconds of a process that imports and loads, and does nothing else."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", FLOOR, str(model)], check=True, capture_output=True)
    return time.monotonic() - began


def seconds_to_step(step: int, model: Path, out: Path, cache: Path) -> float:
    """Seconds until a run of two steps has logged this one, from the command on.

    The clock stops at the step's own time stamp: what comes after it, the evaluation and the output, is not counted.
    """
    settings = {
        "data.path": DEMO / "traces",
        "data.cache_path": cache,
        "model.path": model,
        "output.path": out,
        "train.max_steps": 2,
        "checkpoint.save_every": 1,
        "train.logging_steps": 1,
        "train.eval_pairs": 8,
    }
    began = time.time()
    subprocess.run(
        [sys.executable, "-m", "entrypoint", "--config-dir", str(DEMO), "--config-name", "grpo"]
        + [f"{name}={value}" for name, value in settings.items()],
        check=True,
        capture_output=True,
    )
    lines = [json.loads(line) for line in (out / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    ended = next(line["time"] for line in lines if line["step"] == step and "loss" in line["metrics"])
    return datetime.fromisoformat(ended).timestamp() - began


def resumed(model: Path, out: Path, cache: Path) -> float:
    """Seconds to step 2 of a run that was cut off after step 1."""
    shutil.rmtree(out / "checkpoints" / "step-00000002")
    for file in out.iterdir():  # its result, which it had not written then
        if file.is_file():
            file.unlink()
    return seconds_to_step(2, model, out, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    model = unpack_model()
    times: dict[str, list[float]] = {"imports and weights alone": [], "first start": [], "restart": [], "resume": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):  # interleaved: a slow minute of the machine meets all of them
            cache = Path(folder) / f"cache-{number}"
            times["imports and weights alone"].append(floor(model))
            times["first start"].append(seconds_to_step(1, model, Path(folder) / f"first-{number}", cache))
            times["restart"].append(seconds_to_step(1, model, Path(folder) / f"again-{number}", cache))
            times["resume"].append(resumed(model, Path(folder) / f"again-{number}", cache))
            shutil.rmtree(Path(folder) / f"first-{number}")
            shutil.rmtree(Path(folder) / f"again-{number}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}")
    base = statistics.median(times["imports and weights alone"])
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name:<28} median {middle:6.1f} s  ({min(values):.1f} to {max(values):.1f})  {middle / base:5.2f} x")


if __name__ == "__main__":
    main()
