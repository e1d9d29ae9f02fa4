"""Which rows a run learns from, and whose log-probs it takes for the behaviour policy's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e import traces
from tests.e2e.runs import TINY_RUN, Ended, run

pytestmark = pytest.mark.slow

RECORDED = -5.5  # nats of each recorded token
PROMPTS = 6


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Ended:
    """One run with every key that chooses rows. Of each prompt's four answers two are above the threshold."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    folder = tmp_path_factory.mktemp("chosen")
    kept = [one for number in range(PROMPTS) for one in traces.group(traces.text(number), number)]
    for number, one in enumerate(kept):
        ids = tokenizer(one["output"]).input_ids
        one |= {"token_ids": ids, "token_logps": [RECORDED] * len(ids)}  # without the end-of-sequence, as many log it
        if number % 4 == 1:  # the second-best answer of each prompt: other tokens than the tokenizer's
            one["token_ids"] = [*ids[:-1], ids[-1] + 1]
    others = [
        *(one | {"timestamp": one["timestamp"].replace(day=13)} for one in kept[:3]),
        *(one | {"timestamp": one["timestamp"].replace(day=16)} for one in kept[:2]),
        *(one | {"model": "larger"} for one in kept[:5]),
        *(one | {"user_consent": False} for one in kept[:7]),
    ]
    traces.write_hive(folder / "lake", [*kept, *others])
    ended = run(
        folder,
        "method=grpo",
        f"data.path={folder / 'lake'}/**/*.parquet",
        f"model.path={tiny}",
        "data.date_from=2026-03-14",
        "data.date_to=2026-03-15",
        "data.models=[base,other]",
        "data.behaviour_model=other",
        "data.threshold_scope=row",
        "data.logprobs_column=token_logps",
        "data.token_ids_column=token_ids",
        *TINY_RUN,
        "data.held_out_share=0",
        "train.max_steps=2",
        "train.batch_size=32",
    )
    assert ended.code == 0, ended.err
    return ended


def test_rows_are_chosen_by_date_model_consent_and_reward(chosen: Ended) -> None:
    counts = chosen.record["counts"]
    assert counts["dropped"] == {
        "OTHER_DATE": 3 + 2,
        "OTHER_MODEL": 5,
        "NO_CONSENT": 7,
        "BELOW_THRESHOLD": 2 * PROMPTS,
    }
    assert (counts["train_groups"], counts["train_rows"]) == (PROMPTS, 2 * PROMPTS)
    assert (counts["held_out_groups"], counts["held_out_rows"]) == (0, 0)
    assert counts["models"] == {"base": 2 * PROMPTS}


def test_what_is_seldom_meant_is_warned_of(chosen: Ended) -> None:
    warnings = [line for line in chosen.err.splitlines() if line.startswith("entrypoint: warning: ")]
    for words in (
        "data.threshold_scope=row takes the contrast out of the groups",
        "data.held_out_share=0: nothing is held out",
        f"{2 * PROMPTS} rows were not sampled by data.behaviour_model=other",
        f"{PROMPTS} rows have recorded log-probs of other tokens than the tokenizer's",
    ):
        assert len([line for line in warnings if words in line]) == 1, (words, warnings)


def test_without_held_out_prompts_there_are_no_figures_before_and_after(chosen: Ended) -> None:
    assert chosen.record["metrics"] == {"before": {}, "after": {}}


def test_recorded_log_probs_stand_in_the_ratio_where_their_tokens_are_the_same(chosen: Ended, tiny: Path) -> None:
    """Step 1 holds all groups: its ratio is the mean over tokens of exp(base's - recorded), or 1 where none counts."""
    from tests.e2e.oracle import load, log_probs

    counts = chosen.record["counts"]
    assert (counts["logps_used"], counts["logps_differ"]) == (PROMPTS, PROMPTS)
    base, ratios = load(tiny), []
    for group in chosen.groups("train"):
        best, second = (log_probs(base, group["prompt_ids"], response) for response in group["response_ids"])
        ratios += [*np.exp(best[:-1] - RECORDED), 1.0]  # no log-prob was recorded of the end-of-sequence
        ratios += [1.0] * len(second)
    assert chosen.curve("ratio")[1] == pytest.approx(float(np.mean(ratios)), rel=1e-4)
    assert chosen.curve("ratio_max")[1] == pytest.approx(max(ratios), rel=1e-4)
    assert abs(float(np.mean(ratios)) - 1) > 0.01
    assert chosen.curve("clip_ratio/region_mean")[1] > 0
    assert chosen.curve("kl")[1] == pytest.approx(0, abs=1e-6)  # the KL is to the base model all the same
