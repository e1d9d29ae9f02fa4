"""The kubelet of the tests does what a pod can tell of a real one."""

from __future__ import annotations

import contextlib
import re
import time
from typing import Any

import psutil
import pytest

from tests.cluster.api import ApiError, Object
from tests.cluster.nodes import PLATFORM, UNPLUGGED, is_ready
from tests.cluster.plane import Plane, until
from tests.cluster.pod import first_process
from tests.process import ROOT
from tests.servers.server import tail

RESTRICTED = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 1000,
    "fsGroup": 2000,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def shell(script: str, **container: Any) -> Object:
    """A container that Pod Security `restricted` admits."""
    return {
        "name": "main",
        "image": "project",
        "command": ["sh", "-c", script],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        **container,
    }


def run(plane: Plane, namespace: str, container: Object, *, name: str = "pod", **spec: Any) -> None:
    spec = {"restartPolicy": "Never", "securityContext": RESTRICTED, "containers": [container], **spec}
    plane.api.apply(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"a": "b"}}, "spec": spec}, namespace
    )


def ended(plane: Plane, namespace: str, name: str = "pod") -> Object:
    """The pod's status once it has ended."""

    def phase() -> str:
        return str(plane.api.get("pods", name, namespace).get("status", {}).get("phase"))

    until(lambda: phase() in ("Succeeded", "Failed"), 60, f"pod {name} ended")
    status: Object = plane.api.get("pods", name, namespace)["status"]
    return status


def log(plane: Plane, namespace: str, name: str = "pod", container: str = "main") -> list[str]:
    text = plane.api.request("GET", plane.api.path("pods", namespace, name, "log") + f"?container={container}")
    return str(text).splitlines()


def until_log(plane: Plane, namespace: str, name: str, lines: list[str]) -> None:
    def written() -> bool:
        with contextlib.suppress(ApiError):  # it has not started
            return log(plane, namespace, name) == lines
        return False

    until(written, 60, f"pod {name} wrote {lines}")


def running(plane: Plane, namespace: str) -> psutil.Process:
    """The first process of the pod's container, which may have written before its number is known."""
    pod = plane.api.get("pods", "pod", namespace)
    until(lambda: first_process(plane.folder, pod, "main"), 60, "the container's first process")
    process = first_process(plane.folder, pod, "main")
    assert process
    return process


def until_gone(plane: Plane, namespace: str, name: str) -> None:
    until(lambda: plane.api.find("pods", name, namespace) is None, 180, f"pod {name} is gone")


