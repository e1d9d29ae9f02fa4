"""What the watcher does with a gang, one look after another."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from entrypoint.errors import EXIT_DONE, EXIT_LOST, ConfigError, RunError
from entrypoint.gang.job import ABORTS, Denied, Gang, Record, Unsure, VolcanoJob

POLL = 5.0  # seconds between two looks
APPEAR = 60.0  # seconds that the Job may come later than its watcher
SETTLE = 10.0  # seconds after which Volcano has counted its own abort
AGAIN = 60.0  # seconds without any effect after which a Command is sent once more
DENIED = 600.0  # seconds that a right may be missing
SILENCE = 3600.0  # seconds without a usable answer; then another pod, perhaps on another node, may fare better
ENDED = ("Completed", "Failed", "Terminated")
STAYS = "it stays aborted, and is watched again once somebody resumes it"
LEFT = f"aborted by exit code 64 or by somebody, or given up: {STAYS}"


@dataclass(frozen=True)
class Limits:
    """How long a gang may wait and rest, in seconds, and how often it is resumed without having started."""

    wait: float
    rest: float
    retries: int


class Watcher:
    """One gang's; `clock` is Unix time."""

    def __init__(
        self,
        job: VolcanoJob,
        limits: Limits,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.job, self.limits, self.clock, self.sleep = job, limits, clock, sleep
        self.record = Record()
        self.saved = True
        self.began = clock()
        self.troubled: float | None = None  # since when nothing could be decided
        self.sent: tuple[str, str, float] = ("", "", 0.0)  # the last Command: action, wait, when
        self.said = ""

    def run(self) -> int:
        """Look until the run has ended; returns the documented exit code.

        Raises:
            RunError: the API server does not let the watcher do its work, or was silent for too long.
        """
        while True:
            try:
                if self._look():
                    return EXIT_DONE
                if self.troubled is not None:
                    say(f"the API server is of use again after {duration(self.clock() - self.troubled)}")
                    self.troubled = None
            except Unsure as error:
                self._trouble(error)
            self.sleep(POLL)

    def _look(self) -> bool:
        """Whether nothing is left to watch."""
        gang = self.job.read()
        if gang is None:
            return self._absent()
        if gang.uid != self.record.job:
            found = self.job.load()
            self.record = found if found.job == gang.uid else Record(job=gang.uid)
        if not self.saved:
            self._save()
        if gang.phase in ENDED:
            say(f"the run has ended, its Job is {gang.phase}: nothing is left to watch")
            return True
        if gang.phase in ABORTS:
            self._aborted(gang)
        elif gang.phase == "Pending":
            self._waits(gang)
        elif gang.phase == "Running":
            self._runs()
        return False  # Restarting, Completing, Terminating: on the way to another phase

    def _absent(self) -> bool:
        if not self.record.job and self.clock() - self.began < APPEAR:
            return False
        say("there is no Job (any more): nothing is left to watch")
        return True

    def _waits(self, gang: Gang) -> None:
        limit, waited = self.limits.wait, self.clock() - gang.since
        if self.record.aborted and self.record.aborted != gang.wait:
            self._remember(aborted="", version=None)  # it was resumed
        if waited < limit:
            self._say_once(
                f"waits for all pods to run since {gang.wait}, at most {duration(limit)}", f"; pods: {gang.pods}"
            )
        elif self._may_send("AbortJob", gang):
            self._aborts(gang, f"not all pods ran within {duration(limit)} (pods: {gang.pods})")

    def _aborts(self, gang: Gang, why: str) -> None:
        """Remember it first: an abort that this pod sent and that the next one knows nothing of is never resumed.

        The look that it follows from is a moment old. A gang that starts in this moment is aborted all the same: it
        saves what it has, as at any notice, and goes on from there.
        """
        before, first = self.record, self._unsent("AbortJob", gang)
        rounds = before.rounds + (before.aborted != gang.wait)
        self._remember(rounds=rounds, aborted=gang.wait, version=None)
        try:
            self._send("AbortJob", gang, why)
        except Denied:
            self.record = before
            self._save()
            raise
        if first:
            again = f"tried again in {duration(self.limits.rest)}, {rounds} of {self.limits.retries}"
            then = again if rounds <= self.limits.retries else "it was the last try"
            self._tell(gang, "GangTimeout", f"{why}: aborted, its nodes may go; {then}")

    def _runs(self) -> None:
        if self.record.aborted and self.clock() - self.sent[2] < AGAIN:
            return  # an abort that Volcano has not come to yet
        if self.record.rounds or self.record.aborted:
            self._remember(rounds=0, aborted="", version=None)
        self._say_once("all pods run")

    def _aborted(self, gang: Gang) -> None:
        if not self.record.aborted or self.record.aborted != gang.wait:
            self._say_once(LEFT)
        elif gang.phase == "Aborting":
            return  # pods are still ending
        elif self.record.rounds > self.limits.retries:
            tries = "1 try" if self.record.rounds == 1 else f"{self.record.rounds} tries"
            self._leave(gang, "GangGivenUp", f"given up after {tries} without a start")
        else:
            self._rests(gang)

    def _leave(self, gang: Gang, reason: str, why: str) -> None:
        """Treat it from now on as an abort of somebody else's."""
        self._remember(rounds=0, aborted="", version=None)
        self._tell(gang, reason, f"{why}: {STAYS}")
        self.said = LEFT

    def _rests(self, gang: Gang) -> None:
        rested = self.clock() - gang.since
        if self.record.version is None:
            if rested >= SETTLE:
                self._remember(version=gang.version)
        elif gang.version != self.record.version:
            why = (
                "Volcano was told something while the gang was aborted (a suspend; or its controller has started anew, "
                "which looks the same)"
            )
            self._leave(gang, "GangStaysAborted", why)
        elif rested >= self.limits.rest and self._may_send("ResumeJob", gang):
            first = self._unsent("ResumeJob", gang)
            self._send("ResumeJob", gang, f"resumed after {duration(rested)}")
            if first:
                say(f"resumed after {duration(rested)}, {self.record.rounds} of {self.limits.retries}")

    def _unsent(self, action: str, gang: Gang) -> bool:
        return self.sent[:2] != (action, gang.wait)

    def _may_send(self, action: str, gang: Gang) -> bool:
        return self._unsent(action, gang) or self.clock() - self.sent[2] >= AGAIN

    def _send(self, action: str, gang: Gang, message: str) -> None:
        try:
            self.job.command(action, gang, message)
        except Denied:
            raise
        except Unsure as error:  # it may have been sent: the next looks show whether it has
            warn(f"{error}; sent again where nothing follows within {duration(AGAIN)}")
        self.sent = (action, gang.wait, self.clock())

    def _remember(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        self._save()

    def _save(self) -> None:
        before, self.saved = self.saved, False
        try:
            self.job.save(self.record)
            self.saved = True
        except Unsure as error:  # known here, and tried again at the next look
            if before:
                warn(f"{error}: would be forgotten if this pod ended now")

    def _tell(self, gang: Gang, reason: str, message: str) -> None:
        say(message)
        try:
            self.job.event(gang, reason, message)
        except Unsure as error:
            warn(f"no event {reason}: {error}")

    def _trouble(self, error: Unsure) -> None:
        now = self.clock()
        if self.troubled is None:
            self.troubled = now
            warn(f"{error}; nothing is decided meanwhile")
        lasted = now - self.troubled
        if isinstance(error, Denied) and lasted >= DENIED:
            raise ConfigError(f"{error}, for {duration(lasted)}; bind the Role of the chart's gang-watcher-role.yaml")
        if lasted >= SILENCE:
            lost = RunError(f"{error}, for {duration(lasted)}")
            lost.exit_code = EXIT_LOST
            raise lost

    def _say_once(self, line: str, detail: str = "") -> None:
        if line != self.said:
            say(line + detail)
        self.said = line


def say(line: str) -> None:
    """Print what has happened."""
    print(f"gang: {line}", flush=True)


def warn(line: str) -> None:
    """Print what may have to be mended."""
    print(f"entrypoint: warning: gang: {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """As the chart writes it: 90 s is 1m30s."""
    hours, rest = divmod(round(seconds), 3600)
    parts = ((hours, "h"), (rest // 60, "m"), (rest % 60, "s"))
    return "".join(f"{count}{unit}" for count, unit in parts if count) or "0s"
