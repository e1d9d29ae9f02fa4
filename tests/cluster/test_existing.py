"""Runs on what a platform team has already: its queue, its nodes, its claim, its account."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.api import Object
from tests.cluster.counts import GANGS
from tests.cluster.instance_types import instance_types
from tests.cluster.plane import until
from tests.cluster.platform import Platform, instead_of_training
from tests.cluster.release import Release, metrics, seconds_since, until_completed
from tests.cluster.snapshot import before_a_release, everything
from tests.process import ROOT

PATIENCE = 420
TYPE = "p5en.48xlarge"
# The shipped example, but for its run and for the file system of values.yaml.
SHIPPED: dict[str, Any] = yaml.safe_load((ROOT / "values/existing-platform.yaml").read_text())
NO_FILE_SYSTEM = {"fileSystemId": "", "dnsName": "", "mountName": ""}
VALUES: dict[str, Any] = {
    **{key: value for key, value in SHIPPED.items() if key != "training"},
    "nodes": 2,
    "storage": {**SHIPPED["storage"], "fsx": NO_FILE_SYSTEM},
}

UNTIL_TOLD = """
import pathlib
run, rank = pathlib.Path("/checkpoints/queued", os.environ["RUN_NAME"]), os.environ["NODE_RANK"]
run.mkdir(parents=True, exist_ok=True)
begun = time.time()
(run / f"begun-{rank}").touch()
while len([*run.glob("begun-*")]) < 2 or not pathlib.Path("/checkpoints/queued/go").exists():
    time.sleep(0.1)
time.sleep(2)
(run / rank).write_text(f"{begun} {time.time()}")
os._exit(0)
"""


@pytest.fixture
def given(platform: Platform) -> Iterator[None]:
    """The queue, pool, claim and account that values/existing-platform.yaml expects."""
    before = before_a_release(platform.plane)
    text = (Path(__file__).parent / "existing.yaml").read_text()
    objects = list(yaml.safe_load_all(text.replace("NAMESPACE", platform.namespace)))
    for manifest in objects:
        platform.plane.api.apply(manifest, platform.namespace)
    queue = "queues.scheduling.volcano.sh"
    until(
        lambda: platform.plane.api.get(queue, "training").get("status", {}).get("state") == "Open",
        30,
        "the queue is open",
    )
    yield
    for manifest in reversed(objects):
        platform.plane.api.remove(manifest, platform.namespace)
    names = {manifest["metadata"]["name"] for manifest in objects}
    until(
        lambda: not [left for left in everything(platform.plane) - before if left.partition("/")[2] in names],
        *(120, "the platform's own is gone"),
    )


def release(platform: Platform, name: str, **values: Any) -> Release:
    """One of the platform's runs."""
    return platform.release(name, **{**VALUES, **values})


def test_nothing_of_ours_is_made_beside_a_platforms_own_and_dpo_trains(platform: Platform, given: None) -> None:
    before = everything(platform.plane)
    run = release(platform, "guest", training={"method": {"name": "dpo"}, "train": {"max_steps": 4}})
    begun = time.monotonic()
    with run.installed():
        until(run.running, PATIENCE, "the gang runs")
        made = [name.split(" ") for name in everything(platform.plane) - before]
        cluster_wide = {kind for kind, place in made if place.startswith("/")}
        assert cluster_wide == {
            "nodeclaims.karpenter.sh",
            "nodes.",
            "csinodes.storage.k8s.io",
        }  # by the pool that is there
        assert {place.partition("/")[0] for _, place in made} == {"", platform.namespace}
        assert "persistentvolumeclaims." not in {kind for kind, _ in made}
        assert {pod["spec"]["serviceAccountName"] for pod in run.pods} == {"training"}
        until_completed(run, PATIENCE)
        assert run.restarts == 0
        print(f"a run of 4 steps on a platform's own: {seconds_since(begun)}")
        done = run.run("test", "guest")
        said = done.stdout + done.stderr
        assert (done.returncode, said.count(": ok,")) == (0, 6), said  # all checks but the queue's
    assert len([line for line in metrics(platform.checkpoints("guest")) if "loss" in line["metrics"]]) == 4
    assert "model.safetensors" in platform.model("guest")


def test_gangs_that_queue_are_served_whole_and_all_of_them(platform: Platform, given: None) -> None:
    # Nodes for three gangs, and a queue for two. They are there for good: a pool buys nodes for pods that only wait.
    platform.plane.api.delete("nodepools.karpenter.sh", "gpu")
    values = instead_of_training(platform, "queued", UNTIL_TOLD)
    runs = [release(platform, f"queued-{number}", **values) for number in range(GANGS)]
    folder = platform.checkpoints("queued")
    begun = time.monotonic()
    with fixed_nodes(platform, 6), ThreadPoolExecutor(3) as pool:
        try:
            for done in pool.map(Release.install, runs):
                assert done.returncode == 0, done.stderr
            print(f"{GANGS} gangs queued: {seconds_since(begun)}")
            until(lambda: sum(run.running() for run in runs) == 2, PATIENCE, "two gangs run")
            bound = [pod for run in runs for pod in run.pods if pod["spec"].get("nodeName")]
            assert len(bound) == 4  # the capability holds, though two nodes are idle
            begun = time.monotonic()
            (folder / "go").touch()
            until(partial(all_completed, runs), PATIENCE, "all gangs have run")
            print(f"{GANGS} gangs of 2 s, two at a time: {seconds_since(begun)}")
        finally:
            list(pool.map(Release.uninstall, runs))
    spans = [span(folder / run.name) for run in runs]
    for first, _ in spans:
        assert sum(begin <= first < end for begin, end in spans) <= 2  # when one began, it and one other were there


def all_completed(runs: list[Release]) -> bool:
    return all(run.phase == "Completed" for run in runs)


def span(folder: Path) -> tuple[float, float]:
    """When a gang's first pod began and when its last one ended, in seconds; each waited until the other had begun."""
    begins, ends = zip(*(map(float, (folder / str(rank)).read_text().split()) for rank in range(2)), strict=True)
    return min(begins), max(ends)


@contextmanager
def fixed_nodes(platform: Platform, count: int) -> Iterator[None]:
    """Nodes that nobody buys and nobody gives back."""
    (resources,) = (found["resources"] for found in instance_types() if found["name"] == TYPE)
    names = [f"gpu-{number}" for number in range(count)]
    try:
        for name in names:
            platform.plane.api.apply(node(name))
            status = {"status": {"capacity": resources, "allocatable": resources}}
            platform.plane.api.patch("nodes", name, status, sub="status")
        yield
    finally:
        for name in names:
            platform.plane.api.delete("nodes", name)


def node(name: str) -> Object:
    labels = {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        "node.kubernetes.io/instance-type": TYPE,
    }
    taints = [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {"taints": taints},
    }
