"""The story of a run over all of its starts: `story.jsonl` in checkpoint.path, one line an event, and what it says.

    launch     node 0's ranks are about to be started
    start      attempt, resume_step, world_size, restart_count; reached and reached_at: the start before it got so far
    ready      step: the steps begin
    caught_up  step: the first one that is not a repetition
    saved      step, bytes, stall, seconds, step_seconds
    notice     step: told to stop
    end        code, step, error; from a launcher also its node, and whether it had been told to stop

Each has `time` (seconds since 1970), `run` (whose story it is: a folder may see others) and `launch` (which start of
the node's launcher). Rank 0 writes them, node 0's launcher `launch` and an `end`, and each other node's an `end` where
a rank of its own crashed.

How a start ended:

    stopped    a notice was recorded, or it ended with 75, or with whatever code after a signal to stop; the first of
               its ends counts: a scheduler that restarts all pods after a crash tells the others to stop
    crash      a launcher saw a rank crash: an exception, a signal, a kill -9 for want of memory
    lost       no end, or only that other ranks were lost (76): a machine that went without notice. It may also be a
               container that was killed as a whole, so it is a third of a crash where crashes are counted
    done, refused

A start that ended before rank 0 had looked at the checkpoints has no `start`; that it crashed or was lost is counted
all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from entrypoint.conf import Run
from entrypoint.config import fingerprint_keys
from entrypoint.errors import EXIT_DONE, EXIT_LOST, EXIT_REFUSED, EXIT_STOPPED
from entrypoint.launch.rank_process import LAUNCH_VARIABLE

STORY, REACHED = "story.jsonl", "story.step"
WIDTH = 96  # bytes of the one line in REACHED, overwritten in place
LOST_WEIGHT = 1 / 3  # of a crash

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
        """done, refused, stopped, crash or lost."""
        codes = [end.get("code") for end in self.ends]
        if EXIT_REFUSED in codes:
            return "refused"
        if EXIT_DONE in codes:
            return "done"
        if self.named("notice"):
            return "stopped"
        for end in self.ends:
            if end.get("told") or end.get("code") == EXIT_STOPPED:
                return "stopped"
            if end.get("code") != EXIT_LOST:
                return "crash"
        return "lost"

    @property
    def saved(self) -> int:
        """The newest step that it saved; 0: none."""
        return max((int(line["step"]) for line in self.events if line["event"] == "saved"), default=0)

    @property
    def error(self) -> str:
        """Why it crashed."""
        lost = "the start was cut off without a word"
        return next((str(end["error"]) for end in self.ends if end.get("code") != EXIT_LOST and end.get("error")), lost)


class Story:
    """The ledger of one run; what can't be written is said once and costs the run nothing.

    Args:
        folder: checkpoint.path.
        run: tells this run's lines from another's.
        launch: tells this start from the others.
    """

    def __init__(self, folder: Path, run: str, launch: str = "") -> None:
        self.folder, self._run, self.launch = folder, run, launch
        self._lock, self._silent = threading.Lock(), False
        self._repeats_to = 0  # the step that the start before reached
        self._step: int | None = None  # done in this start
        self._metrics: dict[str, float] = {}

    @classmethod
    def of(cls, run: Run) -> Story:
        """The ledger of a composed run; in a rank, of its launcher's start."""
        keys = json.dumps(fingerprint_keys(run), sort_keys=True, default=str)
        name = hashlib.sha256(keys.encode()).hexdigest()[:12]
        return cls(Path(str(run.checkpoint.path)), name, os.environ.get(LAUNCH_VARIABLE, ""))

    # Write -----------------------------------------------------------------------------------------------------------

    def append(self, event: str, **what: Any) -> None:
        """Add a line, on disk when this returns. From any thread."""
        said = {"event": event, "time": round(time.time(), 3), "run": self._run, "launch": self.launch, **what}
        path = self.folder / STORY
        with self._lock:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    size = os.fstat(descriptor).st_size
                    torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                    os.write(descriptor, ("\n" * torn + json.dumps(said) + "\n").encode())
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                self._complain(error)

    def reach(self, step: int) -> None:
        """Note a step that is done: not fsynced, so that it costs a step nothing."""
        self._step = step
        if step == self._repeats_to:
            self.append("caught_up", step=step)
            self._sum_up()
        line = json.dumps({"run": self._run, "step": step, "time": round(time.time(), 3)})
        try:
            descriptor = os.open(self.folder / REACHED, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, f"{line:<{WIDTH - 1}}\n".encode(), 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._complain(error)

    def start(self, *, resume_step: int, world_size: int, restart_count: int | None) -> None:
        """This start of the run has found its checkpoint; what the one before it reached is noted with it."""
        before = self._reached()
        if before and before["step"] > resume_step:
            self._repeats_to = before["step"]
        number = sum(attempt.start is not None for attempt in self.attempts()) + 1
        self.append(
            "start",
            attempt=number,
            resume_step=resume_step,
            world_size=world_size,
            restart_count=number - 1 if restart_count is None else restart_count,
            **({"reached": before["step"], "reached_at": before["time"]} if before else {}),
        )

    def ready(self, step: int) -> None:
        """The steps begin after `step`."""
        self.append("ready", step=step)
        self._step = step
        self._sum_up()

    def end(self, code: int, error: str = "") -> None:
        """How this start ended."""
        self.append("end", code=code, step=self._step, **({"error": error} if error else {}))

    def left(self, code: int) -> None:
        """This start is ended at once, by a notice or because other ranks are lost."""
        if code == EXIT_STOPPED:
            self.append("notice", step=self._step)
        self.end(code)

    def metrics(self) -> dict[str, float]:
        """What goes beside a step's metrics: how the run came here."""
        return self._metrics

    def _sum_up(self) -> None:
        said = self.summary()
        names = ("interruptions", "crashes", "lost", "steps_repeated")
        self._metrics = {f"story/{name}": float(said[name]) for name in names}
        self._metrics["story/seconds_lost"] = float(said["seconds_lost"]["total"])

    def _reached(self) -> Event | None:
        try:
            said: Event = json.loads((self.folder / REACHED).read_text())
            return {"step": int(said["step"]), "time": float(said["time"])} if said["run"] == self._run else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _complain(self, error: OSError) -> None:
        if not self._silent:
            self._silent = True
            print(f"entrypoint: warning: {self.folder / STORY}: not written: {error}", file=sys.stderr, flush=True)

    # Read ------------------------------------------------------------------------------------------------------------

    def attempts(self) -> list[Attempt]:
        """The starts of this run since it was last complete, in order; the newest may be under way."""
        found: list[Attempt] = []
        launched: dict[str, Attempt] = {}
        for line in self._lines():
            event, launch = line["event"], line["launch"]
            attempt = launched.get(launch)  # a second run on the same folder writes between this one's lines
            if attempt is None and found and event not in ("launch", "start"):
                attempt = None if event == "end" and _another(found[-1], line) else found[-1]
            if attempt is None or (event == "start" and attempt.start):
                found.append(attempt := Attempt())
            if launch:
                launched[launch] = attempt
            if event == "start":
                attempt.start = line
            (attempt.ends if event == "end" else attempt.events).append(line)
        done = [number for number, attempt in enumerate(found[:-1]) if attempt.how == "done"]
        return found[done[-1] + 1 :] if done else found

    def _lines(self) -> list[Event]:
        try:
            texts = (self.folder / STORY).read_text(errors="replace").splitlines()
        except OSError:
            return []
        lines = []
        for text in texts:
            try:
                line = json.loads(text)
                if line["run"] == self._run and isinstance(line["event"], str):
                    lines.append({"time": 0.0, "launch": "", **line})
            except (ValueError, KeyError, TypeError):  # torn by a crash
                continue
        return lines

    def summary(self) -> dict[str, Any]:
        """What `run.json` says of the run's way here; see docs/metrics.md. Read by a start that is under way."""
        attempts = [attempt for attempt in self.attempts() if attempt.start]
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

    def newest_save(self) -> Event | None:
        """The last checkpoint that an earlier start, or this one, has written."""
        saved = [line for attempt in self.attempts() for line in attempt.events if line["event"] == "saved"]
        return saved[-1] if saved else None


def crashes_in_a_row(attempts: list[Attempt]) -> list[Attempt]:
    """The crashed and lost starts since the last newer checkpoint; what was stopped is none.

    A refusal is a human's business: after one the counting begins anew. None of `attempts` is under way.
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


def _another(attempt: Attempt, end: Event) -> bool:
    """Whether an `end` is of a later start than `attempt`: of the same node, but of another launch."""
    same_node = [line for line in (attempt.start, *attempt.ends) if line and line.get("node", 0) == end.get("node", 0)]
    return any(line["launch"] != end["launch"] for line in same_node)


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
