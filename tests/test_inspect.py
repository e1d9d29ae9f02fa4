"""What inspection says of traces whose numbers are derived by hand, and how it refuses what it can't read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from entrypoint.conf import Data, Dpo, DpoTrain, GrpoTrain, Model, Run, Train
from entrypoint.data.prepare import prepare
from entrypoint.data.report import NoGroupLeft
from entrypoint.data.tokens import load_tokenizer
from entrypoint.errors import EXIT_DONE, EXIT_REFUSED, DataError
from entrypoint.inspect import inspect
from entrypoint.inspection import advice, lengths
from entrypoint.inspection.text import text
from tests.data.traces import group, row, write
from tests.process import ROOT, run_entrypoint, scrubbed
from tests.servers.s3 import S3Server

Report = dict[str, Any]
SHIPPED = ROOT / "entrypoint/demo/traces"

# Five prompts, twelve responses: four, two and three of them usable, a tie, and one response alone.
FIVE = [
    *group("A", 0.9, 0.7, 0.4, 0.2),
    *group("B", 0.8, 0.3),
    *group("C", 0.6, 0.58, 0.1),
    *group("D", 0.9, 0.9),
    *group("E", 0.5),
]


def report(folder: Path, rows: Iterable[Mapping[str, Any]], *, run: Run | None = None, **data: Any) -> Report:
    """The report on `rows`, with nothing held out unless a test says so."""
    write(folder / "lake/part.parquet", rows)
    run = run or Run()
    run.data = Data(path=str(folder / "lake"), **({"held_out_share": 0.0} | data))
    return inspect(run)


def run_inspect(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return run_entrypoint(*args, module="entrypoint.inspect", **options)


def near(value: float) -> Any:
    return pytest.approx(value, abs=2e-6)  # reports hold six digits


def test_groups_and_how_far_their_rewards_are_apart(tmp_path: Path) -> None:
    """Sizes 4, 2, 3, 2, 1: median 2, mean 12/5. Deviations, with n − 1, of the prompts with two responses and more:

    A: mean 0.55, squares 2·0.35² + 2·0.15² = 0.29,        std √(0.29/3)        = 0.310913
    B: mean 0.55, squares 2·0.25² = 0.125,                 std √0.125           = 0.353553
    C: mean 0.426667, squares 0.030044+0.023511+0.106711,  std √(0.160267/2)    = 0.283078
    D: 0, which is the one of four without spread          their mean           = 0.236886
    """
    found = report(tmp_path, FIVE)["groups"]
    assert found["prompts"] == 5
    assert found["usable"] == 3
    assert found["sizes"] == {"min": 1, "median": 2, "mean": 2.4, "max": 4}
    assert found["histogram"] == {"1": 1, "2": 2, "3-4": 2, "5-8": 0, "9-16": 0, "17+": 0}
    assert found["mean_std"] == near(0.236886)
    assert found["without_spread"] == 0.25


def test_the_distribution_of_rewards(tmp_path: Path) -> None:
    """Sorted: .1 .2 .3 .4 .5 .58 .6 .7 .8 .9 .9 .9, sum 6.88. Quantile q lies at place 11 q, counted from 0:

    p5 0.55: .1+.55·.1 = .155; p25 2.75: .3+.75·.1 = .375; p50 5.5: .59; p75 8.25: .8+.25·.1 = .825; p95 10.45: .9.
    Five are at least 0.7 and four below 0.5.
    """
    found = report(tmp_path, FIVE)["rewards"]
    assert found["mean"] == near(6.88 / 12)
    assert found["quantiles"] == {"p5": 0.155, "p25": 0.375, "p50": 0.59, "p75": 0.825, "p95": 0.9}
    assert found["chosen"] == near(5 / 12)
    assert found["rejected"] == near(4 / 12)


def test_pairs_by_each_rule(tmp_path: Path) -> None:
    """A has two good and two bad responses, B one of each, C no good one; D and E can't be used.

    ranked: 2 + 1; all: 2·2 + 1; best_worst: 1 + 1. At most three a prompt: 2 + 1, 3 + 1, 1 + 1.
    """
    found = report(tmp_path, FIVE)["pairs"]
    assert (found["prompts"], found["share"], found["per_prompt"]) == (2, near(2 / 3), 4)
    assert found["by_pairing"] == {"ranked": 3, "all": 5, "best_worst": 2}
    three = report(tmp_path, FIVE, run=Run(method=Dpo(pairs_per_prompt=3), train=DpoTrain()))["pairs"]
    assert three["by_pairing"] == {"ranked": 3, "all": 4, "best_worst": 2}


def test_near_ties_and_different_rewards(tmp_path: Path) -> None:
    """Neighbours of usable prompts differ by .2 .3 .2 (A), .5 (B), .02 .48 (C): one of six is below 0.05.

    In steps of 0.05 A has rewards 18, 14, 8, 4, B 16, 6 and C 12, 11, 2: the median of 4, 2, 3 is 3.
    0.35 and 0.3 are no near-tie, though 0.35 − 0.3 < 0.05 in binary fractions.
    """
    found = report(tmp_path, FIVE)["noise"]
    assert found["near_ties"] == near(1 / 6)
    assert found["levels"] == 3
    assert report(tmp_path, group("F", 0.6, 0.35, 0.3))["noise"]["near_ties"] == 0


def test_two_scores_against_each_other(tmp_path: Path) -> None:
    """A's six pairs are ordered by both scores, the first one differently; in B ragas_reward has a tie: no order.

    Means 3.2/6 and 3.1/6; Σrj = 2.05, so covariance 2.05 − 6·.533333·.516667 = .396667; squares
    2.08 − 6·.533333² = .373333 and 2.37 − 6·.516667² = .768333: correlation .396667/√(.373333·.768333) = .740632.
    Differences .1 .1 0 .1 .4 .4 have the mean 1.1/6. A null, NaN or infinite score is none.
    """
    scores: dict[str, list[tuple[float | None, float]]] = {
        "A": [(0.9, 0.8), (0.8, 0.9), (0.3, 0.3), (0.2, 0.1)],
        "B": [(0.5, 0.9), (0.5, 0.1)],
        "C": [(None, 0.1), (0.2, float("nan")), (float("inf"), 0.3)],
    }
    rows = [dict(entry, ragas_reward=None, judge_score=None) for entry in FIVE]
    for prompt, pairs in scores.items():
        mine = [entry for entry in rows if entry["input"] == prompt]
        for entry, (ragas, judge) in zip(mine, pairs, strict=True):
            entry |= {"ragas_reward": ragas, "judge_score": judge}
    found = report(tmp_path, rows)["noise"]
    assert (found["scored"], found["ordered_pairs"]) == (6, 6)
    assert found["disordered"] == near(1 / 6)
    assert found["correlation"] == near(0.740632)
    assert found["mean_difference"] == near(1.1 / 6)


def test_scores_on_another_scale_have_no_difference_but_an_order(tmp_path: Path) -> None:
    """A judge that gives 1 to 5 points: the mean of |0.9 − 5| would say nothing."""
    rows = [entry | {"ragas_reward": entry["final_reward"], "judge_score": 5 * entry["final_reward"]} for entry in FIVE]
    found = report(tmp_path, rows)["noise"]
    assert (found["mean_difference"], found["correlation"], found["disordered"]) == (None, 1.0, 0.0)
    assert found["ordered_pairs"] == 6 + 1 + 3  # of A, B and C


def test_scores_of_a_type_that_training_never_reads_are_none(tmp_path: Path) -> None:
    rows = [entry | {"ragas_reward": "good", "judge_score": True, "token_count": "7"} for entry in FIVE]
    found = report(tmp_path, rows)
    assert (found["noise"]["scored"], found["noise"]["correlation"]) == (0, None)
    assert found["tokens"]["source"] == "bytes"


def test_copies_with_other_rewards(tmp_path: Path) -> None:
    """A's first response three times: 0.9, 0.8, 0.7, their mean 0.8; its second 0.7, 0.68; B's first twice."""
    copies = [
        row("A", "answer 0", 0.8),
        row("A", "answer 0", 0.7),
        row("A", "answer 1", 0.68),
        row("B", "answer 0", 0.8),
    ]
    found = report(tmp_path, [*FIVE, *copies])
    assert (found["noise"]["duplicated"], found["noise"]["conflicting"], found["noise"]["far_apart"]) == (3, 2, 1)
    assert found["rows"]["dropped"]["DUPLICATE"] == 4
    assert found["rows"]["conflicting"] == 2
    assert found["rewards"]["mean"] == near((6.88 - 0.1 - 0.01) / 12)


def test_length_bias_overall_and_within_prompts(tmp_path: Path) -> None:
    """Lengths 10, 20 | 30, 40 and rewards .2, .6 | .9, .5.

    Overall: deviations −15 −5 5 15 and −.35 .05 .35 −.05: products 5.25 − .25 + 1.75 − .75 = 6; squares 500 and
    .25: 6/√125 = .536656. Within: −5 5 | −5 5 and −.2 .2 | .2 −.2: products 1 + 1 − 1 − 1 = 0.
    """
    sizes = {"P": [(10, 0.2), (20, 0.6)], "Q": [(30, 0.9), (40, 0.5)]}
    rows = [row(prompt, "x" * size, reward) for prompt, found in sizes.items() for size, reward in found]
    assert report(tmp_path, rows)["length_bias"] == {"overall": near(0.536656), "within_prompts": 0}
    equal = [row("P", "abc", 0.2), row("P", "xyz", 0.9)]
    assert report(tmp_path, equal)["length_bias"] == {"overall": None, "within_prompts": None}


def test_tokens_without_a_model_are_estimated_from_bytes(tmp_path: Path) -> None:
    """Four bytes a token, rounded up: prompt 8 bytes, 2 tokens; responses 4, 5 and 401 bytes, 1, 2 and 101 tokens.

    Mean 104/3, median 2, p95 2 + .9·99 = 91.1. One of three is over 100 with its prompt; nothing is dropped for it.
    """
    rows = [row("8 bytes!", "x" * size, reward) for size, reward in ((4, 0.9), (5, 0.4), (401, 0.1))]
    found = report(tmp_path, rows, run=Run(train=GrpoTrain(max_length=100)))
    tokens = found["tokens"]
    assert (tokens["source"], tokens["complete"], tokens["responses"]) == ("bytes", True, 3)
    assert tokens["prompt"] == {"mean": 2, "median": 2, "p95": 2, "max": 2}
    assert tokens["response"] == {"mean": near(104 / 3), "median": 2, "p95": near(91.1), "max": 101}
    assert tokens["over_max_length"] == near(1 / 3)
    assert tokens["response_per_prompt"] == near(104 / 6)
    assert found["rows"]["train_rows"] == 3


def test_tokens_from_the_column_token_count(tmp_path: Path) -> None:
    """Counted: 10 + 20 bytes in 5 + 5 tokens, 3 bytes a token: the response of 7 bytes has 3, so has the prompt."""
    rows = [row("8 bytes!", "x" * size, size / 20, token_count=count) for size, count in ((10, 5), (20, 5), (7, None))]
    tokens = report(tmp_path, rows)["tokens"]
    assert tokens["source"] == "token_count"
    assert (tokens["prompt"]["max"], tokens["response"]["mean"]) == (3, near(13 / 3))


@pytest.mark.parametrize("match", ["exact", "normalized"])
def test_a_tokenizer_gives_preparation_s_own_table(tmp_path: Path, tiny: Path, match: str) -> None:
    """The oracle is preparation itself: the same rows dropped for the same reasons, the same groups left."""
    rows = _messy()
    data = Data(path=str(tmp_path / "lake"), match=match, held_out_share=0.3)
    write(tmp_path / "lake/part.parquet", rows)
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(tiny)
    prepared = prepare(data, 45, tokenizer, tmp_path / "prepared")
    found = inspect(Run(data=data, model=Model(path=str(tiny)), train=GrpoTrain(max_length=45)))
    assert found["rows"] == prepared.counts.to_dict()
    assert found["rows"]["dropped"].keys() == {
        *("NO_CONSENT", "EMPTY", "REWARD", "UNPARSABLE", "DUPLICATE"),
        *("TOO_LONG", "ONE_RESPONSE", "NO_SPREAD", "BELOW_THRESHOLD"),
    }
    assert found["tokens"]["source"] == "tokenizer"
    kept = prepared.train.response_lengths.tolist() + prepared.held_out.response_lengths.tolist()
    assert found["tokens"]["response"]["max"] > max(kept)  # what is too long was measured too
    assert found["steps"]["grpo"]["units"] == len(prepared.train)
    # Without a model nothing is too long, so nothing else may differ up to there.
    estimated = inspect(Run(data=data))["rows"]["dropped"]
    assert "TOO_LONG" not in estimated
    assert estimated["DUPLICATE"] == found["rows"]["dropped"]["DUPLICATE"]


def _messy() -> list[dict[str, Any]]:
    chat = json.dumps([{"role": "user", "content": "hello"}])
    odd = json.dumps([{"role": "tool", "content": "hello"}])  # the tiny model's template refuses this role
    rows = [entry for i in range(30) for entry in group(f"prompt {i}", 0.9, 0.6, 0.2 + i / 100)]
    rows += [row(f"prompt {i}", "a response that is too long " * 4, 0.1) for i in range(10)]
    rows += [row(f"long {i}", "a response that is too long " * 4, 0.1) for i in range(3)]
    rows += [row(f"long {i}", "short", 0.9) for i in range(3)]  # left alone once the other is too long
    rows += [row(" Prompt  3", "another", 0.3), row("prompt 4", "answer 0", 0.7), row("prompt 5", "answer 1", 0.6)]
    rows += [row(chat, "hi", 0.9), row(chat, "no", 0.1), row(odd, "hi", 0.9), row(odd, "no", 0.1)]
    rows += [row("", "x", 0.5), row("x", None, 0.5), row("x", "y", None), row("x", "y", 1.5)]
    rows += [row("x", "y", 0.5, user_consent=False), *group("tied", 0.9, 0.9), *group("low", 0.4, 0.1)]
    return rows


def test_of_many_responses_a_sample_is_tokenised(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample says nothing about single rows: nothing is dropped as too long."""
    monkeypatch.setattr(lengths, "SAMPLE", 4)
    rows = [entry for i in range(5) for entry in group(f"prompt {i}", 0.9, 0.2)]
    run = Run(model=Model(path=str(tiny)), train=GrpoTrain(max_length=2))
    found = report(tmp_path, rows, run=run)
    assert (found["tokens"]["complete"], found["tokens"]["responses"]) == (False, 4)
    assert found["tokens"]["over_max_length"] == 1
    assert found["rows"]["train_rows"] == 10


