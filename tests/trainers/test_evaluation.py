"""Held-out metrics with numbers derived by hand, and the same from any split over ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from entrypoint.conf import Data
from entrypoint.data.groups import Groups
from entrypoint.training.evaluation import evaluate, held_out
from entrypoint.world import World
from tests.trainers.builders import ALONE, GivenReference, scorer

GROUPS = [
    {"prompt_ids": [1, 2], "response_ids": [[3, 4], [5, 6, 7, 8]], "rewards": [0.9, 0.1]},
    {"prompt_ids": [1], "response_ids": [[3], [4], [5, 6]], "rewards": [0.8, 0.6, 0.2]},
]
POLICY = {3: -1.0, 4: -2.0, 5: -3.0, 6: -1.0, 7: -2.0, 8: -2.0}  # log-prob of a token, wherever it stands


def forward(**inputs: Any) -> Any:
    """A model whose log-probs are the table above; zero where nothing is labelled, as TRL's head gives them."""
    labels = inputs["labels"][:, 1:]
    table = torch.tensor([POLICY.get(i, 0.0) for i in range(10)])
    return SimpleNamespace(log_probs=torch.where(labels >= 0, table[labels.clamp(min=0)], 0.0))


def metrics(groups: Groups, reference: Any, *, budget: int = 100, world: World = ALONE) -> dict[str, float]:
    held = held_out(groups, Data(path=""), limit=10)
    return evaluate(scorer(forward, budget=budget, world=world), held, reference, beta=0.5)


def test_by_hand() -> None:
    """Pairs: (0, 1) of group 1 and (2, 4) of group 2; response 3 (reward 0.6) is neither chosen nor rejected.

    Mean log-prob a token: response 0: (-1 - 2) / 2 = -1.5; response 1: (-3 - 1 - 2 - 2) / 4 = -2;
    response 2: -1; response 4: (-3 - 1) / 2 = -2. Margins 0.5 and 1: accuracy 1, margin 0.75, good responses -1.25.
    The reference is the policy but for response 0, where it is -2 and -2: log ratio 1 and 0 by token, so
    1 - rho + rho log rho = 1 - e + e = 1 and 0: KL = 1 / 9 tokens.
    Rewards (beta 0.5): 0.5 x 1 for response 0, else 0: accuracies 1/2 (a tie is not a win there), margins 0.25.
    """
    reference = GivenReference(
        {r: np.array(own, np.float32) for r, own in {0: [-2, -2], 1: [-3, -1, -2, -2], 2: [-1], 4: [-3, -1]}.items()}
    )
    found = metrics(Groups.from_lists(GROUPS), reference)
    assert found == pytest.approx(
        {
            "accuracy": 1.0,
            "margin": 0.75,
            "logp_chosen": -1.25,
            "kl": 1 / 9,
            "rewards/accuracies": 0.5,
            "rewards/margins": 0.25,
        }
    )


def test_the_token_budget_changes_nothing() -> None:
    groups = Groups.from_lists(GROUPS)
    reference = GivenReference({r: np.full(n, -1.5, np.float32) for r, n in enumerate(groups.response_lengths)})
    assert metrics(groups, reference, budget=1) == metrics(groups, reference, budget=1000)


def test_a_tie_counts_half() -> None:
    rows = [{"prompt_ids": [1], "response_ids": [[3, 4], [4, 3]], "rewards": [0.9, 0.1]}]
    reference = GivenReference({0: np.zeros(2, np.float32), 1: np.zeros(2, np.float32)})
    assert metrics(Groups.from_lists(rows), reference)["accuracy"] == 0.5


def test_held_out_pairs_are_dpos_default_and_the_first_by_hash() -> None:
    rows = [
        {"prompt_ids": [1], "response_ids": [[2], [3], [4], [5]], "rewards": [0.9, 0.8, 0.2, 0.1]},
        {"prompt_ids": [1], "response_ids": [[2], [3]], "rewards": [0.7, 0.4999]},
        {"prompt_ids": [1], "response_ids": [[2], [3]], "rewards": [0.6999, 0.1]},
    ]
    held = held_out(Groups.from_lists(rows), Data(path=""), limit=3)
    # best with worst, second best with second worst; 0.7 is chosen and 0.4999 rejected; 0.6999 is not chosen
    assert list(zip(held.chosen, held.rejected, strict=True)) == [(0, 3), (1, 2), (4, 5)]
    assert len(held_out(Groups.from_lists(rows), Data(path=""), limit=1)) == 1


def test_nothing_held_out_is_no_pair(tmp_path: Path) -> None:
    assert len(held_out(Groups.from_lists([]), Data(path=""), limit=5)) == 0
