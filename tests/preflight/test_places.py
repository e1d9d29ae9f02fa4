"""Traces, model and the places that a run writes: what preflight says of good ones and of each kind of bad one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from entrypoint.config import fingerprint_keys, load
from entrypoint.output.target import LocalTarget
from entrypoint.preflight import traces
from tests.data.traces import group, write
from tests.preflight.conftest import Preflight
from tests.process import ROOT, run_entrypoint, scrubbed
from tests.servers.s3 import S3Server


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_run_that_may_start_has_one_line_a_check(preflight: Preflight, tmp_path: Path) -> None:
    """Pairs by hand: A has (0.9, 0.2) and (0.7, 0.4), B has (0.8, 0.3), C has none.

    The tiny model has 28,832 parameters: 346 kB in fp32 with Adam's two moments.
    """
    said = preflight()
    assert said.code == 0
    assert said.err == ""
    assert [line.split(":")[1].strip() for line in said.out.splitlines()] == [
        *("config", "data", "model", "checkpoint", "mirror", "output")
    ]
    assert "all 8 rows of 1 files read: 3 groups to train on, 0 held out, 3 pairs" in said.line("data")
    assert "28,832 parameters" in said.line("model")
    assert re.search(r"written at [\d.,]+ [GM]B/s and read back.*a save is 0\.3 MB", said.line("checkpoint"))
    assert (tree(tmp_path / "checkpoints"), tree(tmp_path / "out")) == (["prepared"], [])


def test_every_failure_is_said_and_the_last_is_what_must_be_mended(preflight: Preflight) -> None:
    said = preflight("data.path=/nowhere", "model.path=/nowhere", "--checks=data,model,output")
    assert said.code == 64
    assert [line.split(": ")[2] for line in said.err.strip().splitlines()] == ["data", "model"]
    assert said.line("output")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.learning_rate=2", "config: train.learning_rate: expected a number > 0 and < 1, got 2"),
        ("data.paht=/lake", "config: data.paht: "),
        (
            "--checks=data,modle",
            "--checks: expected some of config, data, model, checkpoint, mirror, output, got 'modle'",
        ),
        ("--checks=", "--checks: names none, and there is no --queue to wait for"),
        ("--deadline=soon", "--deadline: expected a number of seconds > 0, got 'soon'"),
        ("--queue=", "--queue: expected one value"),
    ],
)
def test_a_wrong_key_or_option_is_refused(preflight: Preflight, word: str, says: str) -> None:
    said = preflight(word)
    assert said.code == 64
    assert said.last.startswith(f"entrypoint: preflight: {says}")


def test_checks_are_chosen_and_volumes_that_are_not_there_are_not_looked_at(preflight: Preflight) -> None:
    """As in a hook's pod: the claim with checkpoints, output and model is mounted later, in the trainer."""
    later = ("model.path=/proc/claim/model", "checkpoint.path=/proc/claim/run", "output.path=/proc/claim/out")
    said = preflight(*later, "--checks=data")
    assert (said.code, said.err) == (0, "")
    assert [line.split(":")[1].strip() for line in said.out.splitlines()] == ["config", "data"]


# Traces


def test_traces_that_leave_nothing_are_refused_with_the_table(preflight: Preflight, tmp_path: Path) -> None:
    write(tmp_path / "bad/part.parquet", group("A", 0.9, 0.1, user_consent=False))
    said = preflight(f"data.path={tmp_path}/bad", "--checks=data")
    assert said.code == 64
    assert "no group left to train on: of 2 rows 2 were dropped as 'no consent'" in said.last
    assert "dropped: no consent" in said.out


def test_groups_without_a_pair_are_refused_for_dpo_only(preflight: Preflight, tmp_path: Path) -> None:
    write(tmp_path / "flat/part.parquet", group("A", 0.6, 0.55))
    flat = f"data.path={tmp_path}/flat"
    assert "DPO has no pair to train on" in preflight(flat, "--checks=data").last
    assert preflight(flat, "method=grpo", "--checks=data").code == 0


