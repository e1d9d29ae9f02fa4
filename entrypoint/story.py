"""The story of a run over all of its starts: `story.jsonl` in checkpoint.path, one line an event, and what it says.

    launch     nodes, restart_count; node 0's launcher is there
    locked     another run holds the folder: this start never had it
    start      attempt, resume_step, world_size, restart_count; reached and reached_at: the start before it got so far
    ready      step: the steps begin
    caught_up  step: the first one that is not a repetition
    saved      step, bytes, stall, seconds, step_seconds
    notice     step: told to stop
    end        code, step, error; from a launcher also its node, restart_count, and whether it had been told to stop

Each has `time` (seconds since 1970), `run` (whose story it is: a folder may see others) and `launch` (which start of
the node's launcher). Rank 0 writes them, node 0's launcher `launch` and an `end`, and each other node's an `end` where
a rank of its own crashed or has lost another.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

from entrypoint.attempts import Attempt, Event, read_attempts, summary
from entrypoint.conf import Run
from entrypoint.config import run_key
from entrypoint.errors import EXIT_STOPPED
from entrypoint.launch.rank_process import LAUNCH_VARIABLE

STORY, REACHED = "story.jsonl", "story.step"
WIDTH = 96  # bytes of the one line in REACHED, overwritten in place


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
        name = run_key(run)[:12]
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
        return read_attempts(self.folder / STORY, self._run)

    def earlier(self) -> list[Attempt]:
        """Those before this one, as its launcher sees it."""
        own = self.launch
        return list(takewhile(lambda attempt: all(line["launch"] != own for line in attempt.events), self.attempts()))

    def broke_off(self) -> bool:
        """Whether the start before this one crashed, or ended without a word; read by a start that is under way."""
        return any(attempt.how in ("crash", "lost") for attempt in self.attempts()[-2:-1])

    def summary(self) -> dict[str, Any]:
        """What `run.json` says of the run's way here; see docs/metrics.md. Read by a start that is under way."""
        return summary(self.attempts())

    def newest_save(self) -> Event | None:
        """The last checkpoint that an earlier start, or this one, has written."""
        saved = [line for attempt in self.attempts() for line in attempt.events if line["event"] == "saved"]
        return saved[-1] if saved else None
