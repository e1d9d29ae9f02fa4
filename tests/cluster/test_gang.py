"""The chart's gang from zero nodes to a finished run, and through what spot nodes do to it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from safetensors.numpy import load

from tests.cluster.counts import NOTICES, NOTICES_ALONE
from tests.cluster.moments import PATIENCE, Start, exit_codes, past_a_checkpoint, publishing, saving, starting, training
from tests.cluster.nodes import UNPLUGGED, is_ready
from tests.cluster.plane import until
from tests.cluster.platform import STEPS, Platform
from tests.cluster.release import Release, metrics, seconds_since, until_completed

UNCHECKED: dict[str, list[str]] = {"checks": []}  # what preflight finds is shown elsewhere
KEPT = {"consolidateAfter": "60s"}  # longer than a replacement takes to come, as in production
SAVE_EVERY = 5


@pytest.fixture(scope="module")
def straight(platform: Platform) -> Iterator[Release]:
    """A run that nothing happened to, from zero nodes to its end; it is there until the module's end."""
    until(lambda: bought(platform) == [], 120, "there are no nodes")
    release = platform.release("straight")
    begun = time.monotonic()
    with release.installed():
        print(f"installed after {seconds_since(begun)}")
        until(release.running, PATIENCE, "the gang runs")
        print(f"zero nodes to a gang: {seconds_since(begun)}")
        assert len(release.claims) == 3
        service = platform.plane.api.get("services", "straight", platform.namespace)["spec"]  # the pods' names need it
        assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
        until_completed(release, PATIENCE)
        print(f"to the end of the run: {seconds_since(begun)}")
        assert release.restarts == 0
        yield release


def bought(platform: Platform) -> list[str]:
    """Names of Karpenter's nodes, of whichever release."""
    nodes = [node["metadata"] for node in platform.plane.api.list("nodes")]
    return [metadata["name"] for metadata in nodes if "karpenter.sh/nodepool" in metadata["labels"]]


def test_from_zero_nodes_to_a_model_in_the_bucket(platform: Platform, straight: Release) -> None:
    assert {"model.safetensors", "tokenizer.json", "run.json"} <= platform.model("straight").keys()
    assert steps(platform, "straight") == list(range(1, STEPS + 1))


def steps(platform: Platform, name: str) -> list[int]:
    """The steps that a run logged a loss of, in their order."""
    return [line["step"] for line in metrics(platform.checkpoints(name)) if "loss" in line["metrics"]]


def story(platform: Platform, name: str) -> dict[str, Any]:
    """What run.json says of the run's way."""
    said: dict[str, Any] = json.loads(platform.model(name)["run.json"])["story"]
    return said


def resumed_after(platform: Platform, name: str) -> list[float]:
    """Seconds from each notice that steps were agreed to end at until the run's steps began again."""
    lines = map(json.loads, (platform.checkpoints(name) / "story.jsonl").read_text().splitlines())
    times = [(line["event"], line["time"]) for line in lines if line["event"] in ("notice", "ready")]
    return [after - told for (event, told), (_, after) in pairwise(times) if event == "notice"]


def assert_same_weights(platform: Platform, name: str, *, share: float) -> None:
    """Equal to the straight run's but for the order in which gradients were added: `share` of the weights' norm."""
    ours, theirs = (load(platform.model(run)["model.safetensors"]) for run in (name, "straight"))
    assert ours.keys() == theirs.keys()
    apart = sum(float(((ours[tensor] - theirs[tensor]) ** 2).sum()) for tensor in theirs)
    print(f"{name}: {(apart / sum(float((each**2).sum()) for each in theirs.values())) ** 0.5:.1e} apart")
    assert apart <= share**2 * sum(float((weights**2).sum()) for weights in theirs.values())


def assert_nothing_was_lost(platform: Platform, release: Release, *, notices: int, share: float) -> None:
    """Every step was done once, every pod left as it should, and the weights are the straight run's.

    Args:
        notices: those that the run's story must know: all that came once it had looked for checkpoints.
        share: of the weights' norm.
    """
    assert set(exit_codes(release)) == {0, 75}
    assert steps(platform, release.name) == list(range(1, STEPS + 1))
    said = story(platform, release.name)
    found = [said[name] for name in ("interruptions", "crashes", "lost", "steps_repeated")]
    assert found == [notices, 0, 0, 0]
    seconds = ", ".join(f"{seconds:.1f}" for seconds in resumed_after(platform, release.name))
    print(f"{release.name}: from notices to steps again: {seconds} s")
    assert_same_weights(platform, release.name, share=share)


