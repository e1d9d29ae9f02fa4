"""Which changes of the values are another run: an upgrade compares what the Job was made from with what it would be."""

from __future__ import annotations

import pytest

from tests.chart.helm import template
from tests.process import ROOT


def frozen(*settings: str) -> str:
    arguments = [word for setting in settings for word in ("--set", setting)]
    objects = template("helm4", "-f", ROOT / "values/grpo.yaml", *arguments)
    (job,) = [found for found in objects if found["apiVersion"] == "batch.volcano.sh/v1alpha1"]
    return str(job["metadata"]["annotations"]["preference-tuning/frozen"])


@pytest.mark.parametrize(
    "setting",
    [
        "gang.priorityClassName=research",
        "gang.waitTimeout=",
        "networkPolicy.enabled=false",
        "nodePool.consolidateAfter=12m",
        "nodePool.capacityTypes={spot,on-demand}",
        "cost.hours.high=9",
        "preflight.checks={data}",
    ],
)
def test_what_is_not_the_jobs_may_change(setting: str) -> None:
    assert frozen(setting) == frozen()


@pytest.mark.parametrize(
    "setting",
    [
        "training.train.seed=7",
        "nodes=4",
        "image.tag=1.2.3",
        "queue.weight=2",
        "storage.fsx.capacityGiB=7200",
        "storage.keep=true",
        "gang.maxRetry=50",
        "nodePool.instanceTypes={p5.48xlarge}",
        "podLabels.team=research",
    ],
)
def test_what_the_job_its_queue_and_its_storage_are_made_from_may_not(setting: str) -> None:
    assert frozen(setting) != frozen()
