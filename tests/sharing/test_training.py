"""Whole training runs with prompts shared and not: the same curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from entrypoint.conf import Dpo, Grpo
from tests.trainers.builders import make_run, make_trainer
from tests.trainers.sample_groups import ragged_groups

CURVES = ("loss", "grad_norm")


def trained(method: Grpo | Dpo, tiny: Path, folder: Path, wish: str, **options: Any) -> tuple[list[Any], int]:
    """What every step logged, and the tokens that training computed."""
    run = make_run(method, folder / wish, share_prompts=wish, save_every=1000, **options)
    trainer, _ = make_trainer(run, tiny, ragged_groups(12, logged=isinstance(method, Grpo)))
    assert (trainer.shared is not None) == (wish != "never")
    bare = trainer.model.get_base_model() if run.model.lora.enabled else trainer.model
    tokens = 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal tokens
        tokens += kwargs["input_ids"].numel() if module.training else 0

    bare.base_model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert bare.is_activation_checkpointing == (options.get("gradient_checkpointing") == "always")
    return [entry for entry in trainer.state.log_history if "loss" in entry], tokens


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("method", [Grpo(), Dpo()], ids=["grpo", "dpo"])
def test_fifty_steps_have_the_same_curves(method: Grpo | Dpo, lora: bool, tiny: Path, tmp_path: Path) -> None:
    options = {"lora": lora, "max_steps": 50, "learning_rate": 5e-3 if lora else 1e-3}
    plain, padded = trained(method, tiny, tmp_path, "never", **options)
    found, distinct = trained(method, tiny, tmp_path, "auto", **options)
    assert len(found) == len(plain) == 50
    for name in CURVES:
        worst = max(abs(a[name] - b[name]) for a, b in zip(found, plain, strict=True))
        assert worst < 1e-4, name
        assert max(entry[name] for entry in plain) - min(entry[name] for entry in plain) > 0.1, "nothing was learned"
    assert distinct < 0.7 * padded


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("method", [Grpo(), Dpo()], ids=["grpo", "dpo"])
def test_with_checkpointing_too(method: Grpo | Dpo, lora: bool, tiny: Path, tmp_path: Path) -> None:
    options = {"lora": lora, "gradient_checkpointing": "always"}
    plain, _ = trained(method, tiny, tmp_path, "never", **options)
    found, _ = trained(method, tiny, tmp_path, "auto", **options)
    assert len(plain) == 8
    for a, b in zip(found, plain, strict=True):
        assert a.keys() == b.keys()
        for name in CURVES:
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), f"{name} at step {b['step']}"
