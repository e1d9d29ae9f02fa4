"""The control plane: its programs started in their order, ready, reconfigured, ended."""

from __future__ import annotations

import contextlib
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from tests.cluster.api import Api, ApiError, Object
from tests.cluster.certs import make_certificates
from tests.cluster.karpenter import Karpenter
from tests.cluster.machine import check_machine
from tests.cluster.network import Network, new_network
from tests.cluster.programs import Programs, binaries, custom_resource_definitions
from tests.cluster.webhooks import ADMISSIONS, webhook_configuration
from tests.process import scrubbed
from tests.servers.server import serve

# The stock configuration of Volcano's chart, and the one that a cluster which scales from zero needs: with the
# action `enqueue` a gang that finds no GPUs at all is refused before it has pods, so that nobody buys it nodes; with
# the plugin `proportion` a gang that waits for nodes keeps another, whose nodes are there, from being bound.
STOCK = "enqueue, allocate, backfill"
FROM_ZERO = "allocate, backfill"
NOT_PREEMPTABLE = ("gang", "drf")
CONFIGURATION = {"name": "volcano-scheduler-configmap", "namespace": "volcano-system"}  # where a cluster keeps it

Ready = Callable[[], bool]


@dataclass(frozen=True)
class Plane:
    """A running control plane; each program's log is `folder/<program>.log`, each container's in `folder/pods`."""

    folder: Path
    kubeconfig: Path
    api: Api
    network: Network
    karpenter: Karpenter

    def configure_volcano(self, actions: str) -> None:
        """Give Volcano's scheduler other actions, in its file and in the ConfigMap that says so to whoever asks."""
        text = yaml.safe_dump(_scheduler_configuration(actions), sort_keys=False)
        self.api.apply(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": CONFIGURATION,
                "data": {"volcano-scheduler.conf": text},
            }
        )
        _write_scheduler_configuration(self.folder, actions)


