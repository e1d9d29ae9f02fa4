"""Where the chart repeats what the program says, the two agree."""

from __future__ import annotations

from typing import Any

import yaml

from entrypoint.conf import Checkpoint
from entrypoint.errors import EXIT_REFUSED
from entrypoint.gang.__main__ import parse
from entrypoint.gang.watcher import Limits
from entrypoint.launch.topology import DEFAULT_PORT
from entrypoint.preflight.__main__ import CHECKS, DEADLINE
from tests.chart.helm import CHART, run, template
from tests.process import ROOT

DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def test_a_pod_lives_longer_than_its_program_takes_to_save() -> None:
    least = Checkpoint().grace_seconds + 15
    assert DEFAULTS["gang"]["gracePeriodSeconds"] >= least
    for given, refused in ((least, False), (least - 1, True)):
        done = run(
            "helm4", "template", CHART, "-f", ROOT / "values/grpo.yaml", "--set", f"gang.gracePeriodSeconds={given}"
        )
        assert (done.returncode != 0) == refused, done.stderr


def test_preflights_checks_and_deadline_are_the_programs() -> None:
    assert tuple(DEFAULTS["preflight"]["checks"]) == CHECKS
    assert DEFAULTS["preflight"]["deadlineSeconds"] == DEADLINE


def test_the_job_knows_the_programs_exit_code_and_port() -> None:
    objects = template("helm4", "-f", ROOT / "values/grpo.yaml")
    (job,) = [found for found in objects if found["apiVersion"] == "batch.volcano.sh/v1alpha1"]
    assert job["spec"]["policies"][0] == {"exitCode": EXIT_REFUSED, "action": "AbortJob"}
    env = job["spec"]["tasks"][0]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "MASTER_PORT", "value": str(DEFAULT_PORT)} in env


def test_the_watchers_job_knows_the_programs_options_and_exit_code() -> None:
    objects = template("helm4", "-f", ROOT / "values/grpo.yaml", "--namespace", "training")
    (job,) = [found for found in objects if "-gang-" in found["metadata"]["name"]]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    records = [found["metadata"]["name"] for found in objects if found["kind"] == "ConfigMap"]
    limits = Limits(wait=1800, rest=900, retries=10)
    assert parse(container["args"]) == (("training", "run-042"), "run-042-gang", limits)
    assert "run-042-gang" in records
    assert job["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [EXIT_REFUSED]
