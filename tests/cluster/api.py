"""A client of the API server: objects are dictionaries, resources are named as kubectl names them."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

FIELD_MANAGER = "tests"
METADATA = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
TRIES = 60  # half a second apart, where the server says to try again, or is too busy
WATCH_SECONDS = 240  # a watch is begun anew after this time; a silent connection is given up a little later


class ApiError(Exception):
    """What the API server refused, in its own words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class Api:
    """One caller of one API server. A resource is `pods`, or with its group `jobs.batch.volcano.sh`."""

    def __init__(self, server: str, token: str, authority: Path) -> None:
        self.server = server
        self.authority = authority
        self._headers = {"Authorization": f"Bearer {token}"}
        self._tls = ssl.create_default_context(cafile=str(authority))
        self._local = threading.local()
        self._versions: dict[str, str] = {}
        self._resources: dict[tuple[str, str], tuple[str, bool]] = {}

    @classmethod
    def of(cls, kubeconfig: Path) -> Api:
        """The caller that a kubeconfig with a token and a CA file describes."""
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        return cls(cluster["server"], user["token"], Path(cluster["certificate-authority"]))

    def with_token(self, token: str) -> Api:
        """The same server, called by somebody else."""
        return Api(self.server, token, self.authority)

    def get(self, resource: str, name: str, namespace: str | None = None) -> Object:
        """One object.

        Raises:
            ApiError: with status 404 where there is none.
        """
        found: Object = self.request("GET", self.path(resource, namespace, name))
        return found

    def find(self, resource: str, name: str, namespace: str | None = None) -> Object | None:
        """One object, or None."""
        try:
            return self.get(resource, name, namespace)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list_names(self, resource: str) -> list[Object]:
        """The metadata alone of all objects of a resource."""
        found: list[Object] | None = self.request("GET", self.path(resource), accept=METADATA)["items"]
        return found or []

    def list(self, resource: str, namespace: str | None = None, labels: str = "") -> list[Object]:
        """All objects of a resource, of one namespace or of all."""
        found: list[Object] = self.request("GET", self.path(resource, namespace) + _query(labelSelector=labels))[
            "items"
        ]
        return found

    def create(
        self, resource: str, body: Object, namespace: str | None = None, *, sub: tuple[str, str] = ("", "")
    ) -> Object:
        """Create an object, or with `sub=(name, subresource)` call an object's subresource."""
        name, subresource = sub
        made: Object = self.request("POST", self.path(resource, namespace, name, subresource), body)
        return made

    def apply(self, manifest: Object, namespace: str = "default", *, dry_run: bool = False) -> Object:
        """Server-side apply of a whole manifest; `namespace` counts where it names none and its kind wants one."""
        resource, namespaced = self._resource(manifest["apiVersion"], manifest["kind"])
        place = manifest["metadata"].get("namespace", namespace) if namespaced else None
        path = self.path(resource, place, manifest["metadata"]["name"])
        query = _query(fieldManager=FIELD_MANAGER, force="true", dryRun="All" if dry_run else "")
        applied: Object = self.request("PATCH", path + query, manifest, "application/apply-patch+yaml")
        return applied

    def patch(
        self,
        resource: str,
        name: str,
        body: Object,
        namespace: str | None = None,
        *,
        sub: str = "",
        strategic: bool = False,
    ) -> Object:
        """Merge `body` into an object, or into its subresource `sub`; `strategic` merges lists by their keys."""
        kind = "strategic-merge-patch" if strategic else "merge-patch"
        path = self.path(resource, namespace, name, sub)
        patched: Object = self.request("PATCH", path, body, f"application/{kind}+json")
        return patched

    def delete(self, resource: str, name: str, namespace: str | None = None, **options: Any) -> None:
        """Ask for an object's deletion, with `DeleteOptions`; that it is gone already is no error."""
        try:
            self.request("DELETE", self.path(resource, namespace, name), options or None)
        except ApiError as error:
            if error.status not in (404, 409):  # 409: a precondition, so it is another object of that name by now
                raise

    def remove(self, manifest: Object, namespace: str = "default") -> None:
        """Ask for the deletion of what `apply` made of the same manifest."""
        resource, namespaced = self._resource(manifest["apiVersion"], manifest["kind"])
        place = manifest["metadata"].get("namespace", namespace) if namespaced else None
        self.delete(resource, manifest["metadata"]["name"], place)

    def follow(self, resource: str) -> Iterator[tuple[str, Object]]:
        """ADDED, MODIFIED and DELETED of all objects of a resource for ever, whatever becomes of one answer."""
        known: dict[str, Object] = {}
        while True:
            try:
                listed = self.request("GET", self.path(resource))
                present = {item["metadata"]["uid"]: item for item in listed["items"]}
                for uid in [uid for uid in known if uid not in present]:
                    yield "DELETED", known.pop(uid)
                for uid, item in present.items():
                    known[uid] = item
                    yield "ADDED", item
                for event in self._watch(resource, listed["metadata"]["resourceVersion"]):
                    item = event["object"]
                    if event["type"] == "ERROR":
                        break  # too old a version: list again
                    if event["type"] == "DELETED":
                        known.pop(item["metadata"]["uid"], None)
                    else:
                        known[item["metadata"]["uid"]] = item
                    yield event["type"], item
            except (OSError, http.client.HTTPException, ApiError, ValueError) as error:  # ValueError: half a line
                print(f"{resource}: {error!r}; listed again", flush=True)
                threading.Event().wait(0.5)  # the server is starting or ending, or too busy

    def path(self, resource: str, namespace: str | None = None, name: str = "", sub: str = "") -> str:
        """The URL path of a resource, of an object, or of an object's subresource."""
        plural, _, group = resource.partition(".")
        base = f"/apis/{group}/{self._version(group)}" if group else "/api/v1"
        place = f"/namespaces/{namespace}" if namespace and plural != "namespaces" else ""
        return base + place + f"/{plural}" + (f"/{name}" if name else "") + (f"/{sub}" if sub else "")

    def request(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        kind: str = "application/json",
        *,
        accept: str = "application/json",
    ) -> Any:
        """One call; the answer's JSON, or its text where it is none.

        Raises:
            ApiError: the server refused.
        """
        payload = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Accept": accept, **({"Content-Type": kind} if payload else {})}
        for _ in range(TRIES):
            try:
                status, content = self._exchange(method, path, payload, headers)
            except (http.client.RemoteDisconnected, ConnectionError, ssl.SSLEOFError):  # idle, and closed by the server
                status, content = self._exchange(method, path, payload, headers)
            if status != 429 and status < 500:  # "try again": a definition that is seconds old has no storage yet
                break
            threading.Event().wait(0.5)
        try:
            answer = json.loads(content)
        except ValueError:
            answer = content.decode(errors="replace")
        if status >= 400:
            raise ApiError(status, answer.get("message", "") if isinstance(answer, dict) else answer)
        return answer

    def _exchange(self, method: str, path: str, payload: bytes | None, headers: Mapping[str, str]) -> tuple[int, bytes]:
        connection: http.client.HTTPSConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect(timeout=60)
        try:
            connection.request(method, path, payload, dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            self._local.connection = None
            raise

    def _connect(self, timeout: float) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self.server.removeprefix("https://"), timeout=timeout, context=self._tls)

    def _watch(self, resource: str, version: str) -> Iterator[Object]:
        query = _query(watch="1", resourceVersion=version, timeoutSeconds=str(WATCH_SECONDS))
        with contextlib.closing(self._connect(WATCH_SECONDS + 30)) as connection:
            connection.request("GET", self.path(resource) + query, headers=self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise ApiError(answer.status, answer.read().decode(errors="replace"))
            while line := answer.readline():
                yield json.loads(line)

    def _version(self, group: str) -> str:
        if group not in self._versions:
            groups = self.request("GET", "/apis")["groups"]
            self._versions = {found["name"]: found["preferredVersion"]["version"] for found in groups}
        if group not in self._versions:
            raise ApiError(404, f"no API group {group}")
        return self._versions[group]

    def _resource(self, version: str, kind: str) -> tuple[str, bool]:
        """(resource, namespaced) of a manifest's apiVersion and kind."""
        if (version, kind) not in self._resources:
            group = version.partition("/")[0] if "/" in version else ""
            for found in self.request("GET", f"/apis/{version}" if group else f"/api/{version}")["resources"]:
                if "/" not in found["name"]:
                    name = f"{found['name']}.{group}" if group else found["name"]
                    self._resources[version, found["kind"]] = (name, found["namespaced"])
        if (version, kind) not in self._resources:
            raise ApiError(404, f"no kind {kind} in {version}")
        return self._resources[version, kind]


def _query(**parameters: str) -> str:
    given = {name: value for name, value in parameters.items() if value}
    return "?" + urllib.parse.urlencode(given) if given else ""
