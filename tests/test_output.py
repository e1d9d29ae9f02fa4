"""The hand-off: what is at output.path, who may write there, and that the model there is the trained one."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from entrypoint.errors import CheckpointError, RunError, StorageDownError
from entrypoint.output.publish import claim_output, find_output, publish, save_model
from entrypoint.output.target import LocalTarget, S3Target
from tests.servers.s3 import S3Server

FINGERPRINT = {"data.path": "s3://b/traces", "train.learning_rate": 1e-05, "model": "ab12"}
RECORD: dict[str, Any] = {
    "method": "dpo",
    "base_model": "/models/base",
    "iteration": 3,
    "fingerprint": FINGERPRINT,
    "metrics": {"before": {"accuracy": 0.5}, "after": {"accuracy": float("nan")}},
    "configuration": {"train": {"batch_size": 32}},
}


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    folder = tmp_path / "staging"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    return folder


@pytest.fixture(params=["local", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str | None, Path]:
    """An output's address, its endpoint and the folder in which its files can be looked at."""
    if request.param == "local":
        return str(tmp_path / "out" / "run-042"), None, tmp_path / "out" / "run-042"
    s3: S3Server = request.getfixturevalue("s3")
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    bucket = s3.bucket("models")
    return f"s3://{bucket}/runs/run-042", s3.endpoint_url, s3.root / bucket / "runs" / "run-042"


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        claim_output(*args, **kwargs)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 64
    return str(error.value)


