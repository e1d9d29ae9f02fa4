"""Reference log-probs: the model's own, computed once, kept, and completed after an interruption."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from entrypoint.data.groups import Groups
from entrypoint.errors import DataError, StoppedError
from entrypoint.training import reference as reference_module
from entrypoint.training.reference import ReferenceLogProbs
from entrypoint.watch import NOTHING, STOP
from entrypoint.world import World
from tests.trainers.builders import scorer
from tests.trainers.sample_groups import ragged_groups


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    add_fused_lm_head(model)
    return model


def compute(reference: ReferenceLogProbs, forward: Any, groups: Groups, responses: Any, *, budget: int = 100) -> int:
    return reference.compute(scorer(forward, budget=budget), groups, np.asarray(responses))


def test_they_are_the_plain_models_log_softmax(model: Any, tmp_path: Path) -> None:
    groups = ragged_groups(4)
    reference = ReferenceLogProbs(tmp_path)
    assert compute(reference, model, groups, range(groups.offsets[-1])) == groups.offsets[-1]
    flat = 0
    for group in groups:
        for response in group.response_ids:
            ids = torch.tensor(np.concatenate([group.prompt_ids, response]).astype(np.int64))
            with torch.no_grad():
                scores = model(ids[None]).logits[0].log_softmax(-1)
            start = len(group.prompt_ids)
            wanted = scores[start - 1 : -1].gather(-1, ids[start:, None])[:, 0]
            assert reference[flat] == pytest.approx(wanted.numpy(), abs=1e-5)
            assert len(reference[flat]) == len(response)
            flat += 1


def test_what_is_there_is_not_computed_again(model: Any, tmp_path: Path) -> None:
    groups = ragged_groups(4)
    assert compute(ReferenceLogProbs(tmp_path), model, groups, [0, 3, 5]) == 3
    again = ReferenceLogProbs(tmp_path)  # another process, later
    first = again[3].copy()
    assert again.missing(np.array([0, 1, 3, 5, 7])).tolist() == [1, 7]
    assert compute(again, model, groups, [0, 1, 3, 5, 7]) == 2
    assert (again[3] == first).all()
    with pytest.raises(KeyError):
        again[2]


def test_an_interrupted_pass_goes_on_where_it_stopped(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = ragged_groups(6)
    monkeypatch.setattr(reference_module, "BLOCK", 4)
    calls = []

    def dying(**inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model(**inputs)

    responses = range(int(groups.offsets[-1]))
    with pytest.raises(KeyboardInterrupt):
        compute(ReferenceLogProbs(tmp_path), dying, groups, responses, budget=1000)
    (tmp_path / ".part-half-written.arrow.1").write_bytes(b"torn")  # what a kill during a write leaves
    rest = ReferenceLogProbs(tmp_path)
    assert compute(rest, model, groups, responses, budget=1000) == len(responses) - 8
    assert not len(rest.missing(np.array(responses)))


def test_a_pass_that_is_told_to_stop_keeps_what_it_has_and_ends_with_the_same_bits(model: Any, tmp_path: Path) -> None:
    """In the middle of a block: the later pass makes the calls that are missing, each as it would have been."""
    groups = ragged_groups(6)
    responses = range(int(groups.offsets[-1]))
    straight = ReferenceLogProbs(tmp_path / "straight")
    compute(straight, model, groups, responses)
    world, calls = World(rank=0, size=1, store=None), []

    def told(**inputs: Any) -> Any:
        calls.append(1)
        world.watch.take(STOP if len(calls) == 3 else NOTHING)
        return model(**inputs)

    stopped = ReferenceLogProbs(tmp_path / "stopped")
    with pytest.raises(StoppedError, match="told to stop while scoring responses; start the same command again"):
        stopped.compute(scorer(told, budget=100, world=world), groups, np.asarray(responses))
    assert len(calls) == 3
    again = ReferenceLogProbs(tmp_path / "stopped")
    missing = len(again.missing(np.array(responses)))
    assert 0 < missing < len(responses)
    assert compute(again, model, groups, responses) == missing
    assert all((again[response] == straight[response]).all() for response in responses)


def test_a_disk_that_takes_no_part_ends_the_run_with_its_reason(model: Any, tmp_path: Path) -> None:
    groups = ragged_groups(1)
    (tmp_path / f".part-{0:012d}-{0:012d}-1.arrow.{os.getpid()}").mkdir()  # in the way
    with pytest.raises(DataError, match="Is a directory"):
        compute(ReferenceLogProbs(tmp_path), model, groups, [0])
