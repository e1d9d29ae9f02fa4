"""Which changes of the values are another run: an upgrade compares what the Job was made from with what it would be."""

from __future__ import annotations

import json

import pytest

from tests.chart.helm import template
from tests.process import ROOT


def frozen(*settings: str) -> tuple[str, set[tuple[str, str]]]:
    """What the Job was made from: the hash of all, and of each value."""
    arguments = [word for setting in settings for word in ("--set", setting)]
    objects = template("helm4", "-f", ROOT / "values/grpo.yaml", *arguments)
    (job,) = [found for found in objects if found["apiVersion"] == "batch.volcano.sh/v1alpha1"]
    annotations = job["metadata"]["annotations"]
    return annotations["preference-tuning/frozen"], {*json.loads(annotations["preference-tuning/values"]).items()}


@pytest.mark.parametrize(
    "setting",
    [
        "gang.priorityClassName=research",
        "gang.waitTimeout=",
        "gang.retryAfter=1h",
        "gang.retries=3",
        "gang.watcherResources.requests.cpu=20m",
        "networkPolicy.enabled=false",
        "nodeClass.rootVolumeGiB=300",
        "nodePool.consolidateAfter=12m",
        "nodePool.expireAfter=720h",
        "nodePool.capacityTypes={spot,on-demand}",
        "cluster.name=other",
        "clusterChecks.enabled=false",
        "cost.hours.high=9",
        "podMonitor.namespace=other",
        "podMonitor.labels.team=a",
        "preflight.checks={data}",
        "rbac.create=false",
        "serviceAccount.annotations.team=a",
        "storage.saveSeconds=100",
        "storage.trainedBillions=7",
    ],
)
def test_what_is_not_the_jobs_may_change_and_is_never_named(setting: str) -> None:
    assert frozen(setting) == frozen()


@pytest.mark.parametrize(
    "setting",
    [
        "training.train.seed=7",
        "training.checkpoint.mirror=null",
        "nodes=4",
        "image.tag=1.2.3",
        "global.imageRegistry=acme.io",
        "queue.weight=2",
        "storage.fsx.capacityGiB=7200",
        "storage.keep=true",
        "gang.maxRetry=50",
        "nodePool.instanceTypes={p5.48xlarge}",
        "nodePool.zones={us-east-2b}",
        "podLabels.team=research",
        "serviceAccount.name=trainer",
        "security.runAsUser=1234",
    ],
)
def test_what_the_job_its_queue_storage_and_zone_are_made_from_may_not_and_is_named(setting: str) -> None:
    (before, values), (now, changed) = frozen(), frozen(setting)
    assert now != before
    assert {key for key, _ in values ^ changed} == {setting.partition("=")[0]}
