"""What the API server holds, before a release and after it."""

from __future__ import annotations

import contextlib
from functools import cache

from tests.cluster.api import Api
from tests.cluster.plane import Plane, until

EVERY = 0.5  # seconds between two snapshots: each asks for every kind
NODE, CSI_NODE = "nodes. /", "csinodes.storage.k8s.io /"  # a node's own objects go a moment after it
UNSTEADY = ("events", "leases", "componentstatuses")


def everything(plane: Plane) -> set[str]:
    """Every object that the API server holds, as `resource namespace/name`, but events, leases and what is hidden."""
    return {
        f"{resource} {item['metadata'].get('namespace', '')}/{item['metadata']['name']}"
        for resource in listable(plane.api)
        for item in plane.api.list_names(resource)
    }


@cache
def listable(api: Api) -> list[str]:
    """All resources that can be listed; a plane defines none once it is ready."""
    found = []
    for group in ["", *(group["name"] for group in api.request("GET", "/apis")["groups"])]:
        version = api.request("GET", f"/apis/{group}")["preferredVersion"]["groupVersion"] if group else ""
        for resource in api.request("GET", f"/apis/{version}" if group else "/api/v1")["resources"]:
            name = str(resource["name"])
            if "/" not in name and "list" in resource["verbs"] and name not in UNSTEADY:
                found.append(f"{name}.{group}")
    return found


def before_a_release(plane: Plane) -> set[str]:
    """Everything that the API server holds, once what went with the releases before is gone: the collectors' work."""
    seen: list[set[str]] = [set(), set()]

    def settled() -> bool:
        seen.append(everything(plane))
        passing = ("nodeclaims.karpenter.sh", "podgroups.scheduling.volcano.sh", "pods.")
        own = {NODE + name.removeprefix(CSI_NODE) for name in seen[-1] if name.startswith(CSI_NODE)}
        return seen[-1] == seen[-2] and own <= seen[-1] and not any(name.startswith(passing) for name in seen[-1])

    until(settled, 120, "no run is left, and nothing changes", every=EVERY)
    return seen[-1]


def until_as_before(plane: Plane, before: set[str], seconds: float) -> None:
    """Wait until the API server holds exactly what it held `before`.

    Raises:
        AssertionError: it does not; the message names what is left and what is missing.
    """
    with contextlib.suppress(TimeoutError):
        until(lambda: everything(plane) == before, seconds, "everything is as it was", every=EVERY)
    now = everything(plane)
    assert now == before, f"left behind: {sorted(now - before)}; missing: {sorted(before - now)}"