def test_steps_of_both_methods(tmp_path: Path) -> None:
    """Five prompts with two pairs each. In batches of 4: GRPO 2 steps an epoch, so 1000 steps are 500 epochs;

    DPO ⌈10/4⌉ = 3 steps an epoch and, over 1.5 epochs, ⌈4.5⌉ = 5.
    """
    rows = [entry for i in range(5) for entry in group(f"prompt {i}", 0.9, 0.8, 0.2, 0.1)]
    found = report(tmp_path, rows, run=Run(train=GrpoTrain(batch_size=4, num_epochs=1.5)))["steps"]
    grpo, dpo = found["grpo"], found["dpo"]
    assert (grpo["units"], grpo["steps_per_epoch"], grpo["steps"], grpo["epochs"]) == (5, 2, 1000, 500)
    assert (dpo["units"], dpo["steps_per_epoch"], dpo["steps"], dpo["epochs"]) == (10, 3, 5, near(5 / 3))


@pytest.mark.parametrize(
    ("train", "grpo", "dpo"),
    [
        (GrpoTrain(), 1000, 1),
        (GrpoTrain(max_steps=7), 7, 7),  # said once, it holds for both
        (GrpoTrain(max_steps=None), 1, 1),
    ],
)
def test_what_is_said_of_training_holds_for_the_other_method_too(
    tmp_path: Path, train: Train, grpo: int, dpo: int
) -> None:
    found = report(tmp_path, group("A", 0.9, 0.1), run=Run(train=train))["steps"]
    assert (found["grpo"]["steps"], found["dpo"]["steps"]) == (grpo, dpo)


