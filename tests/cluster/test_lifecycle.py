"""What the chart's gang does where nothing trains: it crashes, is upgraded, has neighbours."""

from __future__ import annotations

from functools import partial

import pytest

from tests.cluster.helm import Release
from tests.cluster.plane import until
from tests.cluster.platform import SLEEP, Platform, instead_of_training

PATIENCE = 180


def test_a_crash_loop_ends_at_max_retry(platform: Platform) -> None:
    # One pod alone: where all end in one instant, Volcano may give the Job up at once.
    program = "os.environ['NODE_RANK'] == '1' and (print('it broke', flush=True), os._exit(1)); time.sleep(3600)"
    values = instead_of_training(platform, "crash", program)
    release = platform.release("crash", **values, gang={"maxRetry": 3})
    with release.installed():
        until(lambda: release.phase == "Failed", PATIENCE, "the Job is given up")
        assert release.restarts == 3
        assert release.logs().count("it broke") == 3


def test_an_upgrade_that_would_change_the_run_is_refused_in_words(platform: Platform) -> None:
    release = platform.release("frozen", **instead_of_training(platform, "frozen", SLEEP))
    with release.installed():
        until(release.running, PATIENCE, "the gang runs")
        before = [pod["metadata"]["uid"] for pod in release.pods]
        done = release.upgrade("--set-json", "training.train.learning_rate=0.00001")
        assert done.returncode != 0
        assert "install" in done.stderr
        assert "learning_rate" in done.stderr or "training" in done.stderr
        done = release.upgrade("--set", "nodePool.consolidateAfter=20s")
        assert done.returncode == 0, done.stderr
        done = release.run("rollback", release.name, "1")
        assert done.returncode == 0, done.stderr
        assert [pod["metadata"]["uid"] for pod in release.pods] == before


def test_two_releases_touch_each_other_in_nothing(platform: Platform) -> None:
    values = instead_of_training(platform, "neighbours", SLEEP)
    first, second = (platform.release(name, **values, nodes=2) for name in ("first", "second"))
    with first.installed(), second.installed():
        for release in (first, second):
            until(release.running, PATIENCE, f"{release.name} runs")
        nodes = {release.name: {pod["spec"]["nodeName"] for pod in release.pods} for release in (first, second)}
        assert not nodes["first"] & nodes["second"]
        before = [pod["metadata"]["uid"] for pod in second.pods]
        first.uninstall()
        until(lambda: first.claims == [], PATIENCE, "the first's nodes are given back")
        assert [pod["metadata"]["uid"] for pod in second.pods] == before
        assert second.running()


@pytest.mark.parametrize("capacity", ["spot", "on-demand"])
def test_what_may_be_bought_is_what_values_say(platform: Platform, capacity: str) -> None:
    types = ["spot", "on-demand"] if capacity == "spot" else ["on-demand"]
    values = instead_of_training(platform, "capacity", SLEEP)
    release = platform.release(f"buys-{capacity}", **values, nodes=2, nodePool={"capacityTypes": types})
    with release.installed():
        until(partial(has_claims, release, 2), PATIENCE, "two nodes are bought")
        labels = [claim["metadata"]["labels"]["karpenter.sh/capacity-type"] for claim in release.claims]
        assert labels == [capacity, capacity]


def has_claims(release: Release, count: int) -> bool:
    """Whether that many nodes are there, and what each is is known."""
    claims = release.claims
    return len(claims) == count and all("karpenter.sh/capacity-type" in claim["metadata"]["labels"] for claim in claims)
