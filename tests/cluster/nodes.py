"""Nodes kept alive: the ones that Karpenter makes, and an ordinary one that is always there."""

from __future__ import annotations

import datetime
import http.client
import threading
from collections.abc import Callable
from functools import partial

from tests.cluster.api import Api, ApiError, Object
from tests.cluster.container import now

PLATFORM = "platform-0"  # where what needs no GPU runs
DRIVER = "fsx.csi.aws.com"  # the storage driver that every node has
UNPLUGGED = "tests/unplugged"  # a node with this annotation dies without a word
LEASE_SECONDS = 40
HEARTBEAT = 3.0  # seconds between two renewals of every lease


class Nodes:
    """Says for every node of the cluster that its kubelet is well, until it is unplugged or gone."""

    def __init__(self, api: Api, port: int, died: Callable[[str], None]) -> None:
        """`port` is where logs are served; `died` is told a node's name when its machine is no more."""
        self._api, self._port, self._died = api, port, died
        self._alive: dict[str, Object] = {}
        self._with_storage: set[str] = set()  # those whose storage driver is registered

    def start(self) -> None:
        """Register the ordinary node and keep all alive, in threads that end with the process."""
        capacity = {"cpu": "16", "memory": "64Gi", "ephemeral-storage": "100Gi", "pods": "100"}
        labels = {"kubernetes.io/hostname": PLATFORM, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": PLATFORM, "labels": labels}}
        self._api.apply(node)
        self._api.patch("nodes", PLATFORM, {"status": {"capacity": capacity, "allocatable": capacity}}, sub="status")
        threading.Thread(target=self._follow, daemon=True).start()
        threading.Thread(target=self._renew, daemon=True).start()

    def _follow(self) -> None:
        for kind, node in self._api.follow("nodes"):
            name = node["metadata"]["name"]
            if kind == "DELETED" or UNPLUGGED in node["metadata"].get("annotations", {}):
                self._alive.pop(name, None)
                self._with_storage.discard(name)
                self._died(name)
            else:
                if self._alive.setdefault(name, node) is node:
                    self._register_storage(name, node)
                if not is_ready(node):
                    self._say_ready(name)

    def _register_storage(self, name: str, node: Object) -> None:
        """As a storage driver's agent does; Volcano binds no pod with a claim to a node without it."""
        driver = {"name": DRIVER, "nodeID": node["metadata"]["name"]}
        metadata = {"name": node["metadata"]["name"], "ownerReferences": [_owner(node)]}
        spec = {"drivers": [driver]}
        made = {"apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": metadata, "spec": spec}
        if self._quietly(partial(self._api.apply, made)):
            self._with_storage.add(name)

    def _say_ready(self, name: str) -> None:
        healthy = {"MemoryPressure": "False", "DiskPressure": "False", "PIDPressure": "False", "Ready": "True"}
        stamp = now()
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": name}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._port}},
            "phase": "Running",
            "conditions": [
                {
                    "type": kind,
                    "status": value,
                    "reason": "KubeletOfTheTests",
                    "message": "kept alive by tests/cluster",
                    "lastHeartbeatTime": stamp,
                    "lastTransitionTime": stamp,
                }
                for kind, value in healthy.items()
            ],
        }
        self._quietly(lambda: self._api.patch("nodes", name, {"status": status}, sub="status", strategic=True))

    def _renew(self) -> None:
        while True:
            for name, node in list(self._alive.items()):
                self._quietly(partial(self._lease, name, node))
                if name not in self._with_storage:
                    self._register_storage(name, node)
            threading.Event().wait(HEARTBEAT)

    def _lease(self, name: str, node: Object) -> None:
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": name, "namespace": "kube-node-lease", "ownerReferences": [_owner(node)]},
            "spec": {"holderIdentity": name, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": stamp},
        }
        self._api.apply(lease)

    def _quietly(self, call: Callable[[], object]) -> bool:
        try:
            call()
        except (ApiError, OSError, http.client.HTTPException) as error:  # gone in the meantime, or a server's end
            print(f"node: {error!r}", flush=True)
            return False
        return True


def is_ready(node: Object) -> bool:
    """Whether its kubelet was said to be well, lately."""
    conditions = node.get("status", {}).get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _owner(node: Object) -> Object:
    return {"apiVersion": "v1", "kind": "Node", "name": node["metadata"]["name"], "uid": node["metadata"]["uid"]}