def test_days_models_and_partitions(tmp_path: Path) -> None:
    """Rows without a timestamp take the folder's day; rows that are dropped say nothing about days and models."""
    for day, model in (("2026-03-14", "a"), ("2026-03-16", "b")):
        rows = [entry | {"model": None, "timestamp": None} for entry in group(f"prompt {day}", 0.9, 0.1)]
        write(tmp_path / f"lake/date={day}/model={model}/part.parquet", _without(rows, "timestamp"), schema=None)
    write(tmp_path / "lake/date=2020-01-01/part.parquet", group("old", 0.9, 0.1, user_consent=False, timestamp=None))
    found = inspect(Run(data=Data(path=str(tmp_path / "lake"), held_out_share=0.0)))["traces"]
    assert (found["first_day"], found["last_day"]) == ("2026-03-14", "2026-03-16")
    assert found["models"] == {"a": 2, "b": 2}
    assert found["partitions"] == {"date": 3, "model": 3}  # the old folder's rows have none, which is a value too
    assert found["files"] == 3
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*.parquet"))


def _without(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key != name} for entry in rows]


def test_a_day_beyond_the_calendar_does_not_stop_the_report(tmp_path: Path) -> None:
    """32-bit days reach far beyond the year 9999."""
    import pyarrow as pa

    rows = group("A", 0.9, 0.1)
    schema = pa.schema([("timestamp", pa.int32()), *pa.Table.from_pylist(_without(rows, "timestamp")).schema])
    table = pa.Table.from_pylist([entry | {"timestamp": 2**31 - 1} for entry in rows], schema)
    table = table.set_column(0, "timestamp", table["timestamp"].cast(pa.date32()))
    (tmp_path / "lake").mkdir()
    pq.write_table(table, tmp_path / "lake/part.parquet")
    found = inspect(Run(data=Data(path=str(tmp_path / "lake"), held_out_share=0.0)))
    assert found["traces"]["last_day"] == f"day {2**31 - 1}"


