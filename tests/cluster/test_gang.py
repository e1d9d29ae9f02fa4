"""The chart's gang from zero nodes to a finished run, and through what spot nodes do to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.api import Object
from tests.cluster.helm import Release, metrics, seconds_since
from tests.cluster.plane import STOCK, Plane, until
from tests.e2e import traces
from tests.servers.s3 import S3Server, s3_server

STEPS = 40
PATIENCE = 420  # seconds for three processes that import torch on a busy machine


@dataclass(frozen=True)
class Platform:
    """What the runs of this module share: traces and a base model in a bucket, and the keys to it."""

    plane: Plane
    namespace: str
    s3: S3Server
    bucket: str
    endpoint: str

    def release(self, name: str, *, helm: str = "helm4", training: Object | None = None, **values: Any) -> Release:
        """A GRPO run of 3 nodes on the traces; `training` and `values` lie over what is said here."""
        own: dict[str, Object] = {
            "data": {"path": f"s3://{self.bucket}/traces", "endpoint_url": self.endpoint, "held_out_share": 0.3},
            "model": {"path": f"s3://{self.bucket}/model"},
            "train": {
                "batch_size": 5,
                "learning_rate": 1e-3,
                "max_length": 200,
                "max_steps": STEPS,
                "logging_steps": 1,
            },
            "checkpoint": {"path": f"/checkpoints/{name}", "grace_seconds": 40},
            "output": {"path": f"s3://{self.bucket}/{name}"},
        }
        for group, keys in (training or {}).items():
            own[group] = {**own.get(group, {}), **keys}
        return Release(self.plane, self.namespace, name, {"training": own, **values}, helm)

    def checkpoints(self, name: str) -> Path:
        """The folder of a run's checkpoints, on this machine."""
        return self.plane.folder / "volumes" / "fs-0123456789abcdef0" / name

    def model(self, name: str) -> dict[str, bytes]:
        """A finished run's files in the bucket."""
        folder = self.s3.root / self.bucket / name
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} if folder.exists() else {}


@pytest.fixture(scope="module")
def platform(plane: Plane, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("platform")
    namespace = "train"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    plane.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}})
    driver = {"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": "fsx.csi.aws.com"}}
    plane.api.apply({**driver, "spec": {"attachRequired": False, "fsGroupPolicy": "File"}})
    with s3_server(folder) as s3, plane.network.relay(int(s3.endpoint_url.rpartition(":")[2])) as address:
        bucket = s3.bucket("lake")
        s3.upload(traces.write_hive(folder / "lake", traces.learnable()), bucket, "traces")
        s3.upload(tiny, bucket, "model")
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}, "stringData": s3.env}
        plane.api.apply(secret, namespace)
        yield Platform(plane, namespace, s3, bucket, f"http://{address}")
    plane.api.delete("namespaces", namespace)
    plane.api.delete("csidrivers.storage.k8s.io", "fsx.csi.aws.com")


@pytest.fixture(scope="module")
def straight(platform: Platform) -> dict[str, bytes]:
    """The files of a run that nothing happened to, from zero nodes to its end; shown by the way."""
    api = platform.plane.api
    assert [node for node in api.list("nodes") if "karpenter.sh/nodepool" in node["metadata"]["labels"]] == []
    release = platform.release("straight")
    begun = time.monotonic()
    with release.installed():
        print(f"installed after {seconds_since(begun)}")
        until(release.running, PATIENCE, "the gang runs")
        print(f"zero nodes to a gang: {seconds_since(begun)}")
        assert len(release.claims) == 3
        until(lambda: release.phase not in ("Pending", "Running", "Completing"), PATIENCE, "the run ends")
        print(f"to the end of the run: {seconds_since(begun)}")
        assert (release.phase, release.restarts) == ("Completed", 0)
        until(lambda: release.claims == [], 120, "the nodes are given back")
        print(f"nodes given back: {seconds_since(begun)}")
    return platform.model("straight")


def test_from_zero_nodes_to_a_model_in_the_bucket(platform: Platform, straight: dict[str, bytes]) -> None:
    assert {"model.safetensors", "tokenizer.json", "run.json"} <= straight.keys()
    lines = metrics(platform.checkpoints("straight"))
    assert [line["step"] for line in lines if "loss" in line["metrics"]] == list(range(1, STEPS + 1))


def test_a_spot_notice_costs_at_most_one_step(platform: Platform, straight: dict[str, bytes]) -> None:
    release = platform.release("noticed")
    with release.installed():
        until(lambda: len(metrics(platform.checkpoints("noticed"))) >= 5, PATIENCE, "five steps are done")
        begun = time.monotonic()
        platform.plane.api.delete("nodeclaims.karpenter.sh", release.claims[0]["metadata"]["name"])
        until(lambda: release.restarts >= 1, PATIENCE, "Volcano restarts the gang")
        print(f"notice to restart: {seconds_since(begun)}")
        until(release.running, PATIENCE, "the gang runs again")
        print(f"notice to gang: {seconds_since(begun)}")
        until(lambda: release.phase not in ("Pending", "Running", "Completing", "Restarting"), PATIENCE, "the run ends")
        assert release.phase == "Completed", release.logs()
    assert platform.model("noticed")["model.safetensors"] == straight["model.safetensors"]


def test_a_wrong_configuration_ends_the_job_for_good(platform: Platform) -> None:
    release = platform.release(
        "wrong", training={"data": {"reward_column": "no_such_column"}}, preflight={"checks": []}
    )
    with release.installed():
        until(lambda: release.phase == "Aborted", PATIENCE, "the Job is aborted")
        assert release.restarts == 0
        assert "no_such_column" in release.logs()


def test_with_volcanos_stock_configuration_a_gang_never_starts(platform: Platform) -> None:
    platform.plane.configure_volcano(STOCK)
    try:
        release = platform.release("deadlock", preflight={"checks": []}, clusterChecks={"enabled": False})
        with release.installed():
            groups = "podgroups.scheduling.volcano.sh"

            def refused() -> bool:
                conditions = [
                    condition
                    for group in platform.plane.api.list(groups, platform.namespace)
                    for condition in group.get("status", {}).get("conditions", [])
                ]
                return any("resource in cluster is overused" in str(c.get("message")) for c in conditions)

            until(refused, 60, "the gang is refused")
            assert release.pods == []
            assert release.claims == []
    finally:
        platform.plane.configure_volcano("allocate, backfill")
