"""Both methods from traces to a model: GRPO out of a bucket and into one, DPO by a mounted file from a folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e import traces
from tests.e2e.runs import TINY_RUN, TORCHRUN, Ended, Start, sha256, weights
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.slow

STEPS = 12
PARTS = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 base model."""
    from tests.tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("base"), dtype="bfloat16")


@dataclass(frozen=True)
class Remote:
    """A run whose traces, base model and output are in a bucket; `ended.output` is a download."""

    start: Start
    bucket: Path  # its objects as files
    dropped: Mapping[str, int]
    ended: Ended


@pytest.fixture(scope="module")
def grpo(tmp_path_factory: pytest.TempPathFactory, base: Path, s3: S3Server) -> Remote:
    folder = tmp_path_factory.mktemp("grpo")
    spoiled, dropped = traces.spoiled()
    misfiled = [traces.row(traces.text(0), "yes, of another day", 0.9, day=9)]
    traces.write_hive(folder / "lake", [*traces.learnable(), *spoiled], misfiled=misfiled)
    bucket = s3.bucket("e2e")
    words = (
        "method=grpo",
        f"data.path={s3.upload(folder / 'lake', bucket, 'lake')}/",
        f"data.endpoint_url={s3.endpoint_url}",
        f"model.path={s3.upload(base, bucket, 'models/base')}",
        f"model.cache_path={folder / 'models'}",
        f"output.path=s3://{bucket}/runs/042",
        "output.iteration=3",
        f"train.max_steps={STEPS}",
        "train.eval_steps=6",
        *TINY_RUN,
    )
    start = Start(folder, words, s3.env)
    ended = start.run()
    assert ended.code == 0, ended.err
    s3.fs().get(f"{bucket}/runs/042/", f"{folder / 'out'}/", recursive=True)
    return Remote(start, s3.root / bucket, dropped | {"CONTRADICTION": 1}, ended)


