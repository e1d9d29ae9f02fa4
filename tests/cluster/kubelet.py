"""The kubelet of the tests:  python -m tests.cluster.kubelet FOLDER NETWORK

All nodes are its own. Pods that a scheduler has bound run as processes of this machine, each pod in a network
namespace of its own. What it leaves out: images, resource limits, probes, lifecycle hooks and NetworkPolicies.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from tests.cluster.api import Api, Object
from tests.cluster.hosts import Hosts
from tests.cluster.logs import serve_logs
from tests.cluster.network import Network
from tests.cluster.nodes import Nodes
from tests.cluster.pod import Machine, Pod

ENDED = ("Succeeded", "Failed")


class Kubelet:
    """Follows the pods of one plane."""

    def __init__(self, folder: Path, network: Network) -> None:
        self.api = Api.of(folder / "kubeconfig")
        port = self.api.server.rpartition(":")[2]
        cluster = {"KUBERNETES_SERVICE_HOST": network.gateway, "KUBERNETES_SERVICE_PORT": port}
        hosts = Hosts(folder / "hosts", network.gateway)
        self._machine = Machine(self.api, network, hosts, folder, cluster)
        self._pods: dict[str, Pod] = {}
        certificates = folder / "certs"
        logs = serve_logs(self.log, certificates / "serving.crt", certificates / "serving.key")
        self._nodes = Nodes(self.api, logs, self._node_died)

    def run(self) -> None:
        """Until the process ends."""
        self._nodes.start()
        for kind, pod in self.api.follow("pods"):
            try:
                self._handle(kind, pod)
            except Exception as error:  # one pod's trouble is not the others'
                print(f"pod {pod['metadata']['name']}: {error!r}", flush=True)

    def end(self) -> None:
        """Kill every pod, without a word."""
        pods = list(self._pods.values())
        for pod in pods:
            pod.kill()
        for pod in pods:
            pod.join(5)

    def log(self, namespace: str, name: str, container: str) -> Path | None:
        """A container's log of the pod that has this name now, or had it last."""
        found = sorted((self._machine.folder / "pods" / namespace).glob(f"{name}-????????/{container}.log"))
        return max(found, key=lambda file: file.stat().st_mtime, default=None)

    def _handle(self, kind: str, pod: Object) -> None:
        metadata = pod["metadata"]
        known = self._pods.get(metadata["uid"])
        if kind == "DELETED":  # removed without its kubelet's consent: its machine is taken for dead
            if known is not None:
                known.kill()
                del self._pods[metadata["uid"]]
        elif known is None and pod["spec"].get("nodeName") and pod.get("status", {}).get("phase") not in ENDED:
            known = self._pods[metadata["uid"]] = Pod(self._machine, pod)
            if "deletionTimestamp" in metadata:
                known.stop(0)
            known.start()
            print(f"{metadata['namespace']}/{metadata['name']} starts on {known.node}", flush=True)
        elif known is not None and "deletionTimestamp" in metadata:
            grace = metadata.get("deletionGracePeriodSeconds", 0)
            print(f"{metadata['namespace']}/{metadata['name']} is to end within {grace} s", flush=True)
            known.stop(grace)

    def _node_died(self, name: str) -> None:
        for pod in list(self._pods.values()):
            if pod.node == name:
                print(f"{pod.namespace}/{pod.name} dies with {name}", flush=True)
                pod.kill()


def main() -> None:
    """Run until SIGTERM."""
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    kubelet = Kubelet(folder, Network(number))

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=kubelet.run, daemon=True).start()
    try:
        threading.Event().wait()
    finally:
        kubelet.end()


if __name__ == "__main__":
    main()
