"""The chart installs the first time, leaves nothing behind, and is refused before anything is bought."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import yaml

from tests.chart.helm import CHART
from tests.cluster.api import ApiError, Object
from tests.cluster.counts import INSTALLS, SERIES
from tests.cluster.helm import Release, before_a_release, everything, seconds_since, until_gone
from tests.cluster.plane import FROM_ZERO, STOCK, Plane, until
from tests.cluster.platform import SLEEP, Platform, apply_driver, instead_of_training
from tests.process import ROOT

NEW = "fs-0fedcba9876543210"  # a file system that nobody has given to a group yet: root's alone
CONFIG_ALONE = {"checks": ["config"]}
WITH_A_POOL_OF_ITS_OWN = ("grpo", "dpo", "capacity-block", "lora-single-node")


@pytest.mark.parametrize(
    ("helm", "busy"), SERIES, ids=[f"{helm}-{'busy' if busy else 'empty'}" for helm, busy in SERIES]
)
def test_every_install_works_and_every_uninstall_leaves_what_was_there(
    platform: Platform, helm: str, busy: bool
) -> None:
    before_a_release(platform.plane)
    values = instead_of_training(platform, "tries", SLEEP)
    with neighbour(platform, values) if busy else nullcontext():
        before = everything(platform.plane)
        for number in range(INSTALLS):
            release = platform.release(f"try-{helm}-{number}", helm=helm, **{**values, "preflight": CONFIG_ALONE})
            begun = time.monotonic()
            done = release.install()
            assert done.returncode == 0, done.stderr
            print(f"{helm} install: {seconds_since(begun)}")
            # Process 1 gets no signal that it does not catch: a pod told to end before it does takes its whole grace.
            until(partial(asleep, release), 120, "the gang runs")
            begun = time.monotonic()
            done = release.uninstall()
            assert done.returncode == 0, done.stderr
            until_gone(platform.plane, before, 120)
            print(f"{helm} uninstall until nothing is left: {seconds_since(begun)}")


@contextmanager
def neighbour(platform: Platform, values: dict[str, Any]) -> Iterator[None]:
    """Another run, on nodes of its own and in a queue of its own, all the while."""
    release = platform.release("neighbour", **values)
    with release.installed():
        until(release.running, 120, "the neighbour runs")
        pods = [pod["metadata"]["uid"] for pod in release.pods]
        yield
        assert [pod["metadata"]["uid"] for pod in release.pods] == pods


def asleep(release: Release) -> bool:
    """Whether all three programs run."""
    return release.logs().count("asleep") == 3


@contextmanager
def unwritable(platform: Platform) -> Iterator[None]:
    apply_driver(platform.plane, "ReadWriteOnceWithFSType")
    try:
        yield
    finally:
        apply_driver(platform.plane, "File")


@contextmanager
def stock(platform: Platform) -> Iterator[None]:
    platform.plane.configure_volcano(STOCK)
    try:
        yield
    finally:
        platform.plane.configure_volcano(FROM_ZERO)


@pytest.mark.parametrize(
    ("values", "meanwhile", "words"),
    [
        pytest.param(
            {"training": {"data": {"path": "s3://no-such-bucket/traces"}}}, nullcontext, "no-such-bucket", id="data"
        ),
        pytest.param(
            {"queue": {"existing": "nobodys"}, "preflight": {"checks": []}}, nullcontext, "nobodys", id="queue"
        ),
        pytest.param({"storage": {"fsx": {"fileSystemId": NEW}}}, unwritable, "fsGroupPolicy", id="storage"),
        pytest.param({}, stock, "enqueue", id="stock Volcano, by the chart"),
        pytest.param(
            {"clusterChecks": {"enabled": False}, "preflight": {"checks": []}},
            *(stock, "never scales from zero nodes"),
            id="stock Volcano, by preflight",
        ),
    ],
)
def test_preflight_refuses_with_one_line_and_leaves_nothing(
    platform: Platform, values: dict[str, Any], meanwhile: Callable[[Platform], Any], words: str
) -> None:
    before = before_a_release(platform.plane)
    release = platform.release("refused", **values)
    with meanwhile(platform):
        done = release.install()
        assert done.returncode != 0
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert release.claims == []
        done = release.uninstall()
        assert done.returncode == 0, done.stderr
    until_gone(platform.plane, before, 60)


@pytest.mark.parametrize("name", WITH_A_POOL_OF_ITS_OWN)
def test_a_real_api_server_admits_pool_and_node_class(plane: Plane, name: str) -> None:
    for found in rendered(plane, name):
        if found["kind"] in ("EC2NodeClass", "NodePool", "Queue", "StorageClass", "PersistentVolumeClaim"):
            plane.api.apply(found, dry_run=True)


def test_rules_of_the_node_class_are_the_real_ones(plane: Plane) -> None:
    (node_class,) = (found for found in rendered(plane, "grpo") if found["kind"] == "EC2NodeClass")
    node_class["spec"]["instanceProfile"] = "both"
    with pytest.raises(ApiError, match="must specify exactly one of"):
        plane.api.apply(node_class, dry_run=True)


def rendered(plane: Plane, name: str) -> list[Object]:
    """The objects of a values file as shipped."""
    done = Release(plane, "default", "run").run("template", "run", str(CHART), "-f", str(ROOT / f"values/{name}.yaml"))
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if found]
