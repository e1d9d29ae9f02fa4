"""Attempts: the starts of a run as its ledger tells them, how each ended, and what they have cost.

How a start ended:

    stopped    a notice was recorded, or it ended with 75, or with whatever code after a signal to stop; the first of
               its ends counts: a scheduler that restarts all pods after a crash tells the others to stop
    crash      a launcher saw a rank crash: an exception, a signal, a kill -9 for want of memory
    lost       no end, or only that other ranks were lost (76, or 134 where a node left no end at all: NCCL's watchdog
               may abort the process before Python hears of it): a machine that went without notice. It may also be a
               container that was killed as a whole, so it is a third of a crash where crashes are counted
    locked     refused, since another run held the folder
    done, refused

A start that ended before rank 0 had looked at the checkpoints has no `start`; that it crashed or was lost is counted
all the same.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from entrypoint.errors import EXIT_DONE, EXIT_LOST, EXIT_REFUSED, EXIT_STOPPED

LOST_WEIGHT = 1 / 3  # of a crash
ABORTED = 128 + signal.SIGABRT

Event = dict[str, Any]


@dataclass
class Attempt:
    """One start of the run and what became of it."""

    start: Event | None = None
    ends: list[Event] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)  # the others

    def named(self, event: str) -> Event | None:
        """The first event of this name."""
        return next((line for line in self.events if line["event"] == event), None)

    @property
    def how(self) -> str:
        """done, refused, locked, stopped, crash or lost."""
        codes = [end.get("code") for end in self.ends]
        if EXIT_REFUSED in codes:
            return "locked" if self.named("locked") else "refused"
        if EXIT_DONE in codes:
            return "done"
        if self.named("notice"):
            return "stopped"
        for end in self.ends:
            if end.get("told") or end.get("code") == EXIT_STOPPED:
                return "stopped"
            if end.get("code") not in self._others_loss:
                return "crash"
        return "lost"

    @property
    def _others_loss(self) -> tuple[int, ...]:
        """The codes by which a node says no more than that another is lost."""
        launch = self.named("launch")
        nodes = set(range(launch.get("nodes", 1) if launch else 1))
        silent = nodes - {end.get("node", 0) for end in self.ends}  # a lost machine writes no end
        return (EXIT_LOST, ABORTED) if silent else (EXIT_LOST,)

    @property
    def saved(self) -> int:
        """The newest step that it saved; 0: none."""
        return max((int(line["step"]) for line in self.events if line["event"] == "saved"), default=0)

    @property
    def error(self) -> str:
        """Why it crashed."""
        lost = "the start was cut off without a word"
        return next((str(end["error"]) for end in self.ends if end.get("code") != EXIT_LOST and end.get("error")), lost)


def read_attempts(ledger: Path, run: str) -> list[Attempt]:
    """The starts of `run` since it was last complete, in order; the newest may be under way."""
    found: list[Attempt] = []
    launched: dict[str, Attempt] = {}
    for line in _lines(ledger, run):
        event, launch = line["event"], line["launch"]
        attempt = launched.get(launch)  # a second run on the same folder writes between this one's lines
        if attempt is None and event != "start":
            attempt = _start_of(found, line)
        if attempt is None or (event == "start" and attempt.start):
            found.append(attempt := Attempt())
        if launch:
            launched[launch] = attempt
        if event == "start":
            attempt.start = line
        (attempt.ends if event == "end" else attempt.events).append(line)
    done = [number for number, attempt in enumerate(found[:-1]) if attempt.how == "done"]
    return found[done[-1] + 1 :] if done else found


def _lines(ledger: Path, run: str) -> list[Event]:
    try:
        texts = ledger.read_text(errors="replace").splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
            if line["run"] == run and isinstance(line["event"], str):
                lines.append({"time": 0.0, "launch": "", **line})
        except (ValueError, KeyError, TypeError):  # torn by a crash
            continue
    return lines


def _start_of(found: list[Attempt], line: Event) -> Attempt | None:
    """Which start a line of a launch that is not met yet is of; None: of a later one than `found` has.

    Another node's `end` may come before node 0's `launch`. It may also come after the next start's, from a container on
    a machine that was taken for dead: then the restart count tells. A node has one launch in a start.
    """
    if line["event"] not in ("launch", "end"):
        return found[-1] if found else None
    count = line.get("restart_count")
    for attempt in reversed(found[-2:]):
        lines = [known for known in (attempt.start, *attempt.events, *attempt.ends) if known]
        counts = {known["restart_count"] for known in lines if "restart_count" in known}
        if count in counts or (attempt is found[-1] and (count is None or not counts)):
            node = line.get("node", 0)
            another = any(known.get("node", 0) == node and known["launch"] != line["launch"] for known in lines)
            return None if another else attempt
    return None


def crashes_in_a_row(attempts: list[Attempt]) -> list[Attempt]:
    """The crashed and lost starts since the last newer checkpoint; what was stopped is none.

    A refusal is a human's business: after one the counting begins anew. It says nothing of the run where the start was
    a second one, which never had the folder. None of `attempts` is under way.
    """
    row: list[Attempt] = []
    newest = 0
    for attempt in attempts:
        if attempt.how in ("refused", "done"):
            row, newest = [], 0
        elif attempt.saved > newest:
            row, newest = [], attempt.saved
        if attempt.how in ("crash", "lost"):
            row.append(attempt)
    return row


def summary(attempts: list[Attempt]) -> dict[str, Any]:
    """What `run.json` says of the run's way here; see docs/metrics.md. The last of `attempts` is under way."""
    attempts = [attempt for attempt in attempts if attempt.start]
    before = attempts[:-1]
    restarts = [_restart(*pair) for pair in pairwise(attempts)]
    parts = ("down", "starting", "repeating")
    lost = {part: round(sum(restart["seconds_lost"][part] for restart in restarts), 1) for part in parts}
    saved = [line for attempt in attempts for line in attempt.events if line["event"] == "saved"]
    return {
        "starts": len(attempts),
        "interruptions": sum(attempt.how == "stopped" for attempt in before),
        "crashes": sum(attempt.how == "crash" for attempt in before),
        "lost": sum(attempt.how == "lost" for attempt in before),
        "resumes": sum(attempt.start["resume_step"] > 0 for attempt in attempts if attempt.start),
        "steps_repeated": sum(restart["steps_repeated"] for restart in restarts),
        "seconds_lost": {"total": round(sum(lost.values()), 1), **lost},
        "restarts": restarts,
        "checkpoints": {
            "count": len(saved),
            **{name: round(sum(line[name] for line in saved), 3) for name in ("bytes", "seconds", "stall")},
        },
    }


def _restart(attempt: Attempt, after: Attempt) -> dict[str, Any]:
    """What one restart cost: steps done twice; seconds from the last step before it until that step was there again."""
    assert attempt.start is not None
    assert after.start is not None
    start, ready, again = after.start, after.named("ready"), after.named("caught_up")
    resume = int(start["resume_step"])
    first = attempt.named("ready")
    reached_at = float(start.get("reached_at", 0.0))
    here = first is not None and reached_at >= float(first["time"])  # else it reached no step of its own
    begin = reached_at if here else float(attempt.start["time"])
    reached = int(start.get("reached", 0)) if here else resume
    seconds = {
        "down": start["time"] - begin,
        "starting": ready["time"] - start["time"] if ready else 0.0,
        "repeating": again["time"] - ready["time"] if again and ready else 0.0,
    }
    return {
        "how": attempt.how,
        "reached": reached,
        "resumed_at": resume,
        "steps_repeated": max(0, reached - resume),
        "seconds_lost": {name: round(max(0.0, value), 1) for name, value in seconds.items()},
    }
