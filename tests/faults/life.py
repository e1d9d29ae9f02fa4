"""A run over all of its starts, and where one start is just now: what a fault is aimed by."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.runs import ENTRYPOINT, Ended
from tests.faults.zygote import Forked, Request, Zygote
from tests.process import ROOT, scrubbed

PATIENCE = 600  # seconds for what takes five on a quiet machine
TICK = 0.002  # seconds between two looks

# In the order of time; the three of the course come again and again.
BEGINNING = ("start", "data preparation", "reference pass")
COURSE = ("step", "save", "upload")
PHASES = (*BEGINNING, *COURSE, "final write")
ENDED = "ended"
REACHED = "story.step"


@dataclass
class Life:
    """One run's folder, and how it is started there.

    Attributes:
        words: of the command line, by their keys.
        env: added to the environment.
        uploading: whether a copy to the mirror is under way, where somebody can tell.
    """

    zygote: Zygote
    folder: Path
    ranks: int
    fsdp: bool
    words: dict[str, str]
    env: Mapping[str, str] = field(default_factory=dict)
    output: Path | None = None  # where it isn't folder/out
    uploading: Callable[[], bool] = lambda: False
    starts: int = 0

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def out(self) -> Path:
        return self.output or self.folder / "out"

    def start(
        self, *, ranks: int | None = None, real: bool = False, clock: float = 0.0, patience: float | None = None
    ) -> Start:
        """Start the run; `real`: by its command, whose ranks spend most of their time in imports."""
        self.starts += 1
        # RESTART_COUNT: the pause after a crash is the shortest, two seconds, however often this run has crashed.
        env = scrubbed({"RESTART_COUNT": "1", **self.env, "LOCAL_WORLD_SIZE": str(ranks or self.ranks)})
        logs = [self.folder / f"{name}.{self.starts}" for name in ("stdout", "stderr")]
        argv = [*self.words.values()]
        begun = Begun.of(self)
        process: Process
        if real:
            with logs[0].open("w") as out, logs[1].open("w") as err:
                command = [sys.executable, *ENTRYPOINT, *argv]
                process = subprocess.Popen(
                    command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )
        else:
            process = self.zygote.start(Request(argv, env, str(logs[0]), str(logs[1]), self.fsdp, clock, patience))
        return Start(self, process, logs, begun)

    def events(self, name: str) -> int:
        """How many events of this name the story has so far."""
        return _content(self.checkpoints / "story.jsonl").count(f'"event": "{name}"'.encode())


Process = Forked | subprocess.Popen[bytes]


@dataclass(frozen=True)
class Begun:
    """What was there of a run before a start: the rest is that start's."""

    holder: str
    starts: int
    ready: int
    reached: bytes

    @classmethod
    def of(cls, life: Life) -> Begun:
        events = life.events("start"), life.events("ready")
        return cls(lease(life).get("holder", ""), *events, _content(life.checkpoints / REACHED))


@dataclass
class Start:
    """One start of a run; killed by `end` where it does not end by itself."""

    life: Life
    process: Process
    logs: list[Path]
    begun: Begun

    def phase(self) -> str:
        """Where it is, by the files that it writes."""
        life = self.life
        if self.process.poll() is not None:
            return ENDED
        if not self.known and lease(life).get("holder", "") in ("", self.begun.holder):
            return "start"
        if not self.known:
            return "data preparation"
        if life.events("ready") <= self.begun.ready:
            return "reference pass"
        names = os.listdir(life.checkpoints)
        if "final.partial" in names:
            return "final write"
        if life.uploading():
            return "upload"
        return "save" if any(name.startswith("step-") and name.endswith(".partial") for name in names) else "step"

    @property
    def real(self) -> bool:
        """Whether it is the command that runs, not a fork."""
        return isinstance(self.process, subprocess.Popen)

    @property
    def known(self) -> bool:
        """Whether it has looked at the checkpoints: the story knows of it."""
        return self.life.events("start") > self.begun.starts

    @property
    def reached(self) -> int:
        """The newest step that was done in this start; 0: none."""
        content = _content(self.life.checkpoints / REACHED)
        with suppress(ValueError, KeyError):
            return 0 if content == self.begun.reached else int(json.loads(content)["step"])
        return 0

    def watch_phases(self) -> dict[str, float]:
        """Wait for its end; the longest time that it was in each phase without a break, in seconds."""
        longest: dict[str, float] = {}
        current, since = self.phase(), time.monotonic()
        while current != ENDED:
            time.sleep(TICK)
            now, phase = time.monotonic(), self.phase()
            longest[current] = max(longest.get(current, 0.0), now - since)
            if phase != current:
                current, since = phase, now
        return longest

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Whether it holds before the run has ended."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.life.folder}: nothing within {PATIENCE} s")
            time.sleep(TICK)
        return False

    def ranks(self) -> list[psutil.Process]:
        """The rank processes, in their order."""
        with suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children()
            return sorted(children, key=lambda child: (child.create_time(), child.pid))[: self.life.ranks]
        return []

    @property
    def done(self) -> bool:
        """Whether the output is complete."""
        return (self.life.out / "run.json").exists()

    def lose(self) -> None:
        """SIGKILL to the launcher, with which its ranks die, as with a machine; waits until all are gone."""
        family = self.ranks()
        self.process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=60)
        if alive:
            raise AssertionError(f"{self.life.folder}: a rank has outlived its launcher")

    def end(self, patience: float = PATIENCE) -> Ended:
        """Its end, and what it said."""
        try:
            code = self.process.wait(patience)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            self.lose()
            raise AssertionError(f"{self.life.folder}: start {self.life.starts} hangs: {error}") from error
        out, err = (log.read_text(errors="replace") if log.exists() else "" for log in self.logs)
        return Ended(code, out, err, self.life.checkpoints, self.life.out)


def _content(path: Path) -> bytes:
    """What a file says; empty where it is not there."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def lease(life: Life) -> dict[str, Any]:
    """What the lock of its folder says of the holder; a killed one's stays. Empty: nobody's."""
    with suppress(ValueError):
        said: dict[str, Any] = json.loads(_content(life.checkpoints / "lock"))
        return said
    return {}
