"""World size and token budget never change the maths, and a resumed run is the straight run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.train_rank import LEAST, run_ranks

STRAIGHT = {
    1: ["grpo-1:grpo:grpo:300", "grpo-1-small:grpo:grpo:70", "dapo-1:grpo:dapo:300", "dpo-1:dpo:sigmoid:300",
        "lora-1:dpo:ipo:300:lora"],
    2: ["grpo-2:grpo:grpo:200", "dapo-2:grpo:dapo:150", "dpo-2:dpo:sigmoid:120", "lora-2:dpo:ipo:200:lora",
        "auto-2:grpo:grpo:auto", "auto-full-2:grpo:grpo:auto:full", "auto-lora-2:dpo:ipo:auto:lora"],
    3: ["grpo-3:grpo:grpo:100", "dapo-3:grpo:dapo:300", "dpo-3:dpo:sigmoid:300"],
}  # fmt: skip
ALIKE = [
    ("grpo-1", "grpo-1-small"), ("grpo-1", "grpo-2"), ("grpo-1", "grpo-3"),
    ("dapo-1", "dapo-2"), ("dapo-1", "dapo-3"), ("dpo-1", "dpo-2"), ("dpo-1", "dpo-3"), ("lora-1", "lora-2"),
    ("grpo-1", "fsdp-grpo-2"), ("dpo-1", "fsdp-dpo-2"),
    ("grpo-1", "auto-2"), ("grpo-1", "auto-full-2"), ("lora-1", "auto-lora-2"), ("grpo-1", "fsdp-auto-2"),
]  # fmt: skip
RESUMED = [  # resumed run, straight run, tolerance
    ("grpo-1-again", "grpo-1", 0.0), ("dpo-1-again", "dpo-1", 0.0), ("lora-1-again", "lora-1", 0.0),
    ("grpo-1-to-2", "grpo-1", 1e-5), ("grpo-2-to-1", "grpo-1", 1e-5), ("dpo-2-to-1", "dpo-1", 1e-5),
    ("grpo-2-to-3", "grpo-1", 1e-5), ("fsdp-2-to-3", "grpo-1", 1e-5),
    ("fsdp-2-again", "fsdp-grpo-2", 0.0), ("fsdp-2-to-1", "grpo-1", 1e-5),
]  # fmt: skip


def launch(world: int, tiny: Path, out: Path, cases: Sequence[str]) -> None:
    """`world` ranks that train the cases one after the other."""
    ranks = run_ranks(world, tiny, out, cases)
    assert [code for code, _ in ranks] == [0] * world, "\n".join(text[-3000:] for _, text in ranks)


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every step of every run did."""
    out = tmp_path_factory.mktemp("runs")

    def step_4(name: str, world: int) -> str:
        return f"from={out / f'{name}-{world}' / 'step-00000004'}"

    launch(1, tiny, out, STRAIGHT[1])
    launch(2, tiny, out, [*STRAIGHT[2], f"grpo-1-to-2:grpo:grpo:150:{step_4('grpo-1', 1)}"])
    launch(3, tiny, out, [*STRAIGHT[3], f"grpo-2-to-3:grpo:grpo:100:{step_4('grpo-2', 2)}"])
    sharded = ["fsdp-grpo-2:grpo:grpo:200:fsdp", "fsdp-dpo-2:dpo:sigmoid:200:fsdp", "fsdp-auto-2:grpo:grpo:auto:fsdp"]
    launch(2, tiny, out, sharded)
    launch(2, tiny, out, ["fsdp-bf16-dpo:dpo:sigmoid:200:fsdp:bf16", "fsdp-bf16-grpo:grpo:grpo:200:fsdp:bf16"])
    launch(2, tiny, out, [f"fsdp-2-again:grpo:grpo:200:fsdp:{step_4('fsdp-grpo-2', 2)}"])
    launch(3, tiny, out, [f"fsdp-2-to-3:grpo:grpo:100:fsdp:{step_4('fsdp-grpo-2', 2)}"])
    launch(
        1,
        tiny,
        out,
        [
            f"grpo-1-again:grpo:grpo:300:{step_4('grpo-1', 1)}",
            f"dpo-1-again:dpo:sigmoid:300:{step_4('dpo-1', 1)}",
            f"lora-1-again:dpo:ipo:300:lora:{step_4('lora-1', 1)}",
            f"grpo-2-to-1:grpo:grpo:90:{step_4('grpo-2', 2)}",
            f"dpo-2-to-1:dpo:sigmoid:90:{step_4('dpo-2', 2)}",
            f"fsdp-2-to-1:grpo:grpo:90:{step_4('fsdp-grpo-2', 2)}",
        ],
    )
    return {path.stem: torch.load(path, weights_only=True) for path in out.glob("*.pt")}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_gradient_update_and_metrics_do_not_depend_on_the_world(runs: dict[str, Any], one: str, other: str) -> None:
    a, b = runs[one], runs[other]
    assert len(a["gradients"]) == len(b["gradients"]) == 8
    for step, (x, y) in enumerate(zip(a["gradients"], b["gradients"], strict=True)):
        assert relative(y, x) < 1e-5, f"gradient of step {step + 1}"
    assert relative(b["weights"][-1] - b["weights"][0], a["weights"][-1] - a["weights"][0]) < 1e-3
    for x, y in zip(a["logs"], b["logs"], strict=True):
        assert x.keys() == y.keys()
        for name in (name for name in x if not name.startswith(("tokens/", "speed/", "time/"))):
            assert y[name] == pytest.approx(x[name], rel=1e-4, abs=2e-5), f"{name} at step {x['step']}"