def clean(prompts: int, *rewards: float) -> list[dict[str, Any]]:
    """Prompts with these rewards, which both scores agree on."""
    return [
        entry | {"ragas_reward": entry["final_reward"], "judge_score": entry["final_reward"]}
        for i in range(prompts)
        for entry in group(f"prompt {i}", *rewards)
    ]


def test_clear_pairs_without_further_ranks_are_for_dpo(tmp_path: Path) -> None:
    """Every prompt has one good and one bad response: two levels, which a pair says completely."""
    advised = report(tmp_path, clean(40, 0.9, 0.1))["recommendation"]
    assert (advised["method"], _fits(advised)) == ("dpo", [False, True, False, True])
    assert "pairs say all there is (2 different rewards a prompt (median))" in advised["reason"]


def test_clear_pairs_with_ranks_are_for_dpo_where_prompts_are_few(tmp_path: Path) -> None:
    advised = report(tmp_path, clean(40, 0.9, 0.6, 0.1))["recommendation"]
    assert (advised["method"], _fits(advised)) == ("dpo", [True, True, False, True])
    assert "the traces are few: 40 training prompts" in advised["reason"]


def test_clear_pairs_with_ranks_are_for_grpo_where_prompts_are_many(tmp_path: Path) -> None:
    """3,200 prompts are 1000 steps of 32, ten times over; one less is few. Each has three rewards."""
    rows = clean(3200, 0.9, 0.6, 0.1)
    advised = report(tmp_path, rows)["recommendation"]
    assert (advised["method"], _fits(advised)) == ("grpo", [True, True, False, False])
    assert report(tmp_path, rows[3:])["recommendation"]["method"] == "dpo"


