"""Bench (e): what the reference costs in memory, in its pass before the first step and in training after it.

    python -m tests.bench.bench_reference            # SmolLM2-135M, fp32, under two minutes
    CHECK=1 python -m tests.bench.bench_reference    # fails where something of the pass stays in memory

Ours scores the responses with the model itself before it is trained; stock TRL's GRPO keeps a second model. Each side
is a process of its own, that makes an optimiser step of 2 groups (256 : 64, G=4) after AdamW's state is allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from entrypoint.demo.model import unpack_model
from entrypoint.host import proc_bytes
from tests.bench.bench_step import THREADS, read_peak, release, reset_peak
from tests.bench.sides import Ours, Shape, Side, stock

SHAPE = Shape("grpo", 256, 64, 4)
STAYS = 0.05  # of the weights, at most: what is left of a pass when it is over
Figures = dict[str, float]  # bytes


def held() -> int:
    """Bytes that the process holds."""
    release()
    return proc_bytes("self/status", "VmRSS")


def passes(side: Ours) -> Figures:
    """The peak of a pass over one group and over all, a group a forward call, and what is left of it."""
    side.model.eval()
    found: Figures = {}
    one = side.responses[: SHAPE.size]
    list(side.scorer.log_probs(side.groups, one))  # the libraries' own buffers
    for name, responses in (("a pass over one group", one), ("over both", side.responses)):
        release()
        before = reset_peak()
        side.reference.update(side.scorer.log_probs(side.groups, responses))
        found[name] = read_peak() - before
        found["what is left of it"] = max(0, held() - before)
    return found


def measured(name: str, model: Path) -> Figures:
    """One side's figures."""
    libraries = held()
    with tempfile.TemporaryDirectory() as scratch:
        side: Side
        if name == "ours":
            side = ours = Ours(SHAPE, model, scratch, group_a_call=True, checkpointing=False)
            found = passes(ours)
        else:
            side, found = stock(SHAPE, model, scratch, rows=1), {}
        side.step()
        resident = held() - libraries
    weights = float(sum(parameter.nbytes for parameter in side.model.parameters()))
    return {"weights": weights, **found, "held between two steps": resident}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("ours", "stock TRL"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where there is one, TRL takes it
    torch.set_num_threads(THREADS)
    if given.side:
        print(json.dumps(measured(given.side, unpack_model())))
        return 0
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}")
    print("\n| | | MiB | weights |\n|---|---|---|---|")
    figures: dict[str, Figures] = {}
    for side in ("ours", "stock TRL"):
        command = [sys.executable, "-m", "tests.bench.bench_reference", "--side", side]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        figures[side] = json.loads(said.splitlines()[-1])
        for name, found in figures[side].items():
            print(f"| {side} | {name} | {found / 2**20:,.0f} | {found / figures[side]['weights']:.2f} |", flush=True)
    ours = figures["ours"]
    return int(ours["what is left of it"] > STAYS * ours["weights"] and os.environ.get("CHECK") == "1")


if __name__ == "__main__":
    sys.exit(main())