def test_a_published_run_is_found_and_names_every_file(staging: Path, place: tuple[str, str | None, Path]) -> None:
    url, endpoint, folder = place
    assert find_output(url, endpoint) is None
    assert claim_output(url, FINGERPRINT, endpoint_url=endpoint) is None
    weights = (staging / "model.safetensors").read_bytes()
    run = publish(staging, url, endpoint, RECORD)
    assert run["files"]["model.safetensors"] == {"sha256": hashlib.sha256(weights).hexdigest(), "size": 7000}
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "run.json"}
    assert (folder / "model.safetensors").read_bytes() == weights
    written = json.loads((folder / "run.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert written == run == find_output(url, endpoint) == claim_output(url, FINGERPRINT, endpoint_url=endpoint)
    assert run["format"] == 1
    assert run["date"].endswith("+00:00")
    assert run["metrics"]["after"] == {"accuracy": None}
    assert {key: run[key] for key in ("method", "iteration", "configuration")} == {
        "method": "dpo",
        "iteration": 3,
        "configuration": {"train": {"batch_size": 32}},
    }


def test_another_runs_output_is_refused_with_the_keys_that_differ(
    staging: Path, place: tuple[str, str | None, Path]
) -> None:
    url, endpoint, _ = place
    publish(staging, url, endpoint, RECORD)
    message = refused(url, {**FINGERPRINT, "train.learning_rate": 2e-5}, endpoint_url=endpoint)
    assert "output of another run" in message
    assert "differs in train.learning_rate;" in message
    assert url in message


def test_a_foreign_model_is_refused_and_other_files_are_not_in_the_way(place: tuple[str, str | None, Path]) -> None:
    url, endpoint, folder = place
    (folder / "checkpoints" / "step-100").mkdir(parents=True)
    (folder / "checkpoints" / "model.safetensors").write_text("a checkpoint's")
    (folder / "notes.txt").write_text("not a model")
    assert claim_output(url, FINGERPRINT, endpoint_url=endpoint) is None
    (folder / "model.safetensors").write_text("somebody's")
    assert "holds a model (model.safetensors) without run.json" in refused(url, FINGERPRINT, endpoint_url=endpoint)


def test_a_publication_that_was_cut_off_is_made_again_by_the_same_run_only(
    staging: Path, place: tuple[str, str | None, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off at each write in turn (S3: at two): never a run.json before its files, and the run gets through."""
    url, endpoint, folder = place
    target = LocalTarget if endpoint is None else S3Target
    for last in range(6) if endpoint is None else (1, 4):
        trial = f"{url}-{last}"
        source = Path(shutil.copytree(staging, staging.with_name(f"staging-{last}")))
        (source / "model-00001-of-00002.safetensors").write_text("of a former try")
        calls = 0

        def failing(real: Any, last: int = last) -> Any:
            def call(self: Any, *args: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > last:
                    raise ConnectionResetError(errno.ECONNRESET, "connection reset by peer")
                return real(self, *args)

            return call

        with monkeypatch.context() as patched:
            for name in ("write", "put", "remove"):
                patched.setattr(target, name, failing(getattr(target, name)))
            with pytest.raises(StorageDownError, match=r"the final model was not written.*can't be reached"):
                publish(source, trial, endpoint, RECORD)
        assert find_output(trial, endpoint) is None
        if last:
            assert "another run" in refused(trial, {"other": 1}, endpoint_url=endpoint)
        assert claim_output(trial, FINGERPRINT, endpoint_url=endpoint) is None
        publish(Path(shutil.copytree(staging, staging.with_name(f"again-{last}"))), trial, endpoint, RECORD)
        assert claim_output(trial, FINGERPRINT, endpoint_url=endpoint) is not None
        assert {path.name for path in folder.with_name(f"run-042-{last}").iterdir()} == {
            *("config.json", "model.safetensors", "run.json")
        }


def test_a_damaged_output_is_not_complete_and_made_again(staging: Path, place: tuple[str, str | None, Path]) -> None:
    url, endpoint, folder = place
    again = Path(shutil.copytree(staging, staging.with_name("again")))
    publish(staging, url, endpoint, RECORD)
    (folder / "model.safetensors").unlink()
    assert claim_output(url, FINGERPRINT, endpoint_url=endpoint) is None
    publish(again, url, endpoint, RECORD)
    assert claim_output(url, FINGERPRINT, endpoint_url=endpoint) is not None


@pytest.mark.parametrize("content", ["", '{"format": 1, "fing', "[]", "\x00\xff"])
def test_a_torn_run_json_is_refused(place: tuple[str, str | None, Path], content: str) -> None:
    url, endpoint, folder = place
    folder.mkdir(parents=True)
    (folder / "run.json").write_bytes(content.encode("latin-1"))
    assert f"{url}/run.json" in refused(url, FINGERPRINT, endpoint_url=endpoint)
    with pytest.raises(CheckpointError):
        find_output(url, endpoint)


def test_a_place_that_cannot_be_written_is_refused_before_training(s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert str(tmp_path / "file") in refused(str(tmp_path / "file" / "out"), FINGERPRINT)
    assert "/proc/out" in refused("/proc/out", FINGERPRINT)


def test_s3_refusals_are_one_line(s3: S3Server, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    missing = "s3://no-such-bucket-here/out"
    assert "no such bucket" in refused(missing, FINGERPRINT, endpoint_url=s3.endpoint_url)
    with pytest.raises(CheckpointError, match="no such bucket"):
        publish(staging, missing, s3.endpoint_url, RECORD)
    with pytest.raises(StorageDownError, match="can't be reached"):
        claim_output(missing, FINGERPRINT, endpoint_url="http://127.0.0.1:9")
    with pytest.raises(StorageDownError, match="can't be reached"):
        publish(staging, missing, "http://127.0.0.1:9", RECORD)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "refused the credentials" in refused(missing, FINGERPRINT, endpoint_url=s3.endpoint_url)


def test_a_full_disk_ends_with_its_name(staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: LocalTarget, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(LocalTarget, "put", full)
    with pytest.raises(RunError, match="the disk is full") as error:
        publish(staging, str(tmp_path / "out"), None, RECORD)
    assert error.value.exit_code == 64


# The model


@pytest.fixture
def model(tiny: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.arange(3, 20)[None]).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gathered", [False, True])
def test_the_saved_model_is_the_trained_one_in_the_wanted_dtype(
    model: Any, tokenizer: Any, tmp_path: Path, dtype: torch.dtype, gathered: bool
) -> None:
    """Every weight on disk is the fp32 weight cast once; the model in memory keeps its own. Tied weights stay tied."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()} if gathered else None
    save_model(model, tokenizer, tmp_path / "out", dtype=dtype, state_dict=state)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float32 for name in before)
    assert model.config.dtype == torch.float32

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name].to(dtype)), name
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "hi"}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < size * 1.1 + 10_000  # tied weights once
    assert not list((tmp_path / "out").glob("*.bin"))
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(set(modes.values())) == 1, modes  # whoever may read the configuration may read the weights


def test_a_generation_config_that_contradicts_itself_does_not_cost_the_model(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model.generation_config.temperature = 0.6  # as many published models have it, without do_sample
    save_model(model, tokenizer, tmp_path / "out", dtype=torch.float32)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["do_sample"] is True
    assert not model.generation_config.do_sample


@pytest.fixture
def adapted(model: Any) -> Any:
    """A peft model whose adapter does something."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return peft_model.eval()


def test_an_adapter_is_saved_alone_and_names_its_base(adapted: Any, tokenizer: Any, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = logits(adapted)
    save_model(adapted, tokenizer, tmp_path / "out", dtype=torch.float32, base=str(tiny))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"model.safetensors", "config.json", "README.md"}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


def test_a_merged_adapter_is_what_peft_would_merge(adapted: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Against peft's own merge of a copy; the model in memory keeps its adapter apart."""
    from transformers import AutoModelForCausalLM

    before = copy.deepcopy(adapted.state_dict())
    oracle = copy.deepcopy(adapted).merge_and_unload()
    save_model(adapted, tokenizer, tmp_path / "out", dtype=torch.float32, merge=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, ours), theirs in zip(loaded.state_dict().items(), oracle.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
