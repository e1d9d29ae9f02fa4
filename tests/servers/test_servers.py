"""The servers of the tests are the real thing: what they refuse, what they keep, and that they end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from botocore.exceptions import FlexibleChecksumError

from tests.servers.mlflow import MlflowServer
from tests.servers.s3 import ROOT, S3Server, s3_server
from tests.servers.server import serve


def test_an_object_written_is_a_plain_file_of_the_same_bytes(s3: S3Server) -> None:
    bucket = s3.bucket()
    s3.fs().pipe_file(f"{bucket}/date=2026-01-01/part.bin", b"\x00\x01bytes")
    assert (s3.root / bucket / "date=2026-01-01" / "part.bin").read_bytes() == b"\x00\x01bytes"
    assert s3.fs().cat_file(f"{bucket}/date=2026-01-01/part.bin") == b"\x00\x01bytes"


def test_a_file_damaged_on_disk_fails_the_checksum_that_was_stored_with_it(s3: S3Server) -> None:
    bucket = s3.bucket()
    s3.fs().pipe_file(f"{bucket}/key", b"whole")
    (s3.root / bucket / "key").write_bytes(b"torn!")
    with pytest.raises(FlexibleChecksumError):
        s3.fs().cat_file(f"{bucket}/key")


def test_an_upload_keeps_the_folders(s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_text("c")
    bucket = s3.bucket()
    assert s3.upload(tmp_path, bucket, "traces") == f"s3://{bucket}/traces"
    assert s3.fs().find(bucket) == [f"{bucket}/traces/a/b/c.txt"]


@pytest.mark.parametrize(
    ("login", "refusal"),
    [
        pytest.param({"anon": True}, "Forbidden|Access Denied", id="anonymous"),
        pytest.param({"secret": "wrong"}, "Forbidden|signature", id="wrong secret"),
        # AWS answers InvalidAccessKeyId here, which s3fs makes a PermissionError; versitygw has a code of its own.
        pytest.param({"key": "nobody"}, "No user exists with the provided access key", id="unknown key"),
    ],
)
def test_who_has_no_right_keys_is_refused(s3: S3Server, login: dict[str, Any], refusal: str) -> None:
    bucket = s3.bucket()
    s3.fs().pipe_file(f"{bucket}/key", b"secret")
    with pytest.raises(OSError, match=refusal):
        s3.fs(**login).cat_file(f"{bucket}/key")
    with pytest.raises(OSError, match=refusal):
        s3.fs(**login).pipe_file(f"{bucket}/other", b"forged")
    assert s3.fs().ls(bucket, detail=False) == [f"{bucket}/key"]


def test_two_servers_share_nothing_and_end_with_their_block(s3: S3Server, tmp_path: Path) -> None:
    with s3_server(tmp_path) as other:
        assert other.endpoint_url != s3.endpoint_url
        bucket = other.bucket()
        assert not s3.fs().exists(bucket)
    host, port = other.endpoint_url.removeprefix("http://").split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


def test_a_server_that_ends_at_once_is_an_error_with_its_log(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo port taken >&2; exit 3"]
    with (
        pytest.raises(RuntimeError, match=r"ended with 3:\nport taken"),
        serve(command, env=os.environ, log=tmp_path / "log", ready=lambda: False, timeout=10),
    ):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="needs a parent-death signal")
def test_a_server_ends_when_the_tests_are_killed(tmp_path: Path) -> None:
    program = """if True:
        import os, signal, sys
        from pathlib import Path
        from tests.servers.server import serve
        log = Path(sys.argv[1])
        with serve(["sleep", "600"], env=os.environ, log=log, ready=lambda: True, timeout=10) as pid:
            print(pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "log"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(killed.stdout)).wait(10)


@pytest.mark.slow
def test_a_model_is_registered_from_an_address_outside_the_run(mlflow_server: MlflowServer, s3: S3Server) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(mlflow_server.uri)
    run = client.create_run(client.create_experiment("servers"))
    client.log_metric(run.info.run_id, "loss", 0.5, step=1)
    client.create_registered_model("servers")
    version = client.create_model_version(
        "servers", source=f"s3://{s3.bucket()}/model", run_id=run.info.run_id, tags={"method": "dpo"}
    )
    assert client.get_model_version("servers", version.version).tags == {"method": "dpo"}
    assert [m.value for m in client.get_metric_history(run.info.run_id, "loss")] == [0.5]