def test_noisy_labels_are_for_grpo(tmp_path: Path) -> None:
    """Ten prompts of three pairs each; where one of them is ordered differently, a third is, and 10/30 > 1/4."""
    rows = clean(10, 0.9, 0.6, 0.1)
    for entry in rows:
        if entry["output"] in ("answer 0", "answer 1"):
            entry["judge_score"] = 1.5 - entry["judge_score"]  # 0.6 and 0.9: the other way round
    advised = report(tmp_path, rows)["recommendation"]
    assert (advised["method"], _fits(advised)) == ("grpo", [True, True, True, True])
    assert advised["table"][2]["value"] == near(1 / 3)
    assert "order 33.3 % of response pairs differently" in advised["reason"]


def test_responses_labelled_twice_tell_noise_where_the_two_scores_are_not_there(tmp_path: Path) -> None:
    """Forty responses have two rewards; of thirty they are 0.2 apart, of ten the same: 30/40."""
    rows = [entry for i in range(40) for entry in group(f"prompt {i}", 0.9, 0.1)]
    rows += [row(f"prompt {i}", "answer 0", 0.7 if i < 30 else 0.9) for i in range(40)]
    advised = report(tmp_path, rows)["recommendation"]
    assert (advised["method"], advised["table"][2]["value"]) == ("grpo", 0.75)
    assert "75.0 % of responses labelled again" in advised["reason"]