@dataclass(frozen=True)
class Local:
    start: Start
    dropped: Mapping[str, int]
    ended: Ended


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Local:
    """The same rows as GRPO's, in other files and another order; one mounted file holds the run."""
    folder = tmp_path_factory.mktemp("dpo")
    spoiled, dropped = traces.spoiled()
    lake = traces.write_scattered(folder / "lake", [*traces.learnable(), *spoiled])
    values: dict[str, Any] = {
        "data": {"path": [f"{lake}/*.parquet", f"{lake}/deep"], "held_out_share": 0.3},
        "model": {"path": str(base)},
        "train": {
            "batch_size": 5,
            "learning_rate": 1e-3,
            "max_length": 200,
            "logging_steps": 1,
            "max_steps": STEPS,
            "eval_steps": 6,
        },
        "checkpoint": {"path": str(folder / "checkpoints")},
        "output": {"path": str(folder / "out"), "dtype": "float32"},
    }
    file = {"defaults": ["base", {"override method": "dpo"}, "_self_"]} | values
    (folder / "mounted").mkdir()
    (folder / "mounted" / "run.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
    start = Start(folder, ("--config-dir", str(folder / "mounted"), "--config-name", "run"), places=False)
    ended = start.run()
    assert ended.code == 0, ended.err
    return Local(start, dropped, ended)


@pytest.fixture(params=["grpo", "dpo"])
def run(request: pytest.FixtureRequest) -> Remote | Local:
    """Each of both."""
    found: Remote | Local = request.getfixturevalue(request.param)
    return found


def test_run_json_names_every_file_of_the_output_with_its_checksum(run: Remote | Local) -> None:
    output, files = run.ended.output, run.ended.record["files"]
    assert {*PARTS} <= {*files}
    assert {path.name for path in output.iterdir()} == {*files, "run.json"}
    for name, said in files.items():
        assert said == {"sha256": sha256(output / name), "size": (output / name).stat().st_size}


def test_run_json_is_written_last(grpo: Remote) -> None:
    times = {path.name: path.stat().st_mtime_ns for path in (grpo.bucket / "runs/042").iterdir()}
    assert max(times, key=lambda name: times[name]) == "run.json"


def test_every_row_is_used_or_counted_under_its_reason(run: Remote | Local) -> None:
    counts = run.ended.record["counts"]
    assert counts["dropped"] == run.dropped
    assert counts["rows"] == 24 * 4 + sum(run.dropped.values())
    assert counts["train_rows"] + counts["held_out_rows"] == 24 * 4
    assert counts["conflicting"] == 1
    assert "dropped: no consent" in run.ended.out  # the table is printed


def test_run_json_says_what_was_run(grpo: Remote, dpo: Local, base: Path) -> None:
    record, other = grpo.ended.record, dpo.ended.record
    assert (record["format"], record["method"], record["iteration"]) == (1, "grpo", 3)
    assert (other["format"], other["method"], other["iteration"]) == (1, "dpo", 0)
    assert (record["training"]["unit"], record["training"]["units"]) == ("group", record["counts"]["train_groups"])
    assert (other["training"]["unit"], other["training"]["units"]) == ("pair", 2 * other["counts"]["train_groups"])
    for one in (record, other):
        assert one["training"]["steps"] == STEPS
        assert one["training"]["held_out_pairs"] == 2 * one["counts"]["held_out_groups"]
    assert record["base_model"].startswith("s3://")
    assert other["base_model"] == str(base)
    assert record["base_model_identity"] == other["base_model_identity"]  # its content, wherever it lies
    assert record["configuration"]["method"]["clip_range"] == 0.2
    assert {"torch", "transformers", "trl", "python", "entrypoint"} <= {*record["versions"]}


def test_the_held_out_prompts_are_the_same_for_both_methods_and_any_order_of_files(grpo: Remote, dpo: Local) -> None:
    held = [[group["prompt_hash"] for group in run.ended.groups("held_out")] for run in (grpo, dpo)]
    trained = [[group["prompt_hash"] for group in run.ended.groups("train")] for run in (grpo, dpo)]
    assert held[0] == held[1]
    assert trained[0] == trained[1]
    assert not {*held[0]} & {*trained[0]}
    # By hand, for the prompts in text: the first 64 bits of the prompt's SHA-256, as a share of all.
    sums = [hashlib.sha256(traces.text(number).encode()).hexdigest() for number in range(0, 24, 2)]
    by_hand = {prompt for prompt in sums if int(prompt[:16], 16) / 2**64 < 0.3}
    assert by_hand
    assert by_hand == {*held[0]} & {*sums}


def test_the_model_loads_by_itself_in_the_wanted_dtype_and_every_weight_has_moved(
    grpo: Remote, dpo: Local, base: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.e2e.oracle import assert_every_tensor_changed

    for run, dtype in ((grpo, torch.bfloat16), (dpo, torch.float32)):  # the base's; output.dtype
        assert {tensor.dtype for tensor in weights(run.ended.output).values()} == {dtype}
        assert AutoModelForCausalLM.from_pretrained(run.ended.output).dtype == dtype
        assert_every_tensor_changed(run.ended.output, base)
        tokenizer = AutoTokenizer.from_pretrained(run.ended.output)
        turns = [{"role": "user", "content": "May it start?"}]
        said = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert said == "<|im_start|>user\nMay it start?<|im_end|>\n<|im_start|>assistant\n"


def test_both_methods_learn_what_sets_good_responses_apart(run: Remote | Local) -> None:
    before, after = (run.ended.record["metrics"][when] for when in ("before", "after"))
    assert after["accuracy"] > before["accuracy"]
    assert after["margin"] > before["margin"] + 0.1
    assert after["logp_chosen"] > before["logp_chosen"]
    assert after["rewards/accuracies"] == 1
    assert before["kl"] == pytest.approx(0, abs=1e-6)
    assert after["kl"] > 0.01


def test_the_metrics_in_run_json_are_those_of_the_model_beside_it(dpo: Local, base: Path) -> None:
    from tests.e2e.oracle import held_out_metrics, load

    model, reference, groups = load(dpo.ended.output), load(base), dpo.ended.groups("held_out")
    metrics = dpo.ended.record["metrics"]
    for when, policy in (("before", reference), ("after", model)):
        expected = held_out_metrics(policy, reference, groups)
        assert {name: metrics[when][name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_grpo_begins_at_the_behaviour_policy_and_leaves_it(grpo: Remote) -> None:
    """The loss of step 1 is minus the mean advantage, and advantages of a group sum to zero; its ratio is 1."""
    run = grpo.ended
    assert run.curve("loss")[1] == pytest.approx(0, abs=1e-6)
    assert run.curve("ratio")[1] == pytest.approx(1, abs=1e-6)
    assert run.curve("ratio_max")[1] == pytest.approx(1, abs=1e-5)
    assert run.curve("kl")[1] == pytest.approx(0, abs=1e-6)
    assert run.curve("clip_ratio/region_mean")[1] == 0
    assert run.curve("kl")[STEPS] > 0.01
    assert run.curve("ratio_max")[STEPS] > 1.2  # beyond the clip range
    assert 0 < run.curve("clip_ratio/region_mean")[STEPS] < 1


def test_dpo_begins_at_the_loss_of_a_coin(dpo: Local) -> None:
    """Where the policy is the reference each pair's loss is -log sigmoid(0) = log 2."""
    run = dpo.ended
    assert run.curve("loss")[1] == pytest.approx(math.log(2), abs=1e-6)
    assert run.curve("rewards/margins")[1] == pytest.approx(0, abs=1e-6)
    assert run.curve("loss")[STEPS] < 0.5
    assert run.curve("rewards/margins")[STEPS] > 0.1


def test_metrics_are_in_metrics_jsonl_and_in_tensorboard_alike(run: Remote | Local) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.ended.checkpoints / "tensorboard"))
    board.Reload()
    assert [*run.ended.curve("loss")] == list(range(1, STEPS + 1))
    assert [*run.ended.curve("held_out/margin")] == [0, 6, STEPS]
    for name in ("loss", "grad_norm", "held_out/margin", "held_out/kl"):
        shown = {event.step: event.value for event in board.Scalars(name)}
        assert shown == pytest.approx(run.ended.curve(name), rel=1e-5, abs=1e-9)
    metrics = run.ended.record["metrics"]
    for step, when in ((0, "before"), (STEPS, "after")):
        assert {name: run.ended.curve(f"held_out/{name}")[step] for name in metrics[when]} == metrics[when]


def test_progress_in_a_log_file_is_plain_lines(run: Remote | Local) -> None:
    assert f"step {STEPS}/{STEPS} loss=" in run.ended.err
    assert f"step {STEPS}/{STEPS} held-out accuracy=" in run.ended.err
    assert "\r" not in run.ended.err
    assert "\x1b" not in run.ended.err


def test_the_same_command_again_leaves_the_bucket_as_it_is(grpo: Remote) -> None:
    output = grpo.bucket / "runs/042"
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    again = replace(grpo.start, folder=grpo.start.folder / "again").run()
    assert again.code == 0, again.err
    assert again.out.strip().endswith("/runs/042: holds this run's complete output already; nothing to do")
    assert "reference log-probs" not in again.out
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_torchrun_with_two_processes_takes_the_same_course_as_one(dpo: Local) -> None:
    from tests.e2e.oracle import assert_same_course, assert_same_weights

    folder = dpo.start.folder / "torchrun"
    two = replace(dpo.start, folder=folder, program=TORCHRUN, places=True).run()
    assert two.code == 0, two.err
    assert two.record["training"]["world_size"] == 2
    assert_same_course(two, dpo.ended)
    assert_same_weights(two, dpo.ended)
