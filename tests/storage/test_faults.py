"""A network that breaks costs time and nothing else: every operation is done, or says within a bound why not."""

from __future__ import annotations

import asyncio
import gc
import pkgutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import entrypoint.s3
from entrypoint.data import scan
from entrypoint.data.locations import find_files
from entrypoint.data.tokens import load_tokenizer
from entrypoint.errors import DataError, ModelError, RunError, StorageDownError
from entrypoint.model.fetch import fetch_model
from entrypoint.output.publish import claim_output, find_output, publish
from entrypoint.storage import STORAGE_ERRORS
from entrypoint.storage import s3 as connect
from tests.data.traces import contents, group, prepared, write
from tests.servers.faults import ERRORS, FAULTS, HOLE, FaultProxy, at_random, every
from tests.servers.s3 import S3Server
from tests.servers.toxiproxy import Toxiproxy
from tests.storage.conftest import READ_TIMEOUT

RECORD = {"method": "dpo", "fingerprint": {"model": "ab12"}}


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(tiny)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_in_every_second_request_loses_nothing(
    fault: str, s3: S3Server, faults: FaultProxy, tmp_path: Path
) -> None:
    """Large and small objects up and down, looked up, listed and removed; a body tried again is the whole body."""
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 4096)  # 1 MiB: four ranges
    base, fs = f"s3://{s3.bucket()}/folder", connect(faults.endpoint_url)
    faults.plan = every(2, [fault])
    fs.send(source, f"{base}/large")
    fs.receive(f"{base}/large", tmp_path / "copy", source.stat().st_size)
    fs.pipe_file(f"{base}/small", b"bytes")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert fs.cat_file(f"{base}/small") == b"bytes"
    assert [entry["size"] for entry in fs.ls(base, detail=True)] == [1 << 20, 5]
    fs.rm_file(f"{base}/small")
    assert s3.fs().ls(base, detail=False) == [f"{base}/large".removeprefix("s3://")]
    assert faults.injected[fault] >= 4


def test_an_upload_in_parts_survives_that_each_answer_is_lost_once(
    s3: S3Server, faults: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the last one's: the upload is complete then, and asked again the server knows it no more."""
    import s3fs.core

    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda *_, **__: 5 << 20)
    source = tmp_path / "source"
    source.write_bytes(b"0123456789abcdef" * (11 << 16))  # 11 MiB: three parts
    url = f"s3://{s3.bucket()}/large"
    seen = set()

    def once(number: int, method: str, path: str) -> str | None:
        first = (method, path) not in seen
        seen.add((method, path))
        return "lost" if first else None

    faults.plan = once
    connect(faults.endpoint_url).send(source, url)
    assert s3.fs().cat_file(url) == source.read_bytes()
    assert any("partNumber=3" in path for _, path in seen)
    assert faults.injected["lost"] >= 5  # begun, three parts, completed


