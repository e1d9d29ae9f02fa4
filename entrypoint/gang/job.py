"""The run's Volcano Job: how far its gang is, what it is told by Commands, and what is remembered about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from entrypoint.errors import ConfigError
from entrypoint.kubernetes import Answer, Cluster, Unreachable

COMPONENT = "gang-watcher"
ABORTS = ("Aborting", "Aborted")
KEY = "record"  # of the ConfigMap
MOMENT = 60.0  # seconds that a gang may have run before an abort that was sent while it waited


class Unsure(Exception):
    """An answer, or none, of which nothing follows."""


class Denied(Unsure):
    """The pod's account may not do it, or not yet."""


@dataclass(frozen=True)
class Gang:
    """What the Job said of its gang at one moment.

    Args:
        since: when it came into its phase, seconds of Unix time by the clock of Volcano's controller.
        wait: names the one wait for the pods that this phase is, or that was aborted; empty: neither.
        version: Volcano counts it up at whatever ends or would end the pods.
    """

    uid: str
    phase: str
    since: float
    wait: str
    version: int
    pods: str


@dataclass(frozen=True)
class Record:
    """What must outlive the watcher's pod.

    Args:
        job: the Job's uid; a later Job of the same name is another.
        rounds: aborts in a row, without a start between them.
        aborted: the wait (`Gang.wait`) that the watcher itself has ended; empty: it has ended none.
        version: the aborted Job's, once it stood still.
    """

    job: str = ""
    rounds: int = 0
    aborted: str = ""
    version: int | None = None


@dataclass(frozen=True)
class VolcanoJob:
    """One Volcano Job; `record` names the ConfigMap beside it that the watcher may write."""

    cluster: Cluster
    namespace: str
    name: str
    record: str

    def read(self) -> Gang | None:
        """The gang now; None: there is no such Job, or it is being deleted.

        Raises:
            Unsure: nothing follows from the answer.
        """
        path = f"/apis/batch.volcano.sh/v1alpha1/{self._in('jobs')}/{_part(self.name)}"
        answer = self._ask(lambda: self.cluster.get(path), f"get the Volcano Job {self.name}", 200, 404)
        metadata = answer.content.get("metadata")
        if not isinstance(metadata, dict):  # not even a Status: the API server knows no such kind, or it is another
            raise Unsure(f"get the Volcano Job {self.name}: the Kubernetes API answers {answer.status} without one")
        return None if answer.status == 404 or "deletionTimestamp" in metadata else gang_of(answer.content)

    def command(self, action: str, gang: Gang, message: str) -> None:
        """Have Volcano do AbortJob or ResumeJob; one that it has not taken yet is not sent twice.

        Raises:
            Denied: it is not sent.
            Unsure: it may be sent.
        """
        path = f"/apis/bus.volcano.sh/v1alpha1/{self._in('commands')}"
        owner = {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "name": self.name, "uid": gang.uid}
        content = {
            "apiVersion": "bus.volcano.sh/v1alpha1",
            "kind": "Command",
            "metadata": {
                "name": f"{self.name}-gang-{action.removesuffix('Job').lower()}",
                "namespace": self.namespace,
                "ownerReferences": [{**owner, "controller": True}],
            },
            "action": action,
            "target": {**owner, "controller": True},
            "reason": "GangWatcher",
            "message": message,
        }
        self._ask(lambda: self.cluster.create(path, content), f"create a Command {action}", 201, 409)

    def event(self, gang: Gang, reason: str, message: str) -> None:
        """Put a warning among the Job's events.

        Raises:
            Unsure: it is not known to be there.
        """
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        content = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{self.name}-gang-", "namespace": self.namespace},
            "involvedObject": {
                "apiVersion": "batch.volcano.sh/v1alpha1",
                "kind": "Job",
                "namespace": self.namespace,
                "name": self.name,
                "uid": gang.uid,
            },
            "type": "Warning",
            "reason": reason,
            "message": message,
            "source": {"component": COMPONENT},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        self._ask(lambda: self.cluster.create(f"/api/v1/{self._in('events')}", content), "create an Event", 201)

    def load(self) -> Record:
        """What was saved last; a record that nobody can read is none.

        Raises:
            Unsure: there may be one.
        """
        what = f"get the ConfigMap {self.record}"
        answer = self._ask(lambda: self.cluster.get(self._record), what, 200, 404)
        try:
            return Record(**json.loads(answer.content["data"][KEY]))
        except (KeyError, TypeError, ValueError):
            return Record()

    def save(self, record: Record) -> None:
        """Write it where the next pod finds it.

        Raises:
            Unsure: it is not known to be there.
        """
        content = {"data": {KEY: json.dumps(asdict(record))}}
        self._ask(lambda: self.cluster.merge(self._record, content), f"patch the ConfigMap {self.record}", 200)

    @property
    def _record(self) -> str:
        return f"/api/v1/{self._in('configmaps')}/{_part(self.record)}"

    def _in(self, resource: str) -> str:
        return f"namespaces/{_part(self.namespace)}/{resource}"

    def _ask(self, ask: Callable[[], Answer], what: str, *expected: int) -> Answer:
        try:
            answer = ask()
        except Unreachable as error:
            raise Unsure(f"the Kubernetes API at {self.cluster.address} can't be reached ({error})") from None
        except ConfigError as error:  # at the start it was of use: the cluster's certificate may be a new one
            raise Unsure(str(error)) from None
        if answer.status in expected:
            return answer
        if answer.status in (401, 403):
            raise Denied(f"the pod's account may not {what} ({answer.message})")
        raise Unsure(f"{what}: the Kubernetes API answers {answer.status} ({answer.message})")


def gang_of(job: Mapping[str, Any]) -> Gang:
    """The gang of a Volcano Job's object.

    Volcano adds a condition, with the phase and the time, at every change of the Job's status: the first of those that
    name the same phase in a row is when the phase began. `state.lastTransitionTime` is any change's.
    """
    metadata, status = job["metadata"], job.get("status") or {}
    made = str(metadata["creationTimestamp"])
    state = status.get("state") or {}
    phase = str(state.get("phase") or "Pending")
    phases: list[tuple[str, str]] = []
    for condition in status.get("conditions") or []:
        if not phases or phases[-1][0] != condition["status"]:
            phases.append((str(condition["status"]), str(condition.get("lastTransitionTime") or made)))
    if not phases or phases[-1][0] != phase:
        phases.append((phase, str(state.get("lastTransitionTime") or made)))
    since = phases[-1][1]
    ended = since
    while phases and phases[-1][0] in ABORTS:
        ended = phases.pop()[1]
    if phase in ABORTS and phases and phases[-1][0] == "Running" and _unix(ended) - _unix(phases[-1][1]) < MOMENT:
        phases.pop()  # it started while the abort was on its way
    last = phases[-1] if phases else ("", "")
    pods = ", ".join(f"{status[name]} {name}" for name in ("pending", "running", "failed") if status.get(name))
    return Gang(
        uid=str(metadata["uid"]),
        phase=phase,
        since=_unix(since),
        wait=last[1] if last[0] == "Pending" else "",
        version=int(status.get("version") or 0),
        pods=f"{pods or 'none there'}, of {(job.get('spec') or {}).get('minAvailable')}",
    )


def _unix(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def _part(name: str) -> str:
    return quote(name, safe="")
