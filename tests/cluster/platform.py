"""What a platform team gives to the runs of a namespace: traces and a base model in a bucket, keys, a file system."""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.api import Object
from tests.cluster.nodes import DRIVER
from tests.cluster.plane import Plane, until
from tests.cluster.release import Release
from tests.e2e import traces
from tests.servers.faults import fault_proxy
from tests.servers.s3 import S3Server, s3_server

FILE_SYSTEM = "fs-0123456789abcdef0"  # of values.yaml
STEPS = 40
GRACE = 40  # seconds, and 20 less than the pods' in values.yaml


@dataclass(frozen=True)
class Platform:
    """A namespace that enforces Pod Security `restricted`, with everything that a run needs."""

    plane: Plane
    namespace: str
    s3: S3Server
    bucket: str
    endpoint: str
    uploads: threading.Event  # while it is not set, no final model gets through to the bucket

    def release(self, name: str, *, helm: str = "helm4", training: Object | None = None, **values: Any) -> Release:
        """A GRPO run of 3 nodes on the traces; `training` and `values` lie over what is said here."""
        own: dict[str, Object] = {
            "data": {"path": f"s3://{self.bucket}/traces", "endpoint_url": self.endpoint, "held_out_share": 0.3},
            "method": {"name": "grpo"},
            "model": {"path": f"s3://{self.bucket}/model"},
            "train": {
                "batch_size": 5,
                "learning_rate": 1e-3,
                "max_length": 200,
                "max_steps": STEPS,
                "logging_steps": 1,
            },
            "checkpoint": {"path": f"/checkpoints/{name}", "grace_seconds": GRACE},
            "output": {"path": f"s3://{self.bucket}/{name}"},
        }
        for group, keys in (training or {}).items():
            own[group] = {**own.get(group, {}), **keys}
        return Release(self.plane, self.namespace, name, {"training": own, **values}, helm)

    def checkpoints(self, name: str) -> Path:
        """The folder of a run's checkpoints, on this machine."""
        return self.plane.folder / "volumes" / FILE_SYSTEM / name

    def model(self, name: str) -> dict[str, bytes]:
        """A finished run's files in the bucket."""
        folder = self.s3.root / self.bucket / name
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} if folder.exists() else {}


@contextmanager
def make_platform(plane: Plane, namespace: str, model: Path, folder: Path) -> Iterator[Platform]:
    """The platform during the block; its namespace and all that is in it go with it."""
    api = plane.api
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}})
    apply_driver(plane, "File")
    uploads = threading.Event()
    uploads.set()

    def plan(number: int, method: str, path: str) -> None:
        if (method, path.rpartition("/")[2]) == ("PUT", "model.safetensors"):
            uploads.wait()

    with (
        s3_server(folder) as s3,
        fault_proxy(s3.endpoint_url, plan) as proxy,
        plane.network.relay(int(proxy.endpoint_url.rpartition(":")[2])) as address,
    ):
        bucket = s3.bucket("lake")
        s3.upload(traces.write_hive(folder / "lake", traces.learnable()), bucket, "traces")
        s3.upload(model, bucket, "model")
        platform = Platform(plane, namespace, s3, bucket, f"http://{address}", uploads)
        apply_keys(platform)
        yield platform
        api.delete("namespaces", namespace)
        api.delete("csidrivers.storage.k8s.io", DRIVER)
        until(lambda: api.find("namespaces", namespace) is None, 120, f"namespace {namespace} gone")


def apply_keys(platform: Platform) -> None:
    """The Secret with the bucket's keys."""
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}, "stringData": platform.s3.env}
    platform.plane.api.apply(secret, platform.namespace)


def apply_driver(plane: Plane, policy: str) -> None:
    """The storage driver's object: its `fsGroupPolicy` says whether a kubelet gives a shared volume to `fsGroup`."""
    driver = {"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": DRIVER}}
    plane.api.delete("csidrivers.storage.k8s.io", DRIVER)
    plane.api.apply({**driver, "spec": {"attachRequired": False, "fsGroupPolicy": policy}})


# A program that is loaded before the trainer, in its place: the rows that are about gangs, not training, start 300
# times faster. Preflight runs as it is.
PROGRAM = """
import os, signal, sys, time
if "entrypoint" in sys.orig_argv:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
{}
"""


def instead_of_training(platform: Platform, name: str, program: str) -> Object:
    """Values with which the gang's pods run a few lines of Python instead of the trainer."""
    content = {"sitecustomize.py": PROGRAM.format(textwrap.indent(program, "    "))}
    metadata = {"name": f"program-{name}"}
    platform.plane.api.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": content}, platform.namespace
    )
    return {
        "extraEnv": [{"name": "PYTHONPATH", "value": "/opt/program"}],
        "extraVolumes": [{"name": "program", "configMap": metadata}],
        "extraVolumeMounts": [{"name": "program", "mountPath": "/opt/program", "readOnly": True}],
        "preflight": {"checks": []},
    }


SLEEP = "print('asleep', flush=True); time.sleep(3600)"


def asleep(release: Release) -> bool:
    """Whether every pod of a release has come to SLEEP."""
    # One that is told to end before takes its whole grace: process 1 gets no signal that it does not catch.
    return release.running() and all("asleep" in release.log(pod) for pod in release.pods)