def test_files_and_environment_are_what_the_pod_says(plane: Plane, namespace: str) -> None:
    made = {"apiVersion": "v1", "metadata": {"name": "made"}}
    plane.api.apply({**made, "kind": "ConfigMap", "data": {"run.yaml": "seed: 1", "COLOUR": "red"}}, namespace)
    plane.api.apply({**made, "kind": "Secret", "stringData": {"key": "hidden"}}, namespace)
    script = """
        cat /etc/run/run.yaml /etc/secret/key /etc/pod/labels; echo
        echo $NAME $COLOUR $SECRET $GREETING $ADDRESS
        test "$(stat -c %s /token/value)" -gt 100 && echo a token
        touch /scratch/file /dev/shm/file && echo writable
        touch /file || echo the root is read-only
        id -u; id -G; hostname
        python -c 'import entrypoint; print(entrypoint.__name__)'
    """
    env: list[Object] = [
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "made", "key": "key"}}},
        {"name": "GREETING", "value": "hello-$(NAME)-$(UNKNOWN)"},
    ]
    token = {"serviceAccountToken": {"path": "value", "expirationSeconds": 600}}
    volumes: dict[str, Object] = {
        "/etc/run": {"configMap": {"name": "made", "items": [{"key": "run.yaml", "path": "run.yaml"}]}},
        "/etc/secret": {"secret": {"secretName": "made", "defaultMode": 0o400}},
        "/etc/pod": {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        "/token": {"projected": {"sources": [token]}},
        "/scratch": {"emptyDir": {}},
        "/dev/shm": {"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    }
    mounts = [{"name": f"v{number}", "mountPath": path} for number, path in enumerate(volumes)]
    container = shell(script, env=env, envFrom=[{"configMapRef": {"name": "made"}}], volumeMounts=mounts)
    run(plane, namespace, container, volumes=[{"name": f"v{n}", **v} for n, v in enumerate(volumes.values())])
    status = ended(plane, namespace)
    assert status["phase"] == "Succeeded", log(plane, namespace)
    assert log(plane, namespace) == [
        'seed: 1hiddena="b"',
        f"pod red hidden hello-pod-$(UNKNOWN) {status['podIP']}",
        "a token",
        "writable",
        "touch: cannot touch '/file': Read-only file system",
        "the root is read-only",
        "1000",
        "1000 2000",
        "pod",
        "entrypoint",
    ]


def test_init_containers_come_first_and_an_exit_code_is_reported_with_the_last_words(
    plane: Plane, namespace: str
) -> None:
    shared = [{"name": "shared", "mountPath": "/shared"}]
    first = shell("echo ready >/shared/note", volumeMounts=shared) | {"name": "first"}
    last = shell("cat /shared/note; echo wrong learning rate >&2; exit 64", volumeMounts=shared)
    last["terminationMessagePolicy"] = "FallbackToLogsOnError"
    run(plane, namespace, last, initContainers=[first], volumes=[{"name": "shared", "emptyDir": {}}])
    status = ended(plane, namespace)
    assert status["phase"] == "Failed"
    state = status["containerStatuses"][0]["state"]["terminated"]
    assert (state["exitCode"], state["message"]) == (64, "ready\nwrong learning rate")
    assert status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0


def test_a_claim_outlives_its_pods_and_is_shared(plane: Plane, namespace: str) -> None:
    driver = f"{namespace}.tests"  # the platform's is shared with other tests
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"fsx-{namespace}"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "1Gi"},
            "csi": {"driver": driver, "volumeHandle": f"fs-{namespace}"},
            "claimRef": {"namespace": namespace, "name": "shared"},
        },
    }
    claim = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "1Gi"}},
        "storageClassName": "",
        "volumeName": f"fsx-{namespace}",
    }
    try:
        plane.api.apply(volume)
        plane.api.apply(
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "shared"}, "spec": claim},
            namespace,
        )
        mounts = [{"name": "shared", "mountPath": "/shared"}]
        volumes = [{"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}}]
        run(plane, namespace, shell("id -un; touch /shared/file", volumeMounts=mounts), name="refused", volumes=volumes)
        assert ended(plane, namespace, "refused")["phase"] == "Failed"  # root's folder, and nobody applies fsGroup
        made = {"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": driver}}
        plane.api.apply({**made, "spec": {"attachRequired": False, "fsGroupPolicy": "File"}})
        for name, script in (("writes", "echo words >/shared/file"), ("reads", "cat /shared/file")):
            run(plane, namespace, shell(script, volumeMounts=mounts), name=name, volumes=volumes)
            assert ended(plane, namespace, name)["phase"] == "Succeeded"
        assert log(plane, namespace, "reads") == ["words"]
    finally:
        plane.api.delete("csidrivers.storage.k8s.io", driver)
        plane.api.delete("persistentvolumes", f"fsx-{namespace}")


def test_deletion_is_a_signal_then_a_grace_then_the_end(plane: Plane, namespace: str) -> None:
    handler = "trap 'echo saved; exit 75' TERM; echo up; while :; do sleep 0.05; done"
    deaf = "trap '' TERM; echo up; while :; do sleep 0.05; done"
    graces = {"polite": 60, "deaf": 3}
    for name, script in (("polite", handler), ("deaf", deaf)):
        run(plane, namespace, shell(script), name=name, terminationGracePeriodSeconds=graces[name])
    took = {}
    for name in graces:
        until_log(plane, namespace, name, ["up"])
        begun = time.monotonic()
        plane.api.delete("pods", name, namespace)
        until_gone(plane, namespace, name)
        took[name] = time.monotonic() - begun
    assert took["polite"] < graces["polite"]
    assert took["deaf"] >= graces["deaf"]
    said = (plane.folder / "kubelet.log").read_text()
    assert f"{namespace}/polite ended: {{'main': 75}}\n" in said
    assert f"{namespace}/deaf ended: {{'main': 137}}\n" in said  # 128 + SIGKILL
    (kept,) = (plane.folder / "pods" / namespace).glob("polite-*/main.log")
    assert tail(kept, 2) == ["up", "saved"]


def test_pods_meet_by_name_and_reach_the_api_server_and_nothing_else(plane: Plane, namespace: str) -> None:
    server = (
        "import socket; s = socket.create_server(('', 5000)); print('up', flush=True); s.accept()[0].sendall(b'met')"
    )
    client = "import socket; print(socket.create_connection(('host-0.gang', 5000), 5).recv(3).decode())"
    api = """if True:
        import os, ssl, urllib.request
        token = open('/var/run/secrets/kubernetes.io/serviceaccount/token').read()
        url = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}/api/v1/nodes"
        context = ssl.create_default_context(cafile='/var/run/secrets/kubernetes.io/serviceaccount/ca.crt')
        try:
            request = urllib.request.Request(url, headers={'Authorization': 'Bearer ' + token})
            urllib.request.urlopen(request, context=context)
        except urllib.error.HTTPError as error:
            print(error.code, error.reason)
        try:
            urllib.request.urlopen('http://192.0.2.1/', timeout=5)
        except OSError as error:
            print(error)
    """
    python = {"command": ["python", "-c"]}
    run(plane, namespace, shell("", args=[server]) | python, name="server", hostname="host-0", subdomain="gang")
    until_log(plane, namespace, "server", ["up"])
    run(plane, namespace, shell("", args=[client]) | python, name="client")
    assert ended(plane, namespace, "client")["phase"] == "Succeeded"
    assert log(plane, namespace, "client") == ["met"]
    run(plane, namespace, shell("", args=[api]) | python, name="api")
    ended(plane, namespace, "api")
    assert log(plane, namespace, "api") == ["403 Forbidden", "<urlopen error [Errno 101] Network is unreachable>"]


def test_a_container_that_fails_is_started_again_where_the_pod_says_so(plane: Plane, namespace: str) -> None:
    script = "echo again >>/notes/file; test $(wc -l </notes/file) -ge 2"
    mounts = [{"name": "notes", "mountPath": "/notes"}]
    run(
        plane,
        namespace,
        shell(script, volumeMounts=mounts),
        restartPolicy="OnFailure",
        volumes=[{"name": "notes", "emptyDir": {}}],
    )
    status = ended(plane, namespace)
    assert (status["phase"], status["containerStatuses"][0]["restartCount"]) == ("Succeeded", 1)


def test_a_container_does_not_outlive_who_started_it(plane: Plane, namespace: str) -> None:
    run(plane, namespace, shell("echo up; sleep 600"))
    until_log(plane, namespace, "pod", ["up"])
    process = running(plane, namespace)
    starter = process.parent()
    assert starter
    starter.kill()  # as when a test run is killed
    until(lambda: not process.is_running(), 60, "the process is dead")


def test_what_restricted_forbids_is_refused(plane: Plane, namespace: str) -> None:
    container = shell("true")
    container["securityContext"]["privileged"] = True
    container["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(ApiError, match='violates PodSecurity "restricted:latest": privileged'):
        run(plane, namespace, container)


def test_the_pinned_api_server_runs_with_a_node_and_its_key_is_its_owners_alone(plane: Plane) -> None:
    pins = (ROOT / ".ci/tools/plane/go.mod").read_text()
    pinned = re.search(r"\sk8s\.io/kubernetes (v\S+)", pins)
    assert pinned
    assert plane.api.request("GET", "/version")["gitVersion"] == pinned[1]
    assert plane.api.get("nodes", PLATFORM)["status"]["conditions"]
    assert plane.kubeconfig.stat().st_mode & 0o077 == 0


def test_a_node_that_is_unplugged_says_nothing_more(plane: Plane, namespace: str) -> None:
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "spare", "labels": {"spare": "true"}}}
    capacity = {"cpu": "4", "memory": "4Gi", "pods": "10"}
    plane.api.apply(node)
    try:
        plane.api.patch("nodes", "spare", {"status": {"capacity": capacity, "allocatable": capacity}}, sub="status")
        run(plane, namespace, shell("echo up; sleep 600"), nodeSelector={"spare": "true"})
        until_log(plane, namespace, "pod", ["up"])
        process = running(plane, namespace)
        plane.api.patch("nodes", "spare", {"metadata": {"annotations": {UNPLUGGED: "true"}}})
        until(lambda: not process.is_running(), 60, "the process is dead")
        assert plane.api.get("pods", "pod", namespace)["status"]["phase"] == "Running"
        until(lambda: not is_ready(plane.api.get("nodes", "spare")), 60, "the control plane notices")
    finally:
        plane.api.delete("nodes", "spare")
    until_gone(plane, namespace, "pod")
