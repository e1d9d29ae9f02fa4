"""What is bought where not everything is to be had."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from tests.cluster.api import Object
from tests.cluster.plane import until
from tests.cluster.platform import SLEEP, Platform, asleep, instead_of_training
from tests.cluster.release import Release, seconds_since

PATIENCE = 180


@contextmanager
def only(platform: Platform, capacity_type: str) -> Iterator[None]:
    """The other capacity type can't be had during the block."""
    platform.plane.karpenter.offer(capacity_type)
    try:
        yield
    finally:
        platform.plane.karpenter.offer()


def test_where_spot_is_taken_away_on_demand_is_bought_and_the_other_way_round(platform: Platform) -> None:
    values = instead_of_training(platform, "falls-back", SLEEP)
    # The node that is not lost stays while another is bought, however long that takes here.
    either = {"capacityTypes": ["spot", "on-demand"], "consolidateAfter": "120s"}
    release = platform.release("falls-back", **values, nodes=2, nodePool=either)
    with release.installed():
        until(partial(asleep, release), PATIENCE, "the gang runs")
        assert capacity(release) == ["spot", "spot"]  # the cheaper one, while it is there
        with only(platform, "on-demand"):
            replace(release, "spot")
            assert capacity(release) == ["on-demand", "spot"]
        with only(platform, "spot"):
            replace(release, "on-demand")
            assert capacity(release) == ["spot", "spot"]


def test_what_values_do_not_allow_is_not_bought(platform: Platform) -> None:
    values = instead_of_training(platform, "waits", SLEEP)
    with only(platform, "on-demand"):
        allowed = platform.release("on-demand", **values, nodes=2, nodePool={"capacityTypes": ["on-demand"]})
        release = platform.release("spot-alone", **values, nodes=2)
        with release.installed(), allowed.installed():
            until(partial(asleep, allowed), PATIENCE, "the gang that may use on-demand runs beside one that waits")
            assert capacity(allowed) == ["on-demand", "on-demand"]
            assert release.claims == []
            platform.plane.karpenter.offer()
            until(partial(asleep, release), PATIENCE, "spot is back, and the gang runs")
            assert capacity(release) == ["spot", "spot"]


def replace(release: Release, lost: str) -> None:
    """Take away a node that was bought as `lost`, and wait until the gang runs on another."""
    claims = release.claims
    gone = next(claim for claim in claims if of(claim) == lost)
    restarts, begun = release.restarts, time.monotonic()
    release.plane.api.delete("nodeclaims.karpenter.sh", gone["metadata"]["name"])
    until(lambda: release.restarts > restarts, PATIENCE, "Volcano restarts the gang")
    until(partial(asleep, release), PATIENCE, "the gang runs again")
    print(f"a {lost} node taken away to a gang: {seconds_since(begun)}")


def capacity(release: Release) -> list[str]:
    """What the gang's nodes were bought as."""
    nodes = {pod["spec"]["nodeName"] for pod in release.pods}
    return sorted(of(claim) for claim in release.claims if claim.get("status", {}).get("nodeName") in nodes)


def of(claim: Object) -> str:
    return str(claim["metadata"]["labels"]["karpenter.sh/capacity-type"])
