"""The same traces in a bucket, over a real server that checks signatures: the same groups, and refusals in one line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from entrypoint.data.locations import find_files
from entrypoint.errors import DataError, StorageDownError
from tests.data.traces import contents, group, prepared, write
from tests.servers.s3 import S3Server

Tokenizer = PreTrainedTokenizerBase


@pytest.fixture
def keys(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def hive(lake: Path) -> Path:
    for number in range(4):
        path = lake / f"date=2026-03-14/model=org%2Fbase/consent={number < 3}".lower() / f"{number}.parquet"
        rows = group(f"p{number}", 0.9, 0.4, 0.1, model="org/base") + group(
            "shared", (number + 1) / 4, model="org/base"
        )
        rows[-1]["output"] = f"shared {number}"
        write(path, rows, row_group_size=2)
    (lake / "_SUCCESS").touch()
    return lake


@pytest.mark.usefixtures("keys")
def test_a_bucket_gives_what_the_folder_gives(tokenizer: Tokenizer, s3: S3Server, hive: Path, tmp_path: Path) -> None:
    base = s3.upload(hive, s3.bucket(), "lake")
    local = prepared(tokenizer, hive, tmp_path / "local", date_to="2026-03-14", models=["org/base"])
    paths: list[str | list[str]] = [base, base + "/", f"{base}/**/*.parquet", [f"{base}/date=2026-03-14/"]]
    for number, path in enumerate(paths):
        remote = prepared(
            tokenizer,
            path,
            tmp_path / f"s3 {number}",
            date_to="2026-03-14",
            models=["org/base"],
            endpoint_url=s3.endpoint_url,
        )
        assert contents(remote) == contents(local)
        assert remote.counts == local.counts
        assert remote.counts.dropped == {"NO_CONSENT": 4}
        assert remote.train[0].source.startswith(base)


@pytest.mark.usefixtures("keys")
def test_one_object_the_whole_bucket_and_s3a(s3: S3Server, hive: Path) -> None:
    bucket = s3.bucket()
    base = s3.upload(hive, bucket)
    assert len(find_files(base, s3.endpoint_url)) == 4
    assert len(find_files(f"s3a://{bucket}/", s3.endpoint_url)) == 4
    one = f"{base}/date=2026-03-14/model=org%2fbase/consent=true/1.parquet"
    (file,) = find_files(one, s3.endpoint_url)
    assert file.path == one
    assert file.partitions == {"date": "2026-03-14", "model": "org/base", "consent": "true"}


@pytest.mark.usefixtures("keys")
def test_identity_is_the_etag(s3: S3Server, lake: Path) -> None:
    write(lake / "a.parquet", group("p", 0.9, 0.1))
    bucket = s3.bucket()
    first = find_files(s3.upload(lake, bucket, "one"), s3.endpoint_url)[0]
    again = find_files(s3.upload(lake, bucket, "two"), s3.endpoint_url)[0]
    assert first.identity == again.identity
    write(lake / "a.parquet", group("p", 0.9, 0.2))
    assert find_files(s3.upload(lake, bucket, "one"), s3.endpoint_url)[0].identity != first.identity


@pytest.mark.usefixtures("keys")
def test_a_torn_object_is_named(tokenizer: Tokenizer, s3: S3Server, lake: Path, cache: Path) -> None:
    path = write(lake / "a.parquet", group("p", 0.9, 0.1))
    path.write_bytes(path.read_bytes()[:-9])
    base = s3.upload(lake, s3.bucket())
    with pytest.raises(DataError, match=f"{base}/a.parquet: torn or not Parquet"):
        prepared(tokenizer, base, cache, endpoint_url=s3.endpoint_url)


@pytest.mark.usefixtures("keys")
def test_large_objects_are_read_in_ranges(
    tokenizer: Tokenizer, s3: S3Server, hive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is small enough to be fetched whole, and no row group to be fetched at once: the same groups."""
    from entrypoint.data import scan

    base = s3.upload(hive, s3.bucket())
    expected = contents(prepared(tokenizer, hive, tmp_path / "local"))
    monkeypatch.setattr(scan, "SMALL_BYTES", 0)
    assert contents(prepared(tokenizer, base, tmp_path / "ranges", endpoint_url=s3.endpoint_url)) == expected
    monkeypatch.setattr(scan, "PREFETCH_BYTES", 0)
    assert contents(prepared(tokenizer, base, tmp_path / "streams", endpoint_url=s3.endpoint_url)) == expected


@pytest.mark.usefixtures("keys")
def test_an_object_that_goes_while_it_is_read_is_named(
    tokenizer: Tokenizer, s3: S3Server, hive: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from entrypoint.data import prepare as module

    bucket = s3.bucket()
    base = s3.upload(hive, bucket)
    found = find_files(base, s3.endpoint_url)
    s3.fs().rm(found[-1].path)
    monkeypatch.setattr(module, "find_files", lambda *_: found)
    with pytest.raises(DataError, match=f"{found[-1].path}: not found") as refused:
        prepared(tokenizer, base, cache, endpoint_url=s3.endpoint_url)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("s3://{bucket}/nothing/", "nothing/: not found"),
        ("s3://{bucket}/*.parquet", "the glob matches nothing"),
        ("s3://{bucket}", "found nothing; expected Parquet files"),
        ("s3://no-such-bucket-here/lake", "no-such-bucket-here/lake"),
        ("s3://no-such-bucket-here", "no-such-bucket-here: no such bucket"),
    ],
)
@pytest.mark.usefixtures("keys")
def test_nothing_there(s3: S3Server, path: str, says: str) -> None:
    with pytest.raises(DataError) as refused:
        find_files(path.format(bucket=s3.bucket()), s3.endpoint_url)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "the storage refused the credentials"),
        ("AWS_ACCESS_KEY_ID", "wrong", "credentials"),
    ],
)
def test_wrong_keys(
    s3: S3Server, hive: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    bucket = s3.bucket()
    base = s3.upload(hive, bucket, "lake")
    monkeypatch.setenv(name, value)
    for path in (
        base,
        f"s3://{bucket}",
        f"{base}/*",
        f"{base}/date=2026-03-14/model=org%2fbase/consent=true/1.parquet",
    ):
        with pytest.raises(DataError) as refused:
            find_files(path, s3.endpoint_url)
        assert path in str(refused.value)
        assert "\n" not in str(refused.value)
        assert says in str(refused.value) or "denied" in str(refused.value)


@pytest.mark.usefixtures("keys")
def test_an_endpoint_that_nobody_listens_at() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused at once
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StorageDownError, match="s3://bucket/lake: the storage can't be reached"):
            find_files("s3://bucket/lake", endpoint)
