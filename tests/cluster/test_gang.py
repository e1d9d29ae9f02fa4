"""The chart's gang from zero nodes to a finished run, and through what spot nodes do to it."""

from __future__ import annotations

import time

import pytest
from safetensors.numpy import load

from tests.cluster.helm import metrics, seconds_since
from tests.cluster.nodes import UNPLUGGED, is_ready
from tests.cluster.plane import FROM_ZERO, STOCK, until
from tests.cluster.platform import STEPS, Platform

PATIENCE = 420  # seconds for three processes that import torch on a busy machine
ONGOING = ("", "Pending", "Running", "Completing", "Restarting")


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
        until(lambda: release.phase not in ONGOING, PATIENCE, "the run ends")
        print(f"to the end of the run: {seconds_since(begun)}")
        assert (release.phase, release.restarts) == ("Completed", 0)
        until(lambda: release.claims == [], 120, "the nodes are given back")
        print(f"nodes given back: {seconds_since(begun)}")
    return platform.model("straight")


def test_from_zero_nodes_to_a_model_in_the_bucket(platform: Platform, straight: dict[str, bytes]) -> None:
    assert {"model.safetensors", "tokenizer.json", "run.json"} <= straight.keys()
    assert steps(platform, "straight") == list(range(1, STEPS + 1))


def steps(platform: Platform, name: str) -> list[int]:
    """The steps that a run logged a loss of, in their order."""
    return [line["step"] for line in metrics(platform.checkpoints(name)) if "loss" in line["metrics"]]


def assert_same_weights(files: dict[str, bytes], others: dict[str, bytes]) -> None:
    """Equal but for the order in which three ranks' gradients were added: 1e-6 of the weights' norm."""
    ours, theirs = (load(one["model.safetensors"]) for one in (files, others))
    assert ours.keys() == theirs.keys()
    apart = sum(float(((ours[name] - theirs[name]) ** 2).sum()) for name in theirs)
    assert apart <= 1e-12 * sum(float((weights**2).sum()) for weights in theirs.values())


def test_a_spot_notice_costs_at_most_one_step(platform: Platform, straight: dict[str, bytes]) -> None:
    release = platform.release("noticed", preflight={"checks": []})
    with release.installed():
        until(lambda: len(metrics(platform.checkpoints("noticed"))) >= 5, PATIENCE, "five steps are done")
        begun = time.monotonic()
        platform.plane.api.delete("nodeclaims.karpenter.sh", release.claims[0]["metadata"]["name"])
        until(lambda: release.restarts >= 1, PATIENCE, "Volcano restarts the gang")
        print(f"notice to restart: {seconds_since(begun)}")
        until(release.running, PATIENCE, "the gang runs again")
        print(f"notice to gang: {seconds_since(begun)}")
        until(lambda: release.phase not in ONGOING, PATIENCE, "the run ends")
        assert release.phase == "Completed", release.logs()
    assert steps(platform, "noticed") == list(range(1, STEPS + 1))  # the agreed checkpoint: none is done twice
    assert_same_weights(platform.model("noticed"), straight)


def test_a_node_that_dies_without_a_word_is_replaced(platform: Platform, straight: dict[str, bytes]) -> None:
    api, release = (
        platform.plane.api,
        platform.release("dies", training={"checkpoint": {"save_every": 5}}, preflight={"checks": []}),
    )
    with release.installed():
        until(lambda: len(metrics(platform.checkpoints("dies"))) >= 8, PATIENCE, "a checkpoint and more is done")
        node = release.pods[1]["spec"]["nodeName"]
        begun = time.monotonic()
        api.patch("nodes", node, {"metadata": {"annotations": {UNPLUGGED: "true"}}})
        until(lambda: not is_ready(api.get("nodes", node)), 60, "the control plane notices")
        print(f"death to its notice: {seconds_since(begun)}")
        api.delete("nodes", node)  # as the cloud's controller does with a node whose machine is gone
        until(lambda: release.restarts >= 1, PATIENCE, "Volcano restarts the gang")
        until(release.running, PATIENCE, "the gang runs again")
        print(f"death to gang: {seconds_since(begun)}")
        until(lambda: release.phase not in ONGOING, PATIENCE, "the run ends")
        assert release.phase == "Completed", release.logs()
    assert_same_weights(platform.model("dies"), straight)


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
        platform.plane.configure_volcano(FROM_ZERO)
