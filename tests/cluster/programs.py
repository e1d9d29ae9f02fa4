"""The plane's programs: where their binaries and CRDs come from, and how each is called."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster.api import Object
from tests.cluster.certs import Certificates
from tests.cluster.webhooks import ADMISSIONS
from tests.process import ROOT

# Folders with custom resource definitions in modules that .ci/tools/plane/go.mod pins.
DEFINITIONS = {
    "sigs.k8s.io/karpenter": ["pkg/apis/crds", "kwok/apis/crds"],
    "github.com/aws/karpenter-provider-aws": ["pkg/apis/crds"],
    "volcano.sh/volcano": ["config/crd/volcano/bases", "config/crd/jobflow/bases"],
}

CONTROLLERS = (
    "namespace-controller serviceaccount-controller serviceaccount-token-controller "
    "root-ca-certificate-publisher-controller garbage-collector-controller pod-garbage-collector-controller "
    "node-lifecycle-controller taint-eviction-controller job-controller ttl-after-finished-controller "
    "resourcequota-controller endpointslice-controller deployment-controller replicaset-controller "
    "clusterrole-aggregation-controller persistentvolume-binder-controller persistentvolume-protection-controller "
    "persistentvolumeclaim-protection-controller"
)


def binaries() -> Path:
    """The folder of the programs, built from their pins where that was not done yet."""
    built = subprocess.run([ROOT / ".ci/tools/build", "plane"], check=True, stdout=subprocess.PIPE, text=True)
    return Path(built.stdout.strip())


def custom_resource_definitions() -> Iterator[Object]:
    """Every definition that the plane's API server gets, from the modules' own files; the same one once."""
    go = subprocess.run([ROOT / ".ci/tools/go"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    listed = subprocess.run(
        [go, "mod", "download", "-json", *DEFINITIONS],
        cwd=ROOT / ".ci/tools/plane",
        env={**os.environ, "GOFLAGS": "", "GOWORK": "off", "GOTOOLCHAIN": "local"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    modules = {module["Path"]: Path(module["Dir"]) for module in _json_values(listed)}
    seen: set[str] = set()
    for module, folders in DEFINITIONS.items():
        for file in [file for folder in folders for file in sorted((modules[module] / folder).glob("*.yaml"))]:
            for definition in yaml.load_all(file.read_text(), Loader=yaml.CSafeLoader):
                if definition and definition["metadata"]["name"] not in seen:
                    seen.add(definition["metadata"]["name"])
                    yield definition


@dataclass(frozen=True)
class Programs:
    """Command lines; all servers listen on loopback."""

    binaries: Path
    folder: Path
    certificates: Certificates
    kubeconfig: Path
    ports: dict[str, int]

    def etcd(self) -> list[str]:
        """The store; it may lose what it holds when the machine goes down, and is faster for it."""
        client, peer = (f"http://127.0.0.1:{self.ports[name]}" for name in ("etcd", "etcd-peer"))
        return [
            *self._binary("etcd"),
            *(f"--data-dir={self.folder / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn"),
            *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
            *(
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
            ),
        ]

    def apiserver(self, tokens: Path) -> list[str]:
        """RBAC and Pod Security admission as in any cluster; administrators come with a token."""
        keys = self.certificates
        return [
            *self._binary("kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{self.ports['etcd']}",
            *("--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", f"--secure-port={self.ports['apiserver']}"),
            *(f"--tls-cert-file={keys.serving}", f"--tls-private-key-file={keys.serving_key}"),
            *("--authorization-mode=Node,RBAC", f"--token-auth-file={tokens}", "--allow-privileged=true"),
            *(
                f"--service-account-key-file={keys.service_accounts}",
                "--service-account-issuer=https://kubernetes.default.svc",
            ),
            *(f"--service-account-signing-key-file={keys.service_accounts}", "--service-cluster-ip-range=10.96.0.0/16"),
            *("--kubelet-preferred-address-types=InternalIP", "--endpoint-reconciler-type=none"),
            f"--cert-dir={self.folder / 'apiserver'}",
        ]

    def controller_manager(self) -> list[str]:
        """The controllers that a run or its end needs, at a shorter clock: tests would spend their time waiting.

        A silent node is noticed after 12 s instead of 50, and a claim that came before its volume is bound after 1 s
        instead of 15: Karpenter buys nothing for it until then, and looks again only 10 s later.
        """
        return [
            *self._binary("kube-controller-manager"),
            *(
                f"--kubeconfig={self.kubeconfig}",
                "--leader-elect=false",
                f"--controllers={CONTROLLERS.replace(' ', ',')}",
            ),
            *("--bind-address=127.0.0.1", f"--secure-port={self.ports['controller-manager']}"),
            f"--cert-dir={self.folder / 'controller-manager'}",
            f"--service-account-private-key-file={self.certificates.service_accounts}",
            *(f"--root-ca-file={self.certificates.authority}", "--allocate-node-cidrs=false"),
            *("--node-monitor-period=2s", "--node-monitor-grace-period=12s", "--pvclaimbinder-sync-period=1s"),
        ]

    def scheduler(self) -> list[str]:
        """Kubernetes' own, for pods that are not Volcano's."""
        return [
            *self._binary("kube-scheduler"),
            *(f"--kubeconfig={self.kubeconfig}", "--leader-elect=false"),
            *("--bind-address=127.0.0.1", f"--secure-port={self.ports['scheduler']}"),
            f"--cert-dir={self.folder / 'scheduler'}",
        ]

    def volcano_webhooks(self) -> list[str]:
        """Volcano's admission; `webhooks.py` tells the API server about it."""
        keys, port = self.certificates, self.ports["webhooks"]
        return [
            *self._binary("volcano-webhook-manager"),
            *(f"--kubeconfig={self.kubeconfig}", "--listen-address=127.0.0.1", f"--port={port}"),
            *(f"--webhook-url=https://127.0.0.1:{port}", f"--enabled-admission={','.join(ADMISSIONS)}"),
            *(f"--tls-cert-file={keys.serving}", f"--tls-private-key-file={keys.serving_key}"),
            f"--ca-cert-file={keys.authority}",
        ]

    def volcano_controllers(self) -> list[str]:
        """Makes pods of Jobs, and restarts them."""
        return [*self._binary("volcano-controller-manager"), f"--kubeconfig={self.kubeconfig}", "--leader-elect=false"]

    def volcano_scheduler(self, configuration: Path) -> list[str]:
        """Binds gangs; reads its configuration again when that changes."""
        return [
            *self._binary("volcano-scheduler"),
            *(f"--kubeconfig={self.kubeconfig}", f"--scheduler-conf={configuration}"),
            *("--leader-elect=false", "--cache-dumper=false"),
        ]

    def karpenter(self, instance_types: Path) -> list[str]:
        """Karpenter with its KWOK provider; it listens on all addresses, so it wants a network of its own."""
        return [
            *self._binary("karpenter-kwok"),
            *("--disable-leader-election=true", "--metrics-port=8080", "--health-probe-port=8081"),
            f"--instance-types-file-path={instance_types}",
        ]

    def _binary(self, name: str) -> list[str]:
        return [str(self.binaries / name)]


def _json_values(text: str) -> Iterator[Object]:
    """The values of concatenated JSON, as `go` prints them."""
    decoder, text = json.JSONDecoder(), text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        yield value
        text = text[end:].lstrip()