def test_of_many_rows_a_sample_is_read_and_said_to_be_one(
    preflight: Preflight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of eight equal files, and of each its first row group of 64 rows: 16 groups of 4, two pairs each.

    256 of 1,024 rows, so in all four times as many groups.
    """
    rows = [one for prompt in range(32) for one in group(f"p{prompt}", 0.9, 0.8, 0.3, 0.1)]
    for number in range(8):
        write(tmp_path / f"many/{number}.parquet", [{**one, "input": f"{number} {one['input']}"} for one in rows])
    monkeypatch.setattr(traces, "SAMPLE_FILES", 4)
    monkeypatch.setattr(traces, "SAMPLE_ROWS", 4 * 64)
    monkeypatch.setattr("entrypoint.data.scan.BATCH_ROWS", 64)
    said = preflight(f"data.path={tmp_path}/many", "--checks=data").line("data")
    assert "256 of some 1,000 rows read, in 4 of 8 files: at least 64 groups to train on, 0 held out, 128 pairs" in said
    assert "some 260 groups, 510 pairs if a prompt's rows lie together" in said


def test_a_sample_proves_nothing_of_groups_but_of_rows(
    preflight: Preflight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One response of each prompt a file: no sample of one file has a group. Rows without consent prove more."""
    monkeypatch.setattr(traces, "SAMPLE_FILES", 1)
    for number, reward in enumerate((0.9, 0.1)):
        write(tmp_path / f"apart/{number}.parquet", group("A", reward, output=f"answer {number}"))
        write(tmp_path / f"bad/{number}.parquet", group("A", 0.9, 0.1, user_consent=False))
    said = preflight(f"data.path={tmp_path}/apart", "--checks=data")
    assert said.code == 0
    assert "warning" in said.err
    assert "no group to train on in the sample" in said.err
    assert "(a sample): no group left" in preflight(f"data.path={tmp_path}/bad", "--checks=data").last


# The model


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.mark.usefixtures("keys")
def test_a_model_in_a_bucket_is_looked_at_without_its_weights(preflight: Preflight, s3: S3Server, model: Path) -> None:
    """Each damage is named as for a local folder; a weights file is judged by its header and size."""
    endpoint = f"data.endpoint_url={s3.endpoint_url}"
    bucket = s3.bucket()
    url = s3.upload(model, bucket, "model")
    weights = s3.root / bucket / "model/model.safetensors"
    s3.fs().put_file(str(ROOT / "tests/tiny.py"), f"{bucket}/model/README.md")  # not the model's: not counted

    said = preflight(f"model.path={url}", endpoint, "--checks=model")
    sizes = [path.stat().st_size for path in model.iterdir()]
    assert f"{url}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB, 28,832 parameters" in said.line("model")

    whole = weights.read_bytes()
    s3.fs().pipe_file(f"{bucket}/model/model.safetensors", whole[:-100])
    said = preflight(f"model.path={url}", endpoint, "--checks=model")
    assert said.code == 64
    assert f"{url}/model.safetensors: torn: {len(whole) - 100} bytes" in said.last

    s3.fs().rm_file(f"{bucket}/model/tokenizer.json")
    assert f"{url}: no tokenizer" in preflight(f"model.path={url}", endpoint, "--checks=model").last


def test_a_model_that_can_not_be_trained_is_refused(preflight: Preflight, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    said = preflight(f"model.path={model}", "--checks=model")
    assert said.code == 64
    assert said.last.startswith(f"entrypoint: preflight: model: {model}/config.json: the weights are quantised")


# Checkpoints


def test_a_cache_that_can_not_be_written_is_named(preflight: Preflight) -> None:
    said = preflight("data.cache_path=/proc/cache", "--checks=checkpoint")
    assert said.code == 64
    assert said.last.startswith("entrypoint: preflight: checkpoint: /proc/cache: ")


def enlarged(model: Path, shape: list[int]) -> Path:
    """The model with a first tensor of such a shape: its file is as long as it says, and sparse."""
    path = model / "model.safetensors"
    size = 4 * shape[0] * shape[1]
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return model


def test_a_save_that_does_not_fit_the_grace_is_warned_of(preflight: Preflight, model: Path) -> None:
    """10 x 10^8 parameters of 12 bytes are 12 GB; in one second no disk here takes them."""
    said = preflight(
        f"model.path={enlarged(model, [10, 10**8])}",
        "--checks=checkpoint",
        "checkpoint.grace_seconds=1",
        "checkpoint.keep=1",
    )
    assert said.code == 0
    assert "a save is 12.0 GB" in said.line("checkpoint")
    assert "checkpoint.grace_seconds=1: a save of 12.0 GB needs 12.0 GB/s, this pod alone writes" in said.err


def test_checkpoints_that_the_disk_has_no_room_for_are_refused(preflight: Preflight, model: Path) -> None:
    """10^12 parameters, three saves of 12 TB; an adapter of rank 2 has 2 x (10^7 + 10^5) of them, 242.4 MB a save."""
    huge = f"model.path={enlarged(model, [10**7, 10**5])}"
    said = preflight(huge, "--checks=checkpoint")
    assert said.code == 64
    assert "free, but checkpoint.keep=2 and the one being written need 36,000.0 GB" in said.last
    lora = preflight(huge, "--checks=checkpoint", "model.lora.enabled=true", "model.lora.rank=2", "checkpoint.keep=1")
    assert "a save is 242.4 MB" in lora.line("checkpoint")


IN_A_VOLUME = 'mkdir "$1" && mount -t tmpfs -o "$2" volume "$1" && shift 2 && exec "$@"'


@pytest.mark.parametrize(
    ("options", "says"), [("size=64m", "the disk is full"), ("ro", "the file system is read-only")]
)
def test_a_volume_that_takes_nothing_is_named(words: list[str], tmp_path: Path, options: str, says: str) -> None:
    folder = str(tmp_path / "volume")
    command = ["unshare", "--mount", "sh", "-c", IN_A_VOLUME, "sh", folder, options]
    command += [sys.executable, "-m", "entrypoint.preflight", "--checks=checkpoint"]
    command += [*words[:-2], f"checkpoint.path={folder}", f"output.path={folder}/out"]
    ended = subprocess.run(command, env=scrubbed(), cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 64, ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith(f"entrypoint: preflight: checkpoint: {folder}: {says}")


AS_ANOTHER = """
set -e
mount -t tmpfs -o mode=755 mnt /mnt
mkdir /mnt/python /mnt/venv /mnt/source /mnt/volume
mount --bind "$1" /mnt/python && mount --bind "$2" /mnt/venv && mount --bind "$3" /mnt/source
python=$4 && shift 4
export LD_LIBRARY_PATH=/mnt/python/lib PYTHONPATH=/mnt/source:/mnt/venv/lib/$python/site-packages
exec setpriv --reuid 10001 --regid 10001 --clear-groups /mnt/python/bin/$python -m entrypoint.preflight "$@"
"""


def test_a_volume_that_is_roots_is_named_with_whose_it_is_and_what_to_do() -> None:
    """The program seen through /mnt: another user may not look into the folders that it really lies in."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    command = ["unshare", "--mount", "sh", "-c", AS_ANOTHER, "sh"]
    command += [sys.base_prefix, sys.prefix, str(ROOT), python, "--checks=checkpoint,output", "method=dpo"]
    command += [
        "data.path=/nowhere",
        "model.path=/nowhere",
        "checkpoint.path=/mnt/volume/run",
        "output.path=/mnt/volume",
    ]
    ended = subprocess.run(command, env=scrubbed(), cwd="/", capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 64, ended.stderr
    first, second = ended.stderr.strip().splitlines()
    assert first == (
        "entrypoint: preflight: checkpoint: checkpoint.path: /mnt/volume can't be written by user 10001 of groups "
        "10001: it belongs to user 0, group 0, mode 755; let the kubelet set the group (fsGroupPolicy: File in the "
        "volume's CSIDriver), or once as root: chown 10001:10001 /mnt/volume"
    )
    assert second.startswith("entrypoint: preflight: output: output.path: /mnt/volume can't be written by user 10001")


# Mirror and output


@pytest.mark.usefixtures("keys")
def test_buckets_are_written_read_and_left_as_they_were(preflight: Preflight, s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.bucket()
    said = preflight(
        f"data.path={s3.upload(tmp_path / 'lake', s3.bucket(), 'lake')}",
        f"checkpoint.mirror=s3://{bucket}/mirror",
        f"output.path=s3://{bucket}/out",
        f"data.endpoint_url={s3.endpoint_url}",
        "--checks=data,mirror,output",
    )
    assert said.code == 0
    assert "all 8 rows of 1 files read: 3 groups to train on, 0 held out, 3 pairs" in said.line("data")
    assert re.search(rf"s3://{bucket}/mirror: 33\.6 MB written at [\d.,]+ [GM]B/s, read back", said.line("mirror"))
    assert f"s3://{bucket}/out: writable" in said.line("output")
    assert s3.fs().find(bucket) == []


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("check", ["data", "model", "mirror", "output"])
def test_a_bucket_that_is_not_there_ends_with_64_and_a_server_that_is_not_with_75(
    preflight: Preflight, s3: S3Server, check: str
) -> None:
    place = "s3://no-such-bucket-here/x"
    key = "checkpoint.mirror" if check == "mirror" else f"{check}.path"
    words = (f"{key}={place}", f"--checks={check}")
    said = preflight(*words, f"data.endpoint_url={s3.endpoint_url}")
    assert said.code == 64
    assert said.last.startswith(f"entrypoint: preflight: {check}: {place}: no such bucket")
    said = preflight(*words, "data.endpoint_url=http://127.0.0.1:9")
    assert said.code == 75
    assert said.last.startswith(f"entrypoint: preflight: {check}: {place}: the storage can't be reached")


@pytest.mark.parametrize(("rate", "code"), [(5e-7, 0), (1e-6, 64)])
def test_an_output_of_this_configuration_is_no_other_runs(
    preflight: Preflight, words: list[str], tmp_path: Path, rate: float, code: int
) -> None:
    """What only the trainer knows (the traces' and the model's identity) is not compared here."""
    out = tmp_path / "out"
    out.mkdir()
    theirs = {**fingerprint_keys(load(words)), "train.learning_rate": rate, "traces": "ab", "model": "cd"}
    (out / ".run.json.unfinished").write_text(json.dumps({"date": "2026-11-01", "fingerprint": theirs}))
    assert preflight("--checks=output").code == code


# The end of patience


def test_what_hangs_ends_at_the_deadline(preflight: Preflight, tmp_path: Path) -> None:
    """A pipe among the traces, into which nobody writes."""
    os.mkfifo(tmp_path / "lake/late.parquet")
    said = preflight("--checks=data", "--deadline=5")
    assert said.code == 75
    assert said.last == "entrypoint: preflight: data: not done after 5 s"


def test_a_signal_ends_it_and_its_trial_file_goes(
    preflight: Preflight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole = LocalTarget.write

    def write_and_be_told(self: LocalTarget, name: str, content: bytes) -> None:
        write_whole(self, name, content)
        assert tree(tmp_path / "checkpoints") == [name]
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LocalTarget, "write", write_and_be_told)
    said = preflight("--checks=checkpoint,output")
    assert said.code == 75
    assert said.last == "entrypoint: preflight: checkpoint: told to stop before it was done"
    assert tree(tmp_path / "checkpoints") == []


def test_help_names_every_check() -> None:
    ended = run_entrypoint("--help", module="entrypoint.preflight")
    assert ended.returncode == 0
    assert "--checks" in ended.stdout