def test_notices_at_any_moment_cost_no_step(platform: Platform, straight: Release) -> None:
    often = {"checkpoint": {"save_every": SAVE_EVERY}}
    release = platform.release("noticed", nodePool=KEPT, training=often, preflight=UNCHECKED)
    with release.installed():
        start = Start.of(platform, release).noticed(starting, 1)
        for number in range(NOTICES):
            start = start.noticed(training, number % 3)
        start = start.noticed(saving, 2)
        start = start.noticed(training, 0, 1)
        platform.uploads.clear()
        start.noticed(publishing, 1)
        until_completed(release, PATIENCE)
        # Volcano takes a pod that was deleted for one that failed, whatever it ended with: it begins once more, and a
        # finished run that is started again ends at once.
        assert release.logs().count("holds this run's complete output already") == 1
        assert release.restarts == NOTICES + 4
    assert_nothing_was_lost(platform, release, notices=NOTICES + 2, share=1e-6)


def test_a_run_of_one_node_survives_every_notice(platform: Platform, straight: Release) -> None:
    release = platform.release("alone", nodes=1, preflight=UNCHECKED)
    moments = []
    with release.installed():
        start = Start.of(platform, release)
        for number in range(NOTICES_ALONE):
            left = STEPS - len(steps(platform, "alone"))  # each notice in training takes one, or some
            moments.append(training if number % 3 == 0 and left > STEPS / 2 else starting)
            start = start.noticed(moments[-1], 0)
        until_completed(release, PATIENCE)
        assert release.restarts == NOTICES_ALONE
    assert_nothing_was_lost(platform, release, notices=moments.count(training), share=1e-5)


def test_a_node_that_dies_without_a_word_is_replaced(platform: Platform, straight: Release) -> None:
    api = platform.plane.api
    often = {"checkpoint": {"save_every": SAVE_EVERY}}
    release = platform.release("dies", nodePool=KEPT, training=often, preflight=UNCHECKED)
    with release.installed():
        start = Start.of(platform, release)
        node = start.pods[1]["spec"]["nodeName"]
        with start.held(past_a_checkpoint):
            begun = time.monotonic()
            api.patch("nodes", node, {"metadata": {"annotations": {UNPLUGGED: "true"}}})
            until(lambda: not start.ranks[1].is_running(), 60, "its processes are dead")
        until(lambda: not is_ready(api.get("nodes", node)), 60, "the control plane notices")
        print(f"death to its notice: {seconds_since(begun)}")
        api.delete("nodes", node)  # as the cloud's controller does with a node whose machine is gone
        until(lambda: release.restarts >= 1, PATIENCE, "Volcano restarts the gang")
        print(f"death to restart: {seconds_since(begun)}")
        Start.of(platform, release)
        print(f"death to gang: {seconds_since(begun)}")
        until_completed(release, PATIENCE)
    # The others waited for it in a collective; they left by themselves, once they were told that the gang restarts: the
    # first because it hears nothing, the second perhaps because the first has gone.
    assert exit_codes(release) == [76, 76, 0, 0, 0]
    logs = [start.log(node) for node in (0, 2)]
    assert any("nothing was heard of rank 1" in log for log in logs)
    assert all("nothing was heard of rank 1" in log or "another rank is lost" in log for log in logs)
    assert sorted(set(steps(platform, "dies"))) == list(range(1, STEPS + 1))
    assert 1 <= story(platform, "dies")["steps_repeated"] <= 2 * SAVE_EVERY  # one may have been under way
    assert_same_weights(platform, "dies", share=1e-6)


def test_the_nodes_of_a_finished_run_are_given_back(platform: Platform, straight: Release) -> None:
    until(lambda: straight.claims == [], 120, "its nodes are given back")
    assert straight.phase == "Completed"