def test_prompts_without_pairs_are_for_grpo(tmp_path: Path) -> None:
    """Of three prompts one makes a pair; without it none does, and DPO is impossible."""
    vague = [*group("A", 0.9, 0.6), *group("B", 0.8, 0.6)]
    advised = report(tmp_path, [*vague, *group("C", 0.9, 0.1)])["recommendation"]
    assert advised["method"] == "grpo"
    assert "33.3 % of usable prompts make a good/bad pair" in advised["reason"]
    assert advised["table"][2]["fits"] is None  # there is no second label at all
    none = report(tmp_path, vague)
    assert (none["recommendation"]["method"], none["steps"]["dpo"]["units"]) == ("grpo", 0)
    assert "no training prompt makes a pair" in none["recommendation"]["reason"]
    assert "num_epochs=1 means 0 steps" in text(none)


def test_many_epochs_are_what_a_run_warns_of() -> None:
    """3,200 prompts: what the 1000 steps of 32 go over ten times."""
    assert advice.quick_prompts() == 3200


def _fits(advised: Report) -> list[bool | None]:
    return [entry["fits"] for entry in advised["table"]]


def test_no_group_left_is_refused_with_the_table(tmp_path: Path) -> None:
    with pytest.raises(NoGroupLeft, match="'group without spread'") as caught:
        report(tmp_path, [*group("A", 0.9, 0.9, 0.9), *group("B", 0.9)])
    assert caught.value.counts.adds_up
    with pytest.raises(NoGroupLeft, match="no rows in the files"):
        report(tmp_path, [])
    with pytest.raises(NoGroupLeft, match="held out"):
        report(tmp_path, group("A", 0.9, 0.1), held_out_share=0.9999)


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import duckdb

    from entrypoint.inspection.responses import Reader

    def full(*args: Any) -> None:
        raise duckdb.OutOfMemoryException("Out of Memory Error: failed to offload data\nmore")

    monkeypatch.setattr(Reader, "read", full)
    with pytest.raises(DataError, match=r"no room to sort the traces.*set TMPDIR"):
        report(tmp_path, FIVE)


def test_the_program_prints_a_screen_and_writes_the_same_numbers_as_json(tmp_path: Path) -> None:
    """Every reason to drop a row but two is in these traces: the longest table that is likely."""
    write(tmp_path / "lake/date=2026-03-14/model=base/part.parquet", _messy())
    where = f"data.path={tmp_path}/lake"
    result = run_inspect(where, "--json", f"{tmp_path}/out/report.json")
    assert (result.returncode, result.stderr) == (EXIT_DONE, "")
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert result.stdout == text(found) + "\n"
    lines = result.stdout.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 120
    assert any(line.startswith("Recommended: method=") for line in lines[-2:])
    only = run_inspect(where, "--json=-")
    assert json.loads(only.stdout) == found


def test_it_reads_from_s3_with_a_model_on_s3(tmp_path: Path, s3: S3Server, tiny: Path) -> None:
    """Of the model only what the tokenizer needs is fetched: its weights are not even there."""
    write(tmp_path / "lake/date=2026-03-14/part.parquet", FIVE)
    bucket = s3.bucket()
    traces = s3.upload(tmp_path / "lake", bucket, "traces")
    small = tmp_path / "small"
    small.mkdir()
    for file in tiny.glob("*.json*"):
        (small / file.name).write_bytes(file.read_bytes())
    model = s3.upload(small, bucket, "model")
    keys = [f"data.path={traces}", f"data.endpoint_url={s3.endpoint_url}", f"model.path={model}"]
    result = run_inspect(*keys, "data.held_out_share=0.001", "--json", "-", env=s3.env)
    assert (result.returncode, result.stderr) == (EXIT_DONE, "")
    local = Run(data=Data(path=str(tmp_path / "lake"), held_out_share=0.001), model=Model(path=str(tiny)))
    expected, found = inspect(local), json.loads(result.stdout)
    assert found.pop("traces")["bytes"] == expected.pop("traces")["bytes"]
    assert found == expected


def test_the_shipped_traces(tmp_path: Path) -> None:
    """The demo's first step: traces that can be trained on by both methods."""
    result = run_inspect(f"data.path={SHIPPED}", "--json", f"{tmp_path}/report.json")
    assert (result.returncode, result.stderr) == (EXIT_DONE, "")
    found = json.loads((tmp_path / "report.json").read_text())
    assert len(result.stdout.splitlines()) <= 45
    assert found["noise"]["scored"]
    assert found["steps"]["grpo"]["units"]
    assert found["steps"]["dpo"]["units"]


