"""Volcano's admission webhooks, registered by URL; its chart does it by Service, which needs a cluster network."""

from __future__ import annotations

import base64

from tests.cluster.api import Object

# path: (API group, version, resource, operations), as Volcano's chart enables them by default
ADMISSIONS: dict[str, tuple[str, str, str, list[str]]] = {
    "/jobs/mutate": ("batch.volcano.sh", "v1alpha1", "jobs", ["CREATE"]),
    "/jobs/validate": ("batch.volcano.sh", "v1alpha1", "jobs", ["CREATE", "UPDATE"]),
    "/cronjobs/validate": ("batch.volcano.sh", "v1alpha1", "cronjobs", ["CREATE", "UPDATE"]),
    "/podgroups/validate": ("scheduling.volcano.sh", "v1beta1", "podgroups", ["CREATE"]),
    "/queues/mutate": ("scheduling.volcano.sh", "v1beta1", "queues", ["CREATE"]),
    "/queues/validate": ("scheduling.volcano.sh", "v1beta1", "queues", ["CREATE", "UPDATE", "DELETE"]),
    "/hypernodes/validate": ("topology.volcano.sh", "v1alpha1", "hypernodes", ["CREATE", "UPDATE"]),
}


def webhook_configuration(path: str, server: str, authority: bytes) -> Object:
    """The object that makes the API server ask `server` (an https URL) about what `path` admits."""
    group, version, resource, operations = ADMISSIONS[path]
    _, plural, action = path.split("/")
    webhook = {
        "name": f"{action}{plural}.volcano.sh",
        "admissionReviewVersions": ["v1"],
        "clientConfig": {"url": server + path, "caBundle": base64.b64encode(authority).decode()},
        "failurePolicy": "Fail",
        "sideEffects": "NoneOnDryRun",
        "timeoutSeconds": 10,
        "namespaceSelector": {
            "matchExpressions": [
                {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["volcano-system", "kube-system"]}
            ]
        },
        "rules": [
            {
                "apiGroups": [group],
                "apiVersions": [version],
                "operations": operations,
                "resources": [resource],
                "scope": "*",
            }
        ],
    }
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration" if action == "mutate" else "ValidatingWebhookConfiguration",
        "metadata": {"name": f"volcano-admission-service-{plural}-{action}"},  # the manager waits for that name
        "webhooks": [webhook],
    }
