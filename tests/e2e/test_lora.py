"""LoRA: the adapter alone, or merged into the base; cut off and on two processes like any run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e import traces
from tests.e2e.runs import TINY_RUN, TWO_RANKS, Ended, Start, weights

pytestmark = pytest.mark.slow

STEPS = 40


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> tuple[str, ...]:
    lake = traces.write_hive(tmp_path_factory.mktemp("lake"), traces.learnable())
    return (
        "method=dpo",
        f"data.path={lake}",
        f"model.path={tiny}",
        "model.lora.enabled=true",
        "model.lora.rank=4",
        f"train.max_steps={STEPS}",
        "checkpoint.save_every=5",
        *TINY_RUN,
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, words: tuple[str, ...]) -> Ended:
    """Told to stop on the way, and started again."""
    start = Start(tmp_path_factory.mktemp("adapter"), words)
    with start.process() as process:
        start.wait_for_step(process, 3)
        process.send_signal(signal.SIGTERM)
        stopped = start.ended(process)
    assert stopped.code == 75, stopped.err
    assert stopped.last_word.startswith("entrypoint: stopped by a signal at step ")
    again = start.run()
    assert again.code == 0, again.err
    assert "resuming from" in again.out
    return again


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, words: tuple[str, ...]) -> Ended:
    """On two processes, straight through."""
    ended = Start(tmp_path_factory.mktemp("merged"), (*words, "model.lora.merge=true"), TWO_RANKS).run()
    assert ended.code == 0, ended.err
    return ended


def test_the_adapter_is_saved_alone(adapter: Ended, tiny: Path) -> None:
    names = {*adapter.record["files"]}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    saved = weights(adapter.output)
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)
    assert all(bool(tensor.any()) for tensor in saved.values())  # each B began as zero
    assert len(saved) == 2 * 7 * 2  # A and B, of seven linear layers, in two blocks


def test_the_merged_model_loads_by_itself_and_computes_what_base_and_adapter_do(
    adapter: Ended, merged: Ended, tiny: Path
) -> None:
    import torch
    from peft import PeftModel

    from tests.e2e.oracle import load

    assert not [name for name in merged.record["files"] if "adapter" in name]
    whole, both = load(merged.output), PeftModel.from_pretrained(load(tiny), adapter.output).eval()
    ids = torch.tensor([group["prompt_ids"][:8] for group in adapter.groups("held_out")])
    with torch.no_grad():
        assert torch.allclose(whole(ids).logits, both(ids).logits, atol=1e-4)
        assert not torch.allclose(whole(ids).logits, load(tiny)(ids).logits, atol=1e-2)


def test_an_interrupted_adapter_on_one_process_takes_the_course_of_a_straight_one_on_two(
    adapter: Ended, merged: Ended
) -> None:
    from tests.e2e.oracle import assert_same_course

    assert_same_course(adapter, merged)
    before, after = (adapter.record["metrics"][when] for when in ("before", "after"))
    assert after["margin"] > before["margin"] + 0.1