@contextlib.contextmanager
def start_plane(folder: Path, *, actions: str = FROM_ZERO) -> Iterator[Plane]:
    """Start everything, wait until it is ready, end it with the block.

    Raises:
        MachineError: this machine can't hold one.
        RuntimeError: a program ended or was not ready in time (its log is in the message).
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_machine()
    with ExitStack() as stack:
        network = stack.enter_context(new_network())
        ports = network.ports("etcd", "etcd-peer", "apiserver", "controller-manager", "scheduler", "webhooks")
        names = ["localhost", "kubernetes.default.svc"]
        certificates = make_certificates(folder / "certs", ["127.0.0.1", network.gateway], names)
        token = secrets.token_hex(16)
        tokens = _private(folder / "tokens.csv", f"{token},admin,1,system:masters\n")
        kubeconfig = _kubeconfig(
            folder / "kubeconfig", f"https://127.0.0.1:{ports['apiserver']}", token, certificates.authority
        )
        programs = Programs(binaries(), folder, certificates, kubeconfig, ports)
        api = Api.of(kubeconfig)
        karpenter = _karpenter(stack, programs, kubeconfig, api, network)
        plane = Plane(folder, kubeconfig, api, network, karpenter)

        def start(name: str, command: list[str], ready: Ready) -> None:
            env = scrubbed({"DEBUG_SOCKET_DIR": str(folder)})  # Volcano's scheduler leaves a socket in /tmp otherwise
            stack.enter_context(serve(command, env=env, log=folder / f"{name}.log", ready=ready, timeout=120))

        start("etcd", programs.etcd(), _listens(ports["etcd"]))
        definitions = list(custom_resource_definitions())  # read while the API server starts
        start("kube-apiserver", programs.apiserver(tokens), lambda: _healthy(api))
        stack.enter_context(network.relay(ports["apiserver"]))
        start("kube-controller-manager", programs.controller_manager(), _listens(ports["controller-manager"]))
        start("kube-scheduler", programs.scheduler(), _listens(ports["scheduler"]))
        _define(api, definitions)
        api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "volcano-system"}})
        for path in ADMISSIONS:
            server = f"https://127.0.0.1:{ports['webhooks']}"
            api.apply(webhook_configuration(path, server, certificates.authority.read_bytes()))
        start("volcano-webhooks", programs.volcano_webhooks(), _listens(ports["webhooks"]))
        plane.configure_volcano(actions)
        start("volcano-controllers", programs.volcano_controllers(), lambda: True)
        start("volcano-scheduler", programs.volcano_scheduler(_scheduler_file(folder)), lambda: _open(api, "default"))
        stack.callback(karpenter.close)
        karpenter.offer()
        # Real clusters have one of Karpenter's AWS provider; KWOK's stands in its place.
        node_class = {"apiVersion": "karpenter.kwok.sh/v1alpha1", "kind": "KWOKNodeClass"}
        api.apply({**node_class, "metadata": {"name": "default"}})
        _start_kubelet(plane, start)
        yield plane


def _karpenter(stack: ExitStack, programs: Programs, kubeconfig: Path, api: Api, network: Network) -> Karpenter:
    """Not started yet; it listens on all addresses, so it has a network of its own."""
    address = stack.enter_context(network.address(first=1))
    sandbox = stack.enter_context(network.sandbox(address, "karpenter"))
    config = yaml.safe_load(kubeconfig.read_text())
    server = f"https://{network.gateway}:{api.server.rpartition(':')[2]}"
    token = config["users"][0]["user"]["token"]
    inside = _kubeconfig(programs.folder / "karpenter.kubeconfig", server, token, api.authority)
    command = ["nsenter", "--target", str(sandbox), "--net"]
    return Karpenter(programs, programs.folder, inside, address, command)


def _start_kubelet(plane: Plane, start: Callable[..., None]) -> None:
    command = [sys.executable, "-m", "tests.cluster.kubelet", str(plane.folder), str(plane.network.number)]
    start("kubelet", command, lambda: _node_ready(plane.api))


def _define(api: Api, definitions: list[Object]) -> None:
    def established(name: str) -> bool:
        found = api.get("customresourcedefinitions.apiextensions.k8s.io", name)
        conditions = found.get("status", {}).get("conditions") or []
        return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(api.create, "customresourcedefinitions.apiextensions.k8s.io"), definitions))
    for name in [definition["metadata"]["name"] for definition in definitions]:
        until(partial(established, name), 60, f"{name} established")


def until(condition: Callable[[], object], seconds: float, what: str, *, every: float = 0.1) -> None:
    """Wait until `condition()` is true, with a look `every` so many seconds.

    Raises:
        TimeoutError: it was not within `seconds`; the message names `what`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(every)


def _listens(port: int) -> Ready:
    def ready() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    return ready


def _healthy(api: Api) -> bool:
    with contextlib.suppress(OSError, ApiError):
        return bool(api.request("GET", "/readyz") == "ok")
    return False


def _open(api: Api, queue: str) -> bool:
    found = api.find("queues.scheduling.volcano.sh", queue)
    return found is not None and found.get("status", {}).get("state") == "Open"


def _node_ready(api: Api) -> bool:
    return any(not node["spec"].get("taints") for node in api.list("nodes"))


def _scheduler_file(folder: Path) -> Path:
    return folder / "volcano-scheduler.conf"


def _write_scheduler_configuration(folder: Path, actions: str) -> None:
    draft = folder / "volcano-scheduler.draft"
    draft.write_text(yaml.safe_dump(_scheduler_configuration(actions), sort_keys=False))
    draft.rename(_scheduler_file(folder))  # whole: the scheduler reads it the moment it changes


def _scheduler_configuration(actions: str) -> Object:
    def plugin(name: str) -> Object:
        return {"name": name, **({"enablePreemptable": False} if name in NOT_PREEMPTABLE else {})}

    shares = "proportion" if actions == STOCK else "capacity"
    tiers = [
        ["priority", "gang", "conformance"],
        ["overcommit", "drf", "predicates", shares, "nodeorder", "binpack"],
    ]
    return {"actions": actions, "tiers": [{"plugins": [plugin(name) for name in tier]} for tier in tiers]}


def _kubeconfig(path: Path, server: str, token: str, authority: Path) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "plane", "cluster": {"server": server, "certificate-authority": str(authority)}}],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "plane", "context": {"cluster": "plane", "user": "admin"}}],
        "current-context": "plane",
    }
    return _private(path, yaml.safe_dump(config, sort_keys=False))


def _private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path