@pytest.mark.parametrize("seed", range(3))
def test_traces_a_model_and_an_output_through_hundreds_of_faults(
    seed: int,
    s3: S3Server,
    faults: FaultProxy,
    tiny: Path,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What arrives equals what was sent, whichever third of the requests fails; traces whole, then in ranges."""
    for number in range(12):
        write(tmp_path / "lake" / f"part={number}" / "part.parquet", group(f"p{number}", 0.9, 0.4, 0.1))
    lake, base = s3.upload(tmp_path / "lake", s3.bucket(), "lake"), s3.upload(tiny, s3.bucket(), "base")
    local = prepared(tokenizer, tmp_path / "lake", tmp_path / "local")
    out = f"s3://{s3.bucket()}/out"
    faults.plan = at_random(seed, 1 / 3)
    for round_ in range(2):
        monkeypatch.setattr(scan, "SMALL_BYTES", 0 if round_ else scan.SMALL_BYTES)
        remote = prepared(tokenizer, lake, tmp_path / f"prepared {round_}", endpoint_url=faults.endpoint_url)
        assert contents(remote) == contents(local)
        got = fetch_model(base, faults.endpoint_url, str(tmp_path / f"cache {round_}"), {})
        assert files(got) == files(tiny)
        place, staging = f"{out}-{round_}", tmp_path / f"staging {round_}"
        staging.mkdir()
        for name, content in (whole := {"config.json": b"{}", "model.safetensors": b"weights" * 999}).items():
            (staging / name).write_bytes(content)
        assert claim_output(place, RECORD["fingerprint"], endpoint_url=faults.endpoint_url) is None
        run = publish(staging, place, faults.endpoint_url, RECORD)
        assert find_output(place, s3.endpoint_url) == run
        there = {path.rsplit("/", 1)[-1]: s3.fs().cat_file(path) for path in s3.fs().ls(place, detail=False)}
        assert {name: there[name] for name in whole} == whole
        assert {*there} == {*whole, "run.json"}
    assert sum(faults.injected.values()) >= 30


def reading(endpoint: str, bucket: str, folder: Path) -> None:
    find_files(f"s3://{bucket}/lake", endpoint)


def fetching(endpoint: str, bucket: str, folder: Path) -> None:
    fetch_model(f"s3://{bucket}/base", endpoint, str(folder / "cache"), {})


def claiming(endpoint: str, bucket: str, folder: Path) -> None:
    claim_output(f"s3://{bucket}/out", {}, endpoint_url=endpoint)


def writing(endpoint: str, bucket: str, folder: Path) -> None:
    (folder / "staging").mkdir(exist_ok=True)
    (folder / "staging" / "config.json").write_text("{}")
    publish(folder / "staging", f"s3://{bucket}/out", endpoint, RECORD)


OPERATIONS = [reading, fetching, claiming, writing]


@pytest.fixture
def stored(s3: S3Server, tmp_path: Path, tiny: Path) -> str:
    """A bucket with traces and a model in it."""
    bucket = s3.bucket()
    write(tmp_path / "lake" / "part.parquet", group("p", 0.9, 0.1))
    s3.upload(tmp_path / "lake", bucket, "lake")
    s3.upload(tiny, bucket, "base")
    return bucket


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", [*ERRORS, "reset", HOLE])
def test_what_outlasts_all_attempts_ends_with_75(
    operation: Callable[[str, str, Path], None],
    fault: str,
    faults: FaultProxy,
    stored: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one line, after as many requests as there are attempts, and within the bound that follows from them."""
    attempts = 2
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", str(attempts))
    faults.plan = every(1, [fault])
    begin = time.monotonic()
    with pytest.raises(StorageDownError, match=r"the storage can't be reached \(2 attempts") as ended:
        operation(faults.endpoint_url, stored, tmp_path)
    assert ended.value.exit_code == 75
    assert "\n" not in str(ended.value)
    # aiohttp asks once more by itself where a connection that it had kept is reset.
    assert faults.injected[fault] in ((attempts, 2 * attempts) if fault == "reset" else (attempts,))
    # Far from for ever, with room for a busy machine.
    assert time.monotonic() - begin < attempts * (entrypoint.s3.CONNECT_TIMEOUT + READ_TIMEOUT) + 30


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("change", [{"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ACCESS_KEY_ID": "nobody"}, None])
def test_what_no_second_attempt_would_change_is_refused_at_once(
    operation: Callable[[str, str, Path], None],
    change: dict[str, str] | None,
    faults: FaultProxy,
    stored: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong keys, and (None) a bucket that is not there."""
    for name, value in (change or {}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="credentials" if change else "no such bucket|not found") as refused:
        operation(faults.endpoint_url, stored if change else "no-such-bucket", tmp_path)
    assert refused.value.exit_code == 64
    assert faults.requests <= 3


def test_a_line_that_is_dead_in_one_direction_is_left_within_the_bound(
    s3: S3Server, toxiproxy: Toxiproxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down: no answer ever arrives. Up: nobody takes the body off the wire, which aiohttp's time-outs don't see."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(entrypoint.s3, "BODIES", 2)
    monkeypatch.setattr(entrypoint.s3, "CONNECT_TIMEOUT", 1)
    monkeypatch.setattr(entrypoint.s3, "SLOWEST", 8 << 20)
    source = tmp_path / "source"
    source.write_bytes(bytes(8 << 20))
    url = f"s3://{s3.bucket()}/large"
    s3.fs().put_file(str(source), url)
    fs = connect(toxiproxy.endpoint_url)
    fs.receive(url, tmp_path / "copy", 8 << 20)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    asks: dict[str, Callable[[], object]] = {
        "downstream": lambda: fs.receive(url, tmp_path / "copy", 8 << 20),
        "upstream": lambda: fs.send(source, url),
    }
    for stream, ask in asks.items():
        begin = time.monotonic()
        with toxiproxy.toxic("timeout", stream=stream, timeout=0), pytest.raises(OSError):  # noqa: PT011
            ask()
        assert time.monotonic() - begin < 2 * (1 + READ_TIMEOUT + 1) + 30


def test_an_outage_shorter_than_the_attempts_is_waited_out(
    s3: S3Server, toxiproxy: Toxiproxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{s3.bucket()}/key"
    s3.fs().pipe_file(url, b"bytes")
    monkeypatch.setattr(entrypoint.s3, "LONGEST_PAUSE", 20.0)
    monkeypatch.setattr(entrypoint.s3, "FIRST_PAUSE", 0.05)  # ten attempts are some 20 s
    with toxiproxy.down():
        begin = time.monotonic()
        back = threading.Timer(0.5, toxiproxy.enable)
        back.start()
        assert connect(toxiproxy.endpoint_url).cat_file(url) == b"bytes"
        assert time.monotonic() - begin >= 0.5
        back.join()


def test_refusals_keep_their_kind(stored: str, faults: FaultProxy, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"):
        find_files(f"s3://{stored}/nothing", faults.endpoint_url)
    with pytest.raises(ModelError, match="not found"):
        fetch_model(f"s3://{stored}/nothing", faults.endpoint_url, str(tmp_path), {})


@pytest.mark.parametrize("name", sorted(STORAGE_ERRORS))
def test_a_librarys_error_has_the_name_by_which_it_is_told(name: str) -> None:
    kind = pkgutil.resolve_name(":".join(name.rsplit(".", 1)))
    assert f"{kind.__module__}.{kind.__qualname__}" == name


def test_a_connection_that_breaks_under_a_body_is_no_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """As aiohttp leaves it: the body is sent in a task whose failure nobody asks for."""

    async def send() -> None:
        raise ConnectionResetError("Cannot write to closing transport")

    async def request() -> None:
        task = asyncio.ensure_future(send())
        await asyncio.sleep(0)
        del task

    asyncio.run(request())
    gc.collect()
    assert caplog.records == []
