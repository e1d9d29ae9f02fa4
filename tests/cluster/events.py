"""What happened in a plane, in a page of text: for a test that failed."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.plane import Plane
from tests.servers.server import tail

EVENTS, LINES = 40, 15


def what_happened(plane: Plane) -> str:
    """The last events, the state of every pod, the last lines of the newest logs, and where all logs are."""
    events = sorted(plane.api.list("events"), key=lambda event: event["metadata"]["creationTimestamp"])
    lines = ["the last events:"]
    for event in events[-EVENTS:]:
        about = event["involvedObject"]
        lines.append(f"  {about['kind']} {about.get('name')}: {event.get('reason')}: {event.get('message', '')[:200]}")
    lines.append("pods:")
    for pod in plane.api.list("pods"):
        status = pod.get("status", {})
        states = [container["state"] for container in status.get("containerStatuses", [])]
        lines.append(f"  {pod['metadata']['name']}: {status.get('phase')} {status.get('message', '')} {states}")
    logs = sorted((plane.folder / "pods").rglob("*.log"), key=_age)
    for log in logs[-4:]:
        lines += [f"{log.relative_to(plane.folder)}:", *(f"  {line}" for line in tail(log, LINES))]
    lines.append(f"logs of every program and pod: {plane.folder}")
    return "\n".join(lines)


def _age(file: Path) -> float:
    return file.stat().st_mtime
