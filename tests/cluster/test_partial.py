"""A gang of which a node can't be had: those that came are given back, and it starts once there are enough."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster.api import Object
from tests.cluster.instance_types import TYPES
from tests.cluster.plane import until
from tests.cluster.platform import Platform, instead_of_training
from tests.cluster.release import Release, seconds_since

PATIENCE = 400
CPUS = TYPES["p5en.48xlarge"][0]
DONE = "print('done', flush=True); os._exit(0)"
SOON = {"consolidateAfter": "5s"}  # nodes that are given back go
UNCHECKED = {"enabled": False}  # of a node class that comes after its release
# Where an abort is awaited there is little time for the gang, where nodes are, much; where neither may come of itself,
# the gang rests for long. An upgrade changes which.
LONG = "10m"


@contextmanager
def installed_with_nodes(platform: Platform, release: Release, nodes: int) -> Iterator[None]:
    """The release during the block, with a pool that may have so many nodes: without its node class it buys none."""
    api, node_class = platform.plane.api, release.values["nodeClass"]["name"]
    made = {"apiVersion": "karpenter.kwok.sh/v1alpha1", "kind": "KWOKNodeClass", "metadata": {"name": node_class}}
    try:
        with release.installed():
            limit_nodes(release, nodes)
            api.apply(made)
            yield
        until(lambda: release.claims == [], PATIENCE, "the nodes are gone")
    finally:
        api.delete("kwoknodeclasses.karpenter.kwok.sh", node_class)


def limit_nodes(release: Release, nodes: int) -> None:
    """Let the pool have so many; by their CPUs, of which the chart says nothing, so that no upgrade opens it."""
    limits = {"spec": {"limits": {"cpu": str(CPUS * nodes)}}}
    release.plane.api.patch("nodepools.karpenter.sh", f"{release.name}.{release.namespace}", limits)


def change(release: Release, nodes: int, **limits: str) -> None:
    """Upgrade to other `gang` values, which is another watcher, and to so many nodes; for more the gang is aborted."""
    arguments = [f"--set=gang.{name}={limit}" for name, limit in limits.items()]
    done = release.upgrade(*arguments)
    assert done.returncode == 0, done.stderr
    limit_nodes(release, nodes)


def test_two_nodes_that_wait_for_a_third_are_given_back_until_it_can_be_had(platform: Platform) -> None:
    values = instead_of_training(platform, "partial", DONE)
    values |= {"nodePool": SOON, "nodeClass": {"name": "partial"}, "clusterChecks": UNCHECKED}
    release = platform.release("partial", **values, gang={"waitTimeout": LONG, "retryAfter": LONG})
    with installed_with_nodes(platform, release, 2):
        until(lambda: len(release.claims) == 2, PATIENCE, "two nodes are bought")
        change(release, 2, waitTimeout="5s")
        begun = time.monotonic()
        until(lambda: release.phase == "Aborted", PATIENCE, "the gang is given up for now")
        print(f"two nodes to the abort: {seconds_since(begun)}")
        assert "done" not in release.logs()
        until(lambda: release.claims == [], PATIENCE, "the two are given back")
        print(f"two nodes to none: {seconds_since(begun)}")
        assert release.phase == "Aborted"
        reason = "not all pods ran within 5s (pods: 3 pending, of 3): aborted, its nodes may go; tried again in 10m"
        assert reason in watcher_log(release)
        assert [reason in message for message in events(release, "GangTimeout")] == [True]
        change(release, 3, waitTimeout=LONG, retryAfter="20s")
        until(lambda: release.phase == "Completed", PATIENCE, "the run is resumed and ends")
        print(f"two nodes to the end of the run: {seconds_since(begun)}")
        assert release.restarts == 1
        until(lambda: condition(release, "Complete"), PATIENCE, "its watcher ends with it")
        assert watcher_log(release).splitlines()[-1].startswith("gang: the run has ended, its Job is Completed")


def test_what_somebody_suspends_stays_and_what_never_starts_is_given_up(platform: Platform) -> None:
    values = instead_of_training(platform, "never", DONE)
    values |= {"nodePool": SOON, "nodeClass": {"name": "never"}, "clusterChecks": UNCHECKED}
    release = platform.release("never", **values, gang={"waitTimeout": "5s", "retryAfter": LONG, "retries": 1})
    left = "gang: aborted by exit code 64 or by somebody, or given up"
    with installed_with_nodes(platform, release, 2):
        until(lambda: '"version": null' not in record(release), PATIENCE, "aborted by the watcher, and at rest")
        tell(release, "AbortJob")
        until(lambda: events(release, "GangStaysAborted"), PATIENCE, "a suspend is noticed")
        assert (release.phase, release.restarts) == ("Aborted", 0)
        name = watcher(release)["metadata"]["name"]
        platform.plane.api.delete("jobs.batch", name, release.namespace, propagationPolicy="Background")
        change(release, 2, retryAfter="20s")
        until(lambda: left in watcher_log(release), PATIENCE, "an upgrade starts another watcher")
        tell(release, "ResumeJob")
        until(lambda: events(release, "GangGivenUp"), PATIENCE, "resumed by hand it is watched again, and given up")
        assert (release.phase, release.restarts) == ("Aborted", 2)
        assert len(events(release, "GangTimeout")) == 3
        until(lambda: release.claims == [], PATIENCE, "the nodes are given back")
        change(release, 3, waitTimeout=LONG, retryAfter="20s")
        assert release.job["metadata"]["uid"] in record(release)
        until(lambda: left in watcher_log(release), PATIENCE, "its watcher finds it as it was left")
        assert release.phase == "Aborted"
        tell(release, "ResumeJob")
        until(lambda: release.phase == "Completed", PATIENCE, "resumed by hand, with nodes enough, it ends")
        until(lambda: condition(release, "Complete"), PATIENCE, "its watcher ends with it")


def tell(release: Release, action: str) -> None:
    """What `vcctl job suspend` and `resume` do."""
    metadata = release.job["metadata"]
    owner = {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "name": release.name, "uid": metadata["uid"]}
    command = {
        "apiVersion": "bus.volcano.sh/v1alpha1",
        "kind": "Command",
        "metadata": {"generateName": f"{release.name}-", "ownerReferences": [{**owner, "controller": True}]},
        "action": action,
        "target": {**owner, "controller": True},
    }
    release.plane.api.create("commands.bus.volcano.sh", command, release.namespace)


def events(release: Release, reason: str) -> list[str]:
    """The messages of the Job's events that have this reason."""
    uid = release.job["metadata"]["uid"]
    found = [event for event in release.plane.api.list("events", release.namespace) if event["reason"] == reason]
    return [event["message"] for event in found if event["involvedObject"].get("uid") == uid]


def record(release: Release) -> str:
    """What the watcher remembers, as it wrote it; says null for what it does not know."""
    found = release.plane.api.get("configmaps", f"{release.name}-gang", release.namespace)
    return str(found.get("data", {}).get("record", '"version": null'))


def watcher_log(release: Release) -> str:
    """What the pods of the watcher's own Job, the one that is there now, have written."""
    folder = release.plane.folder / "pods" / release.namespace
    return "".join(file.read_text() for file in folder.glob(f"{watcher(release)['metadata']['name']}-*/*.log"))


def watcher(release: Release) -> Object:
    """The watcher's own Job."""
    labels = f"app.kubernetes.io/instance={release.name},app.kubernetes.io/component=gang-watcher"
    (job,) = release.plane.api.list("jobs.batch", release.namespace, labels=labels)
    return job


def condition(release: Release, kind: str) -> str:
    """The reason of a condition that the watcher's own Job has; empty: it has not."""
    found = watcher(release).get("status", {}).get("conditions", [])
    return next((str(each.get("reason")) for each in found if each["type"] == kind and each["status"] == "True"), "")
