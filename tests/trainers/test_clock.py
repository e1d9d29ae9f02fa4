"""Throughput by hand, and phases that follow each other."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from entrypoint.training import clock
from entrypoint.training.batches import Step
from entrypoint.training.clock import Clock, throughput

STEPS = [
    Step(sequences=4, tokens=20, length=30.0, computed=100, distinct=80, stock=160, imbalance=1.5),
    Step(sequences=4, tokens=20, length=30.0, computed=60, distinct=60, stock=160, imbalance=1.0),
]
SPENT = {"data": 1.0, "forward": 2.0, "backward": 3.0, "optimizer": 1.0, "checkpoint": 3.0}


def test_throughput_by_hand() -> None:
    """140 distinct of 160 computed tokens in 7 s of step time; 10 s in all."""
    found = throughput(SPENT, STEPS, LlamaConfig(), bf16=False, world_size=1)
    assert found == pytest.approx(
        {
            "tokens/distinct": 70.0,
            "tokens/stock": 160.0,
            "tokens/padding": 20 / 160,
            "tokens/imbalance": 1.25,
            "speed/distinct_tokens_per_second": 20.0,
            "time/data": 0.1,
            "time/forward": 0.2,
            "time/backward": 0.3,
            "time/optimizer": 0.1,
            "time/checkpoint": 0.3,
        }
    )


def test_utilisation_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        hidden_size=8,
        num_hidden_layers=1,
        vocab_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=4,
    )
    # TRL's count for rows of 30: projections 2 x 8 x 24 + 2 x 64, scores 4 x 8 x 30, MLP 6 x 8 x 4, head 2 x 16 x 8;
    # backward twice that
    operations = 3 * (384 + 128 + 960 + 192 + 256)
    monkeypatch.setattr(clock, "_peak", lambda bf16: 1000.0)
    found = throughput(SPENT, STEPS, config, bf16=True, world_size=2)
    assert found["speed/mfu"] == pytest.approx(operations * 20 / 2000)
    # An architecture that TRL can't count by is reported without it
    assert "speed/mfu" not in throughput(SPENT, STEPS, MixtralConfig(), bf16=True, world_size=2)


def test_a_phase_lasts_until_the_next_begins_and_over_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.count(0.0, 1.0)  # a second between two looks at the clock
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    ticking = Clock(torch.device("cpu"))
    assert ticking.read() == {}
    for phase in ("data", "forward", "backward", "forward", "backward", "other"):
        ticking.enter(phase)
    assert ticking.read() == {"data": 1, "forward": 2, "backward": 2, "other": 1}
    ticking.enter("data")
    assert ticking.read() == {"other": 1, "data": 1}
