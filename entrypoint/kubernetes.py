"""The Kubernetes API as a pod sees it: asked with the service account's own token, by the standard library."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoint.errors import ConfigError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # where a kubelet puts token and certificate
TIMEOUT = 10.0  # seconds for one answer


class Unreachable(Exception):
    """No answer: the network, or the API server, is not there (yet)."""


@dataclass(frozen=True)
class Answer:
    """An answer's status and its object; {} where it is not a JSON object."""

    status: int
    content: dict[str, Any]

    @property
    def message(self) -> str:
        """What a refusal says."""
        return str(self.content.get("message", ""))


@dataclass(frozen=True)
class Cluster:
    """The API server of the pod's own cluster."""

    address: str
    account: Path
    tls: ssl.SSLContext

    def get(self, path: str) -> Answer:
        """The answer to GET `path`; raises as `ask` does."""
        return self.ask("GET", path)

    def create(self, path: str, content: Mapping[str, Any]) -> Answer:
        """The answer to a new object, sent to its collection's `path`; raises as `ask` does."""
        return self.ask("POST", path, content)

    def merge(self, path: str, content: Mapping[str, Any]) -> Answer:
        """The answer to a JSON merge patch of the object at `path`; raises as `ask` does."""
        return self.ask("PATCH", path, content, "application/merge-patch+json")

    def ask(
        self, method: str, path: str, content: Mapping[str, Any] | None = None, kind: str = "application/json"
    ) -> Answer:
        """The answer to one request.

        Raises:
            Unreachable: there is none; whether the request was carried out is not known.
            ConfigError: the account can't be read, or it is not the server that the account's certificate names.
        """
        try:
            token = (self.account / "token").read_text().strip()  # read anew each time: the kubelet renews it
        except OSError as error:
            raise ConfigError(f"{error.filename}: can't be read ({error.strerror}); {_MOUNT}") from None
        request = urllib.request.Request(f"{self.address}{path}", method=method)
        request.add_header("Authorization", f"Bearer {token}")
        request.add_header("Accept", "application/json")
        if content is not None:
            request.data = json.dumps(content).encode()
            request.add_header("Content-Type", kind)
        # Straight to the server: a proxy for the outside world is none for the cluster.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.tls)
        )
        try:
            with opener.open(request, timeout=TIMEOUT) as response:
                return Answer(response.status, _object(response.read()))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, _object(error.read()))
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise ConfigError(
                    f"{self.address}: its certificate is not signed by {self.account / 'ca.crt'} "
                    f"({reason.verify_message})"
                ) from None
            raise Unreachable(" ".join(str(reason).split()) or type(reason).__name__) from None


_MOUNT = "expected the pod's service account there: set automountServiceAccountToken: true on this pod"


def in_cluster() -> Cluster:
    """The API server that the pod's environment and service account name.

    Raises:
        ConfigError: this is not a pod, or it has no service account's token.
    """
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ConfigError("environment: KUBERNETES_SERVICE_HOST is not set; only a pod can ask its cluster")
    try:
        tls = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    except OSError as error:
        raise ConfigError(f"{ACCOUNT / 'ca.crt'}: can't be read ({error.strerror or error}); {_MOUNT}") from None
    return Cluster(f"https://{f'[{host}]' if ':' in host else host}:{port}", ACCOUNT, tls)


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
