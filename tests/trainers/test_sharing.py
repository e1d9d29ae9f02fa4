"""Sharing is really used: a step's forward passes compute the tokens that its sampler counted, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from entrypoint.conf import Dpo, Grpo
from tests.trainers.builders import make_run, make_trainer
from tests.trainers.sample_groups import ragged_groups


@pytest.mark.parametrize("method", [Grpo(), Dpo()], ids=["grpo", "dpo"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("wish", ["auto", "never"])
def test_a_step_computes_what_was_counted(
    method: Grpo | Dpo, lora: bool, wish: str, tiny: Path, tmp_path: Path
) -> None:
    run = make_run(method, tmp_path, lora=lora, max_steps=2, batch_size=4, share_prompts=wish)
    trainer, plan = make_trainer(run, tiny, ragged_groups(8))
    bare: Any = trainer.model.get_base_model() if lora else trainer.model
    seen: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:  # the reference is scored in the other mode
            seen.append(kwargs["input_ids"].numel())

    bare.base_model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    micro_batches = [micro for step in plan.sampler.steps(0)[:2] for micro in plan.sampler.micro_batches(step)[0]]
    wanted = sum(plan.sampler.cost.of(list(micro.responses)) for micro in micro_batches)
    if wish == "auto":  # a response's last token predicts nothing and is not computed
        wanted -= sum(len(set(micro.responses)) for micro in micro_batches)
    assert sum(seen) == wanted
    assert len(seen) == len(micro_batches)
