"""What happened in a plane, in a page of text: for a test that failed."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.api import ApiError
from tests.cluster.plane import Plane
from tests.servers.server import tail

EVENTS, LINES = 40, 15


def what_happened(plane: Plane) -> str:
    """The last events, the state of every pod, the last lines of the newest logs, and where all logs are."""
    try:
        lines = [*_events(plane), *_pods(plane)]
    except (OSError, http.client.HTTPException, ApiError) as error:
        lines = [f"the API server can't be asked: {error!r}"]
    logs = sorted((plane.folder / "pods").rglob("*.log"), key=_age)
    for log in logs[-4:]:
        lines += [f"{log.relative_to(plane.folder)}:", *(f"  {line}" for line in tail(log, LINES))]
    return "\n".join([*lines, f"logs of every program and pod: {plane.folder}"])


def _events(plane: Plane) -> Iterator[str]:
    events = sorted(plane.api.list("events"), key=lambda event: event["metadata"]["creationTimestamp"])
    yield "the last events:"
    for event in events[-EVENTS:]:
        about = event["involvedObject"]
        yield f"  {about['kind']} {about.get('name')}: {event.get('reason')}: {event.get('message', '')[:200]}"


def _pods(plane: Plane) -> Iterator[str]:
    yield "pods:"
    for pod in plane.api.list("pods"):
        status = pod.get("status", {})
        states = [container["state"] for container in status.get("containerStatuses", [])]
        yield f"  {pod['metadata']['name']}: {status.get('phase')} {status.get('message', '')} {states}"


def _age(file: Path) -> float:
    return file.stat().st_mtime
