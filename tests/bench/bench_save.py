"""Bench (d): how long training stands still for a checkpoint, against one that is waited for.

    python -m tests.bench.bench_save                 # 5 rounds, on a random model of 135M parameters with AdamW
    CHECK=1 python -m tests.bench.bench_save         # fails where a stall is more than a tenth of a whole save

Both sides write the same state to the same disk, fsynced, summed up and sealed; they take turns. While the
asynchronous one is written the model trains.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerState

from entrypoint.checkpoint import Checkpoints, Saved
from entrypoint.world import World

BAR = 0.1  # of a synchronous save
TOKENS = 128  # of a training step


def model() -> LlamaForCausalLM:
    """SmolLM2-135M's shape, random."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


class Bench:
    """One model in training, and its checkpoints in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.model = model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.state = TrainerState()
        self.saved: list[Saved] = []
        world = World(rank=0, size=1, store=None)
        self.checkpoints = Checkpoints(folder, keep=1, fingerprint={}, world=world, on_saved=self.saved.append)

    def step(self) -> float:
        """Seconds of a training step."""
        began = time.perf_counter()
        ids = torch.randint(49152, (1, TOKENS))
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        return time.perf_counter() - began

    def save(self) -> float:
        """Seconds that a save makes training wait."""
        began = time.perf_counter()
        self.checkpoints.save(self.model, self.optimizer, self.scheduler, self.state)
        return time.perf_counter() - began

    def wait(self) -> float:
        """Seconds until what was saved is complete."""
        began = time.perf_counter()
        self.checkpoints.wait()
        return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    given = parser.parse_args()
    times: dict[str, list[float]] = {"synchronous save": [], "stall of an asynchronous save": []}
    steps: dict[str, list[float]] = {"step, nothing written": [], "step, a checkpoint written beside it": []}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        bench = Bench(Path(folder))
        bench.step()
        first = bench.save()
        bench.wait()
        for _ in range(given.rounds):
            steps["step, nothing written"].append(bench.step())
            times["synchronous save"].append(bench.save() + bench.wait())
            bench.step()
            times["stall of an asynchronous save"].append(bench.save())
            before = len(bench.saved)
            while len(bench.saved) == before:
                steps["step, a checkpoint written beside it"].append(bench.step())
            bench.wait()
        size = bench.saved[-1].bytes
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}")
    print(f"a checkpoint of {size / 1e9:.2f} GB; the first stall, which allocates the copy, {first:.2f} s")
    for name, values in (times | steps).items():
        print(f"{name:<38} median {statistics.median(values):6.2f} s  ({min(values):.2f} to {max(values):.2f})")
    whole, stall = (statistics.median(values) for values in times.values())
    print(f"ratio {stall / whole:.3f}, at most {BAR}")
    return 1 if os.environ.get("CHECK") and stall > BAR * whole else 0


if __name__ == "__main__":
    sys.exit(main())
