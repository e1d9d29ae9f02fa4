"""Bench: what listening to signals costs a step, and the seconds from SIGTERM to the process' end, with two ranks.

    python -m tests.bench.bench_signals      # on the demo's model and traces; CHECK=1 fails above 0.5 % of a step

The agreement (one all-reduce of one number) is timed in two processes that do nothing else; a step's time is the demo
run's own. The notice comes while a step is computed: it is finished and saved before the ranks leave.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from entrypoint.demo.model import unpack_model
from entrypoint.launch.topology import free_port
from tests.bench.bench_start import DEMO

MOST = 0.005  # of a step
RANK = """
import time
from entrypoint.world import joined
with joined(600) as world:
    for _ in range(50):
        world.agreed()
    world.barrier()
    seconds = []
    for _ in range(500):
        began = time.perf_counter()
        world.agreed()
        seconds.append(time.perf_counter() - began)
    world.say(str(sorted(seconds)[250]))
"""


def agreement() -> float:
    """Seconds of one agreement of two ranks, the median."""
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    out = [rank.communicate(timeout=600)[0] for rank in ranks]
    return float(out[0])


def stop(model: Path, folder: Path, cache: Path) -> tuple[float, float, float]:
    """Seconds of a step, of its save, and from SIGTERM to the end of a run that is told after its second step."""
    settings = {
        "data.path": DEMO / "traces",
        "data.cache_path": cache,
        "model.path": model,
        "output.path": folder,
        "train.logging_steps": 1,
        "train.eval_pairs": 8,
    }
    run = subprocess.Popen(
        [sys.executable, "-m", "entrypoint", "--config-dir", str(DEMO), "--config-name", "grpo"]
        + [f"{key}={value}" for key, value in settings.items()],
        env={**os.environ, "LOCAL_WORLD_SIZE": "2"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    reached = folder / "checkpoints" / "story.step"
    while not (reached.exists() and json.loads(reached.read_text())["step"] >= 2):
        if run.poll() is not None:
            raise SystemExit(f"the run ended by itself with {run.returncode}")
        time.sleep(0.01)  # polls a file of another process
    told = time.monotonic()
    run.send_signal(signal.SIGTERM)
    if run.wait(600) != 75:
        raise SystemExit(f"the run ended with {run.returncode}, expected 75")
    seconds = time.monotonic() - told
    lines = [json.loads(line) for line in (folder / "checkpoints" / "story.jsonl").read_text().splitlines()]
    saved = next(line for line in lines if line["event"] == "saved")
    return saved["step_seconds"], saved["seconds"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = range(parser.parse_args().rounds)
    agreements = [agreement() for _ in rounds]
    model = unpack_model()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stops = [stop(model, folder / f"run-{number}", folder / "cache") for number in rounds]
    step, save, end = (statistics.median(values) for values in zip(*stops, strict=True))
    agreed = statistics.median(agreements)
    print("| | median | range |\n|---|---|---|")
    for what, values in (
        ("agreement of two ranks", [1000 * value for value in agreements]),
        ("a step", [1000 * values[0] for values in stops]),
        ("its save", [1000 * values[1] for values in stops]),
        ("SIGTERM to the end of the process", [1000 * values[2] for values in stops]),
    ):
        print(f"| {what} | {statistics.median(values):,.1f} ms | {min(values):,.1f} to {max(values):,.1f} |")
    print(f"\nagreement: {agreed / step:.4%} of a step, at most {MOST:.1%}")
    print(f"from SIGTERM to the end: {end - step - save:+.1f} s over a whole step and its save")
    if os.environ.get("CHECK") == "1" and agreed / step > MOST:
        raise SystemExit("missed")


if __name__ == "__main__":
    main()