def test_a_budget_that_is_found_is_every_ranks(runs: dict[str, Any]) -> None:
    """Where all fits, all that a rank has in a step; where one rank has no room, the least, for both."""
    assert runs["auto-full-2"]["budgets"] == [LEAST, LEAST]
    for name in ("auto-2", "auto-lora-2", "fsdp-auto-2"):
        first, second = runs[name]["budgets"]
        assert first == second > 2 * LEAST, f"{name} has not tried twice"


@pytest.mark.parametrize("name", ["grpo-1", "dpo-1", "lora-1", "fsdp-grpo-2"])
def test_every_trainable_weight_moves(runs: dict[str, Any], name: str) -> None:
    first, last = runs[name]["weights"][0], runs[name]["weights"][-1]
    moved = (first != last).float().mean()
    # An embedding of a token that no trace holds has no gradient, nor has a LoRA A before B has moved.
    assert moved > 0.85


def test_sharded_bf16_starts_where_the_reference_is(runs: dict[str, Any]) -> None:
    """The policy is the reference at step 1, in whatever precision: DPO's loss is log 2 and GRPO's KL nothing."""
    dpo, grpo = runs["fsdp-bf16-dpo"]["logs"][0], runs["fsdp-bf16-grpo"]["logs"][0]
    assert dpo["loss"] == pytest.approx(0.693147, abs=1e-3)
    assert dpo["rewards/margins"] == pytest.approx(0, abs=2e-3)
    assert grpo["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_sharded_bf16_is_near_fp32(runs: dict[str, Any], kind: str) -> None:
    gradient = runs[f"fsdp-bf16-{kind}"]["gradients"][0]
    assert relative(gradient, runs[f"{kind}-1"]["gradients"][0]) < 0.05


@pytest.mark.parametrize(("resumed", "straight", "tolerance"), RESUMED)
def test_a_resumed_run_is_the_straight_run(runs: dict[str, Any], resumed: str, straight: str, tolerance: float) -> None:
    a, b = runs[straight], runs[resumed]
    assert len(b["gradients"]) == 4  # steps 5 to 8: from the second epoch's middle on
    for x, y in zip(a["logs"][4:], b["logs"][-4:], strict=True):
        assert y["step"] == x["step"]
        for name in ("loss", "grad_norm", "learning_rate"):
            assert y[name] == pytest.approx(x[name], rel=tolerance, abs=tolerance), f"{name} at step {x['step']}"
    if tolerance == 0.0:
        assert torch.equal(a["weights"][-1], b["weights"][-1])
    else:
        assert relative(b["weights"][-1] - b["weights"][0], a["weights"][-1] - a["weights"][4]) < 1e-3


def test_a_tiny_learning_rate_moves_fp32_weights(tiny: Path, tmp_path: Path) -> None:
    """At 5e-7, DPO's default, a bf16 weight of 0.1 would need a step of 2e-4 to move; fp32 weights do."""
    from entrypoint.conf import Dpo
    from tests.trainers.builders import make_run, make_trainer
    from tests.trainers.sample_groups import ragged_groups

    trainer, _ = make_trainer(make_run(Dpo(), tmp_path, learning_rate=5e-7, max_steps=2), tiny, ragged_groups(8))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, before[name]), name
        change = (parameter - before[name]).abs().max()
        assert change < 2**-8 * before[name].abs().median(), f"{name} would have moved in bf16 too"
