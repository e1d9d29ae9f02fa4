"""The chart installs the first time, leaves nothing behind, and is refused before anything is bought."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest

from tests.chart.helm import CHART, HELMS, template
from tests.cluster.api import ApiError
from tests.cluster.counts import INSTALLS, SERIES
from tests.cluster.plane import FROM_ZERO, STOCK, Plane, until
from tests.cluster.platform import SLEEP, Platform, apply_driver, asleep, instead_of_training
from tests.cluster.release import seconds_since
from tests.cluster.snapshot import before_a_release, everything, until_as_before
from tests.process import ROOT

NEW = "fs-0fedcba9876543210"  # a file system that nobody has given to a group yet: root's alone
CONFIG_ALONE = {"checks": ["config"]}
README = (CHART / "README.md").read_text()
KINDS = {  # by kubectl's short names: the resource, and whether it lies in a namespace
    "job": ("jobs.batch", True),
    "configmap": ("configmaps", True),
    "networkpolicy": ("networkpolicies.networking.k8s.io", True),
    "pvc": ("persistentvolumeclaims", True),
    "clusterrole": ("clusterroles.rbac.authorization.k8s.io", False),
    "clusterrolebinding": ("clusterrolebindings.rbac.authorization.k8s.io", False),
    "pv": ("persistentvolumes", False),
}
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
            until(partial(asleep, release), 120, "the gang runs")
            begun = time.monotonic()
            done = release.uninstall()
            assert done.returncode == 0, done.stderr
            until_as_before(platform.plane, before, 120)
            print(f"{helm} uninstall until nothing is left: {seconds_since(begun)}")


@contextmanager
def neighbour(platform: Platform, values: dict[str, Any]) -> Iterator[None]:
    """Another run, on nodes of its own and in a queue of its own, all the while."""
    release = platform.release("neighbour", **values)
    with release.installed():
        until(partial(asleep, release), 120, "the neighbour runs")
        pods = [pod["metadata"]["uid"] for pod in release.pods]
        yield
        assert [pod["metadata"]["uid"] for pod in release.pods] == pods


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
    ("helm", "values", "meanwhile", "words"),
    [
        pytest.param(
            "helm3",
            {"training": {"data": {"path": "s3://no-such-bucket/traces"}}},
            *(nullcontext, "no-such-bucket"),
            id="data",
        ),
        pytest.param(
            "helm4",
            {"queue": {"existing": "nobodys"}, "preflight": {"checks": []}},
            *(nullcontext, "Queue nobodys: there is none; create it"),
            id="queue",
        ),
        pytest.param("helm4", {"storage": {"fsx": {"fileSystemId": NEW}}}, unwritable, "fsGroupPolicy", id="storage"),
        pytest.param("helm3", {}, stock, 'write actions: "allocate, backfill"', id="stock Volcano, by the chart"),
        pytest.param(
            "helm4",
            {"clusterChecks": {"enabled": False}, "preflight": {"checks": []}},
            *(stock, "never scales from zero nodes"),
            id="stock Volcano, by preflight",
        ),
    ],
)
def test_preflight_refuses_with_one_line_and_leaves_nothing(
    platform: Platform, helm: str, values: dict[str, Any], meanwhile: Callable[[Platform], Any], words: str
) -> None:
    before = before_a_release(platform.plane)
    release = platform.release("refused", helm=helm, **values)
    with meanwhile(platform):
        done = release.install()
        assert done.returncode != 0
        said = done.stdout + done.stderr
        assert [words in line for line in said.splitlines()].count(True) == 1, said
        assert "Traceback" not in said
        assert release.claims == []
        done = release.uninstall()
        assert done.returncode == 0, done.stderr
    until_as_before(platform.plane, before, 60)


@pytest.mark.parametrize("helm", HELMS)
def test_what_an_interrupted_install_leaves_goes_with_the_commands_of_the_readme(platform: Platform, helm: str) -> None:
    api, before = platform.plane.api, before_a_release(platform.plane)
    never = [{"secretRef": {"name": "not-there"}}]  # its pod waits for it, and Helm for the pod
    release = platform.release("run-042", helm=helm, preflight=CONFIG_ALONE, envFrom=never)
    preflight = f"app.kubernetes.io/instance={release.name},app.kubernetes.io/component=preflight"
    assert release.install_interrupted(lambda: api.list("pods", release.namespace, labels=preflight)) != 0
    assert release.claims == []
    done = release.uninstall()
    assert done.returncode == 0, done.stderr
    (line,) = re.findall(r"^kubectl -n NAMESPACE delete --ignore-not-found (.*)$", README, re.MULTILINE)
    for kinds, name in re.findall(r"{(\S+)}/(\S+)", line.replace("NAMESPACE", release.namespace)):
        for kind in kinds.split(","):
            resource, namespaced = KINDS[kind]
            api.delete(resource, name, release.namespace if namespaced else None, propagationPolicy="Background")
    until_as_before(platform.plane, before, 60)


def test_with_volcanos_stock_configuration_a_gang_never_starts(platform: Platform) -> None:
    before_a_release(platform.plane)
    nowhere = {"enabled": False, "volcanoConfigMap": "not-there"}  # neither chart nor preflight looks, and refuses
    release = platform.release("deadlock", preflight={"checks": []}, clusterChecks=nowhere)

    def refused() -> bool:
        events = platform.plane.api.list("events", platform.namespace)
        ours = [event for event in events if event["involvedObject"]["name"].startswith("deadlock-")]
        return any("resource in cluster is overused" in str(event.get("message")) for event in ours)

    with stock(platform), release.installed():
        until(refused, 60, "the gang is refused")
        deadline = time.monotonic() + 10  # a gang starts in less
        while time.monotonic() < deadline:
            assert (release.pods, release.claims) == ([], [])
            time.sleep(0.5)


@pytest.mark.parametrize("name", WITH_A_POOL_OF_ITS_OWN)
def test_a_real_api_server_admits_pool_and_node_class(plane: Plane, name: str) -> None:
    for found in template("helm4", "-f", ROOT / f"values/{name}.yaml"):
        if found["kind"] in ("EC2NodeClass", "NodePool", "Queue", "StorageClass", "PersistentVolumeClaim"):
            plane.api.apply(found, dry_run=True)


def test_rules_of_the_node_class_are_the_real_ones(plane: Plane) -> None:
    objects = template("helm4", "-f", ROOT / "values/grpo.yaml")
    (node_class,) = (found for found in objects if found["kind"] == "EC2NodeClass")
    node_class["spec"]["instanceProfile"] = "both"
    with pytest.raises(ApiError, match="must specify exactly one of"):
        plane.api.apply(node_class, dry_run=True)
