"""What the chart's gang does where nothing trains: it crashes, is upgraded, has neighbours, leaves a claim."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tests.cluster.counts import LATER
from tests.cluster.moments import Start, exit_codes
from tests.cluster.plane import until
from tests.cluster.platform import SLEEP, Platform, apply_keys, asleep, instead_of_training
from tests.cluster.release import ONGOING, Release, until_completed
from tests.cluster.snapshot import before_a_release, everything, until_as_before

PATIENCE = 180
# One pod alone: where all end in one instant, Volcano may give the Job up at once. And once the others are there: a
# signal that came before they can hear it would be lost.
ONE_BREAKS = """
import pathlib
folder = pathlib.Path("/checkpoints/crash", os.environ.get("RESTART_COUNT") or "0")
folder.mkdir(parents=True, exist_ok=True)
(folder / os.environ["NODE_RANK"]).touch()
while os.environ["NODE_RANK"] != "1" or len(list(folder.iterdir())) < 3:
    time.sleep(0.05)
print("it broke", flush=True)
os._exit(1)
"""


def test_a_node_that_ends_later_than_the_first_is_not_killed(platform: Platform) -> None:
    program = f"time.sleep({LATER} * int(os.environ['NODE_RANK']) / 2); os._exit(0)"
    release = platform.release("later", **instead_of_training(platform, "later", program))
    with release.installed():
        until_completed(release, PATIENCE)
        assert release.restarts == 0
    assert exit_codes(release) == [0, 0, 0]


def test_a_wrong_configuration_ends_the_job_for_good(platform: Platform) -> None:
    wrong = {"data": {"reward_column": "no_such_column"}}
    release = platform.release("wrong", nodes=2, training=wrong, preflight={"checks": []})
    with release.installed():
        start = Start.of(platform, release)
        until(lambda: release.phase not in (*ONGOING, "Aborting"), PATIENCE, "the Job ends")
        assert (release.phase, release.restarts) == ("Aborted", 0)
        left = {pod["metadata"]["uid"] for pod in release.pods}  # the pod that ended first stays
        logs = [start.log(node) for node, pod in enumerate(start.pods) if pod["metadata"]["uid"] in left]
        assert logs
        assert all("no_such_column" in log.splitlines()[-1] for log in logs)


def test_a_crash_loop_ends_at_max_retry(platform: Platform) -> None:
    values = instead_of_training(platform, "crash", ONE_BREAKS)
    release = platform.release("crash", **values, gang={"maxRetry": 3})
    with release.installed():
        until(lambda: release.phase == "Failed", PATIENCE, "the Job is given up")
        assert release.restarts == 3
        assert release.logs().count("it broke") == 3


def test_the_same_crash_on_every_node_is_told_in_words_and_not_given_up_before(platform: Platform) -> None:
    # The launcher is the real one, and its ranks' first act is to end: on three nodes within one second.
    program = "os.environ.get('WORLD_SIZE') and (print('it broke', flush=True), os._exit(1))"
    values = instead_of_training(platform, "bug", program)
    release = platform.release("bug", **values, training={"checkpoint": {"max_crashes": 2}})
    with release.installed():
        until(lambda: release.phase in ("Aborted", "Failed"), PATIENCE, "the Job is given up")
        assert (release.phase, release.restarts) == ("Aborted", 2), release.logs()
        assert "starts in a row crashed without a newer checkpoint" in release.logs()


def test_an_upgrade_that_would_change_the_run_is_refused_in_words(platform: Platform) -> None:
    values = instead_of_training(platform, "frozen", SLEEP)
    everything_before = before_a_release(platform.plane)
    release = platform.release("frozen", helm="helm3", **values)
    with release.installed():
        until(partial(asleep, release), PATIENCE, "the gang runs")
        before = [pod["metadata"]["uid"] for pod in release.pods]
        done = release.upgrade("--set-json", "training.train.learning_rate=0.00001")
        assert done.returncode != 0
        assert "got another run than frozen has (training.train.learning_rate)" in done.stderr
        done = release.upgrade("--set", "nodePool.consolidateAfter=20s")
        assert (done.returncode, consolidate_after(release)) == (0, "20s"), done.stderr
        done = release.run("rollback", release.name, "1")
        assert (done.returncode, consolidate_after(release)) == (0, "15s"), done.stderr
        assert [pod["metadata"]["uid"] for pod in release.pods] == before
    until_as_before(platform.plane, everything_before, PATIENCE)


def consolidate_after(release: Release) -> str:
    """How long a node of the release's may stay empty."""
    pool = release.plane.api.get("nodepools.karpenter.sh", f"{release.name}.{release.namespace}")
    return str(pool["spec"]["disruption"]["consolidateAfter"])


def test_a_claim_stays_where_that_is_asked_for_and_is_taken_up_again(platform: Platform) -> None:
    values = instead_of_training(platform, "kept", SLEEP)
    before = before_a_release(platform.plane)
    release = platform.release("kept", **values, nodes=1, storage={"keep": True})
    kept = {f"persistentvolumeclaims. {platform.namespace}/kept", f"persistentvolumes. /kept.{platform.namespace}"}
    try:
        for _ in range(2):
            with release.installed():
                until(partial(asleep, release), PATIENCE, "the run runs")
            until_as_before(platform.plane, before | kept, PATIENCE)
            claim = platform.plane.api.get("persistentvolumeclaims", "kept", platform.namespace)
            assert claim["status"]["phase"] == "Bound"
    finally:
        platform.plane.api.delete("persistentvolumeclaims", "kept", platform.namespace)
        platform.plane.api.delete("persistentvolumes", f"kept.{platform.namespace}")
    until_as_before(platform.plane, before, PATIENCE)


def test_two_releases_touch_each_other_in_nothing(platform: Platform) -> None:
    values = instead_of_training(platform, "neighbours", SLEEP)
    first, second = (platform.release(name, **values, nodes=2) for name in ("first", "second"))
    with first.installed(), second.installed():
        for release in (first, second):
            until(partial(asleep, release), PATIENCE, f"{release.name} runs")
        nodes = {release.name: {pod["spec"]["nodeName"] for pod in release.pods} for release in (first, second)}
        assert not nodes["first"] & nodes["second"]
        before = [pod["metadata"]["uid"] for pod in second.pods]
        first.uninstall()
        until(lambda: first.claims == [], PATIENCE, "the first's nodes are given back")
        assert [pod["metadata"]["uid"] for pod in second.pods] == before
        assert second.running()


def test_releases_of_one_name_in_two_namespaces_are_two(platform: Platform, namespace: str) -> None:
    other = replace(platform, namespace=namespace)
    apply_keys(other)
    releases = [
        place.release(
            "same",
            **{**instead_of_training(place, "same", SLEEP), "preflight": {"checks": ["config"]}},
            nodes=2,
            training={"method": {"name": method}},
        )
        for place, method in ((platform, "grpo"), (other, "dpo"))
    ]
    first, second = releases
    with second.installed():
        with first.installed():
            for release in releases:
                until(partial(asleep, release), PATIENCE, f"{release.namespace}'s runs")
            nodes = [{pod["spec"]["nodeName"] for pod in release.pods} for release in releases]
            assert not nodes[0] & nodes[1]
            before = {name for name in everything(platform.plane) if "same" in name and namespace in name}
        until(lambda: first.claims == [], PATIENCE, "the first's nodes are given back")
        assert before <= everything(platform.plane)
        assert second.running()