REFUSALS = {
    "no path": ([], "data.path: is required"),
    "nothing there": (["data.path={lake}/none"], "data.path"),
    "a misspelt key": (["data.path={lake}", "data.chosen_treshold=0.8"], "data.chosen_threshold"),
    "contradicting thresholds": (["data.path={lake}", "data.rejected_threshold=0.9"], "data.rejected_threshold"),
    "a bad endpoint": (["data.path=s3://lake/x", "data.endpoint_url=nowhere"], "data.endpoint_url"),
    "no such model": (["data.path={lake}", "model.path={lake}/none"], "model.path"),
    "no tokenizer": (["data.path={lake}", "model.path={lake}"], "tokenizer"),
    "a missing column": (["data.path={lake}", "data.reward_column=final_rewards"], "nearest: 'final_reward'"),
    "json without a file": (["data.path={lake}", "--json"], "--json: expected one file"),
    "json twice": (["data.path={lake}", "--json=a", "--json=b"], "--json: expected one file"),
    "json to a folder": (["data.path={lake}", "--json", "{lake}"], "--json: expected a file"),
    "json below a file": (["data.path={lake}", "--json", "{lake}/part.parquet/x"], "part.parquet"),
    "an unknown option": (["data.path={lake}", "--jsn", "x"], "--jsn"),
    "no consent": (["data.path={lake}", "data.date_from=2027-01-01"], "no group left to train on"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_and_exit_64(name: str, tmp_path: Path) -> None:
    arguments, expected = REFUSALS[name]
    write(tmp_path / "part.parquet", FIVE)
    result = run_inspect(*(word.format(lake=tmp_path) for word in arguments))
    assert result.returncode == EXIT_REFUSED, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("entrypoint: warning: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("entrypoint: ")
    assert expected in lines[0]
    assert "Traceback" not in result.stdout + result.stderr


def test_the_table_comes_with_the_refusal(tmp_path: Path) -> None:
    write(tmp_path / "part.parquet", [*group("A", 0.4, 0.1), *group("B", 0.9)])
    result = run_inspect(f"data.path={tmp_path}")
    assert result.returncode == EXIT_REFUSED
    assert [line.split("  ")[0] for line in result.stdout.splitlines() if line.startswith("dropped")] == [
        "dropped: group left with one response",
        "dropped: below threshold",
    ]


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "part.parquet", FIVE).read_bytes()
    (tmp_path / "part.parquet").write_bytes(whole[: len(whole) // 2])
    result = run_inspect(f"data.path={tmp_path}")
    assert result.returncode == EXIT_REFUSED
    assert result.stderr.startswith(f"entrypoint: {tmp_path}/part.parquet: torn")


def test_a_run_file_says_which_traces(tmp_path: Path) -> None:
    """The file of a run, method and all: `method.pairing` and `train.batch_size` count."""
    rows = [entry for i in range(3) for entry in group(f"prompt {i}", 0.9, 0.8, 0.2, 0.1)]
    write(tmp_path / "lake/part.parquet", rows)
    lines = [
        "method: {name: dpo, pairing: all, pairs_per_prompt: 3}",
        f"data: {{path: {tmp_path}/lake, held_out_share: 0.0}}",
        "train: {batch_size: 2}",
    ]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    result = run_inspect("--config-dir", str(tmp_path), "--config-name", "run", "--json", "-")
    assert (result.returncode, result.stderr) == (
        EXIT_DONE,
        "entrypoint: warning: data.held_out_share=0: nothing is held out, so there are no figures before and after the"
        " run\n",
    )
    steps = json.loads(result.stdout)["steps"]
    assert (steps["dpo"]["units"], steps["dpo"]["steps"], steps["grpo"]["steps_per_epoch"]) == (9, 5, 2)


def test_help_shows_how_it_is_used() -> None:
    result = run_inspect("--help")
    assert (result.returncode, result.stderr) == (EXIT_DONE, "")
    assert "python -m entrypoint.inspect data.path=" in result.stdout


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    write(tmp_path / "part.parquet", FIVE)
    command = [sys.executable, "-m", "entrypoint.inspect", f"data.path={tmp_path}"]
    process = subprocess.Popen(
        command, env=scrubbed(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    assert process.wait() == EXIT_DONE


def test_without_a_model_neither_torch_nor_transformers_is_imported() -> None:
    """They take seconds, and an answer without a tokenizer needs neither."""
    code = (
        "import entrypoint.inspect, sys; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=scrubbed(), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
