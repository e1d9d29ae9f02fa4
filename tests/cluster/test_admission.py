"""What a namespace that enforces `restricted` admits of the run's pod, and what preflight's account may do."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.cluster.api import ApiError, Object
from tests.cluster.plane import CONFIGURATION
from tests.cluster.platform import Platform
from tests.cluster.test_security import account_token, allowed, may

QUEUES = ("scheduling.volcano.sh", "queues")


@pytest.mark.parametrize(
    ("of_pod", "of_container"),
    [
        pytest.param({}, {"privileged": True, "allowPrivilegeEscalation": True}, id="privileged"),
        pytest.param({}, {"runAsUser": 0}, id="root"),
        pytest.param({}, {"allowPrivilegeEscalation": True}, id="escalation"),
        pytest.param({}, {"capabilities": {"add": ["IPC_LOCK"]}}, id="capability"),
        pytest.param({"hostNetwork": True}, {}, id="the node's network"),
        pytest.param({"hostPID": True}, {}, id="the node's processes"),
        pytest.param({"volumes": [{"name": "node", "hostPath": {"path": "/"}}]}, {}, id="the node's files"),
    ],
)
def test_the_pod_is_admitted_and_no_pod_that_could_reach_the_machine(
    platform: Platform, of_pod: dict[str, Any], of_container: dict[str, Any]
) -> None:
    objects = platform.release("admitted").objects()
    (job,) = [found for found in objects if found["apiVersion"] == "batch.volcano.sh/v1alpha1"]
    pod: Object = {"apiVersion": "v1", "kind": "Pod", **job["spec"]["tasks"][0]["template"]}
    pod["metadata"]["name"] = "admitted"
    pod["spec"]["serviceAccountName"] = "default"  # the release's is not there
    platform.plane.api.apply(pod, platform.namespace, dry_run=True)

    variant = copy.deepcopy(pod)
    variant["spec"] |= {**of_pod, "volumes": pod["spec"]["volumes"] + of_pod.get("volumes", [])}
    variant["spec"]["containers"][0]["securityContext"] |= of_container
    with pytest.raises(ApiError, match='violates PodSecurity "restricted:latest"'):
        platform.plane.api.apply(variant, platform.namespace, dry_run=True)


def test_preflights_account_may_read_its_queue_and_the_schedulers_configuration(platform: Platform) -> None:
    api = platform.plane.api
    kinds = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding")
    manifests = [
        found
        for found in platform.release("asks").objects()
        if found["kind"] in kinds and "helm.sh/hook" in found["metadata"].get("annotations", {})
    ]
    assert sorted(found["kind"] for found in manifests) == sorted(kinds)
    try:
        for manifest in manifests:
            api.apply(manifest, platform.namespace)
        account = api.with_token(account_token(platform.plane, platform.namespace, "asks"))
        assert allowed(account, platform.namespace) == set()  # of things without a name
        queue = f"asks.{platform.namespace}"
        assert may(account, "get", *QUEUES, queue)
        assert may(account, "get", "", "configmaps", CONFIGURATION["name"], CONFIGURATION["namespace"])
        assert not may(account, "get", *QUEUES, "default")
        assert not any(may(account, verb, *QUEUES, queue) for verb in ("update", "patch", "delete"))
    finally:
        for manifest in manifests:
            api.remove(manifest, platform.namespace)
