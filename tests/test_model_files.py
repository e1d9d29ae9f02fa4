"""The base model: fetched once a node, refused in one line where it can't be used, named by its content."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from entrypoint import host
from entrypoint.conf import Model, Run
from entrypoint.errors import ModelError, RunError, StorageDownError
from entrypoint.load import load_base
from entrypoint.model.fetch import base_dtype, check_model, fetch_model, model_identity
from tests.servers.s3 import S3Server


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "base"))


@pytest.fixture
def aws(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with its keys where the AWS chain finds them."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shard(folder: Path) -> None:
    """Split the single weights file in two, with an index, as save_pretrained does with large models."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in (1, 2):
        name = f"model-{number:05d}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number - 1 :: 2]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def header(length: int, text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text + data


def garble(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: os.remove(folder / name)


def truncate(name: str, by: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def lose_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def swap_shard(folder: Path) -> None:
    shard(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def config(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", change)


REFUSALS: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", remove("config.json"), "no config.json"),
    ("an adapter", adapter_only, "LoRA adapter"),
    ("no tokenizer", remove("tokenizer.json"), "no tokenizer"),
    ("no weights", remove("model.safetensors"), "no weights"),
    ("pickles", pickle_only, "only pickle weights (pytorch_model.bin)"),
    ("torn weights", truncate("model.safetensors", 100), "model.safetensors: torn"),
    ("torn header", truncate("model.safetensors", 60_000), "model.safetensors: torn"),
    ("empty weights", garble("model.safetensors", b""), "model.safetensors: torn"),
    ("7 bytes", garble("model.safetensors", b"1234567"), "model.safetensors: torn"),
    ("LFS pointer", garble("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    ("header no JSON", garble("model.safetensors", header(4, b"nope")), "header can't be read"),
    ("header no object", garble("model.safetensors", header(2, b"[]")), "header can't be read"),
    (
        "overlap",
        garble("model.safetensors", header(59, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}    ')),
        "header can't be read",
    ),
    ("HTML", garble("model.safetensors", "<!DOCTYPE html><html>404</html>"), "model.safetensors: torn"),
    ("lost shard", lose_shard, "names model-00002-of-00002.safetensors, which is missing"),
    ("swapped shard", swap_shard, "lacks the tensor"),
    ("empty index", empty_index, "no weight_map"),
    ("torn config", truncate("config.json", 20), "config.json: can't be read as JSON"),
    ("config a list", garble("config.json", "[]"), "holds a JSON list"),
    ("torn tokenizer", truncate("tokenizer.json", 20), "tokenizer.json: can't be read as JSON"),
    ("no model_type", config(lambda c: c.pop("model_type")), "no model_type"),
    ("own code", config(lambda c: c.update(model_type="mine", auto_map={"AutoModel": "mine.Model"})), "auto_map"),
    ("unknown", config(lambda c: c.update(model_type="mine")), "no causal language model of model_type 'mine'"),
    ("an encoder", config(lambda c: c.update(model_type="vit")), "no causal language model"),
    ("quantised", config(lambda c: c.update(quantization_config={"quant_method": "fp8"})), "quantised"),
]


@pytest.mark.parametrize(("damage", "words"), [refusal[1:] for refusal in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_a_model_that_cannot_be_used_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(folder)
    with pytest.raises(ModelError) as refused:
        fetch_model(str(folder), None, None, {})
    assert words in str(refused.value)
    assert str(refused.value).startswith(str(folder))
    assert "\n" not in str(refused.value)


def test_a_missing_folder_and_a_file_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        fetch_model("meta-llama/Llama-3.1-8B", None, None, {})
    with pytest.raises(ModelError, match="is a file, not a folder"):
        fetch_model(str(folder / "config.json"), None, None, {})


def test_a_local_folder_is_used_where_it_is(folder: Path) -> None:
    assert fetch_model(str(folder), None, None, {}) == folder
    shard(folder)
    assert fetch_model(str(folder), None, None, {}) == folder
    # A native class wins over code that comes with the model: that code is never run.
    edit(folder / "config.json", lambda c: c.update(auto_map={"AutoConfig": "configuration_mine.Mine"}))
    check_model(folder)


def test_identity_is_content_not_place_or_time(tiny: Path, folder: Path) -> None:
    identity = model_identity(tiny)
    os.utime(folder / "model.safetensors", (1, 1))
    (folder / "README.md").write_text("not part of the model")
    (folder / "run.json").write_text("{}")
    assert model_identity(folder) == identity
    assert len(identity) == 64


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_identity_changes_with_a_byte_of_any_part(tiny: Path, folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert model_identity(folder) != model_identity(tiny)


def bytes_read() -> int:
    """By this process so far, whether from a disk or not."""
    (count,) = (line.split()[1] for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(count)


def test_identity_of_large_weights_reads_their_ends_and_the_places_between(tmp_path: Path, tiny: Path) -> None:
    """64 GiB of holes: named without a read of them all; the first MiB, the last one and 14 places between count."""
    folder = Path(shutil.copytree(tiny, tmp_path / "large"))
    size = 64 << 30
    with open(folder / "model.safetensors", "wb") as file:
        file.truncate(size)
    before = bytes_read()
    identities = {model_identity(folder)}
    assert bytes_read() - before < 64 << 20
    for place in (0, (1 << 20) - 1, size - (1 << 20), size - 1, (size - (1 << 16)) * 7 // 15):
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(place)
            file.write(b"x")
        identities.add(model_identity(folder))
    assert len(identities) == 6


def test_base_dtype_is_what_the_config_says_else_what_the_weights_are(tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    folder = tiny_model(tmp_path / "half", dtype="bfloat16")
    assert base_dtype(folder) == "bfloat16"
    edit(folder / "config.json", lambda c: c.pop("dtype"))
    assert base_dtype(folder) == "bfloat16"
    edit(folder / "config.json", lambda c: c.update(torch_dtype="torch.float16"))
    assert base_dtype(folder) == "float16"
    edit(folder / "config.json", lambda c: c.update(dtype="float8_e4m3fn"))
    with pytest.raises(ModelError, match="weights are float8_e4m3fn"):
        base_dtype(folder)


def test_a_model_from_s3_is_fetched_once_and_without_what_is_not_the_model(
    aws: S3Server, folder: Path, tmp_path: Path
) -> None:
    identity = model_identity(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    url = aws.upload(folder, aws.bucket("models"), "base")
    cache = tmp_path / "cache"
    got = fetch_model(url + "/", aws.endpoint_url, str(cache), {"LOCAL_RANK": "0"})
    assert got.parent == cache
    assert model_identity(got) == identity
    assert {p.name for p in got.iterdir()} == {p.name for p in folder.iterdir()} - {
        "pytorch_model.bin",
        "consolidated.safetensors",
    }
    before = {p.name: p.stat().st_mtime_ns for p in got.iterdir()}
    assert fetch_model(url, aws.endpoint_url, str(cache), {"LOCAL_RANK": "0"}) == got
    assert {p.name: p.stat().st_mtime_ns for p in got.iterdir()} == before
    os.truncate(got / "model.safetensors", 100)  # what a cleaner of /tmp or a full disk can do
    assert model_identity(fetch_model(url, aws.endpoint_url, str(cache), {"LOCAL_RANK": "0"})) == identity


def test_an_interrupted_fetch_goes_on_and_a_changed_model_is_another(
    aws: S3Server, folder: Path, tmp_path: Path
) -> None:
    bucket = aws.bucket("models")
    url = aws.upload(folder, bucket, "base")
    first = fetch_model(url, aws.endpoint_url, str(tmp_path / "cache"), {})
    partial = first.with_name(f".{first.name}.partial")
    first.rename(partial)  # as if the process had died in the middle of the last file
    (partial / "tokenizer.json").rename(partial / ".tokenizer.json")
    os.truncate(partial / ".tokenizer.json", 10)
    before = (partial / "model.safetensors").stat().st_ino
    assert fetch_model(url, aws.endpoint_url, str(tmp_path / "cache"), {}) == first
    assert (first / "model.safetensors").stat().st_ino == before
    assert {p.name for p in first.iterdir()} == {p.name for p in folder.iterdir()}
    check_model(first)

    edit(folder / "config.json", lambda c: c.update(rms_norm_eps=1e-5))
    aws.upload(folder, bucket, "base")
    assert fetch_model(url, aws.endpoint_url, str(tmp_path / "cache"), {}) != first


def test_the_other_ranks_of_a_node_wait_for_local_rank_0(aws: S3Server, folder: Path, tmp_path: Path) -> None:
    """A waiting rank and two runs' local rank 0 at once: one fetches, all get the same whole folder."""
    url = aws.upload(folder, aws.bucket("models"), "base")
    with ThreadPoolExecutor(3) as pool:
        ranks = [
            pool.submit(fetch_model, url, aws.endpoint_url, str(tmp_path / "cache"), {"LOCAL_RANK": rank})
            for rank in ("1", "0", "0")
        ]
        (got,) = {rank.result() for rank in ranks}
    assert {p.name for p in got.iterdir()} == {p.name for p in folder.iterdir()}


def test_the_others_leave_with_local_rank_0s_message_when_it_fails(
    aws: S3Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = aws.bucket("models")
    url = aws.upload(folder, bucket, "base")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ModelError, match=r"0\.0 GB free") as failed:
        fetch_model(url, aws.endpoint_url, str(tmp_path / "cache"), {"LOCAL_RANK": "0", "ENTRYPOINT_LAUNCH": "one"})
    with pytest.raises(ModelError) as other:
        fetch_model(url, aws.endpoint_url, str(tmp_path / "cache"), {"LOCAL_RANK": "1", "ENTRYPOINT_LAUNCH": "one"})
    assert str(other.value) == str(failed.value)
    # The next start on this node is not told of this start's failure.
    with pytest.raises(StorageDownError, match=r"nothing arrived .* for 0\.5 s"):
        fetch_model(
            url, aws.endpoint_url, str(tmp_path / "cache"), {"LOCAL_RANK": "1", "ENTRYPOINT_LAUNCH": "two"}, stall=0.5
        )


def test_s3_failures_are_one_line(aws: S3Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = aws.bucket("models")
    url = aws.upload(folder, bucket, "base")

    def refusal(url: str, endpoint_url: str) -> str:
        with pytest.raises(RunError) as refused:
            fetch_model(url, endpoint_url, str(tmp_path / "cache"), {})
        assert isinstance(refused.value, StorageDownError if endpoint_url.endswith(":9") else ModelError)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "not found" in refusal(f"s3://{bucket}/other", aws.endpoint_url)
    assert "no such bucket" in refusal("s3://no-such-bucket-here/base", aws.endpoint_url)
    assert "can't be reached" in refusal(url, "http://127.0.0.1:9")
    os.remove(aws.root / bucket / "base" / "tokenizer.json")
    assert "no tokenizer" in refusal(url, aws.endpoint_url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "refused the credentials (SignatureDoesNotMatch)" in refusal(url, aws.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "refused the credentials (XAdminUserNotFound)" in refusal(url, aws.endpoint_url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no AWS credentials found" in refusal(url, aws.endpoint_url)


def test_a_cache_that_cannot_be_written_is_named(aws: S3Server, folder: Path, tmp_path: Path) -> None:
    url = aws.upload(folder, aws.bucket("models"), "base")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ModelError) as refused:
        fetch_model(url, aws.endpoint_url, str(tmp_path / "file" / "cache"), {})
    assert str(tmp_path / "file") in str(refused.value)


def test_a_model_that_the_ranks_of_a_node_cannot_hold_is_refused_before_it_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 bytes a parameter, 10 million of them (a tensor of zeros that the disk doesn't hold), on each of two ranks."""
    count = 10_000_000
    header = json.dumps({"weight": {"dtype": "F16", "shape": [count], "data_offsets": [0, 2 * count]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * count)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(host, "total", lambda: 8 * count)
    run = Run(model=Model(path=str(folder)))
    load_base(run)
    monkeypatch.setattr(host, "total", lambda: 8 * count - 1)
    with pytest.raises(ModelError, match=r"10,000,000 parameters, .* each of this node's 2 ranks, are 0\.07451 GiB"):
        load_base(run)


def test_a_container_has_what_its_limit_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 MiB 3 are taken, one of them by a file that is only read; `max` is no limit."""
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    machine = host.total()
    for name, text in (("memory.max", 4 << 20), ("memory.current", 3 << 20), ("memory.stat", "inactive_file 1048576")):
        (tmp_path / name).write_text(f"{text}\n")
    assert (host.total(), host.available()) == (4 << 20, 2 << 20)
    (tmp_path / "memory.max").write_text("max\n")
    assert host.total() == machine
