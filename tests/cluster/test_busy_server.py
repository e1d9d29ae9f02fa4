"""The kubelet of the tests and an API server that is too busy to answer: it hears, and is heard, a little later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from tests.cluster.api import Api, Object
from tests.cluster.hosts import Hosts
from tests.cluster.network import new_network
from tests.cluster.plane import until
from tests.cluster.pod import Machine, Pod
from tests.cluster.test_kubelet import RESTRICTED, shell
from tests.servers.kubernetes import Handle, Reply, kubernetes_api, refusal

BUSY = refusal(500, "etcdserver: request timed out")


@contextmanager
def server(folder: Path, handle: Handle) -> Iterator[Api]:
    with kubernetes_api(folder / "account", handle) as environment:
        address = ":".join(environment.values())
        yield Api(f"https://{address}", "a-token", folder / "account/ca.crt")


def test_the_pods_are_followed_on(tmp_path: Path) -> None:
    def listed(*names: str) -> Reply:
        items = [{"metadata": {"name": name, "uid": name}} for name in names]
        return 200, {"metadata": {"resourceVersion": "1"}, "items": items}

    too_old = {"type": "ERROR", "object": {"kind": "Status", "code": 410}}
    answers = iter([BUSY, listed("a"), BUSY, listed("a"), (200, too_old), listed("b")])
    with server(tmp_path, lambda *request: next(answers)) as api:
        seen = [(kind, pod["metadata"]["name"]) for kind, pod in islice(api.follow("pods"), 4)]
    assert seen == [("ADDED", "a"), ("ADDED", "a"), ("DELETED", "a"), ("ADDED", "b")]


def test_how_a_pod_fares_is_said_again(tmp_path: Path) -> None:
    phases: list[str] = []

    def handle(method: str, path: str, sent: Object) -> Reply:
        phases.append(sent["status"]["phase"])
        return BUSY if len(phases) % 2 else (200, {})

    metadata = {"name": "pod", "namespace": "busy", "uid": "1"}
    containers = [shell("true", image="project")]
    spec = {"nodeName": "node", "restartPolicy": "Never", "securityContext": RESTRICTED, "containers": containers}
    with server(tmp_path, handle) as api, new_network() as network:
        machine = Machine(api, network, Hosts(tmp_path / "hosts", network.gateway), tmp_path, {})
        pod = Pod(machine, {"metadata": metadata, "spec": spec})
        pod.start()
        until(lambda: len(phases) == 6, 60, "the pod has ended")
        pod.kill()
        pod.join(60)
    assert phases == ["Pending"] * 2 + ["Running"] * 2 + ["Succeeded"] * 2
