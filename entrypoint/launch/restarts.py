"""Restarts: before ranks are started, what their run's crashes so far mean: a pause, or a refusal.

Volcano restarts a failed gang at once, about every two seconds: a bug must not burn restarts, and nodes, at that pace.
Node 0 decides for all; the others wait for it at the rendezvous.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from entrypoint.attempts import LOST_WEIGHT, crashes_in_a_row
from entrypoint.conf import Run
from entrypoint.errors import EXIT_REFUSED, RunError
from entrypoint.launch.topology import read_number
from entrypoint.launch.verdict import Verdict
from entrypoint.story import Story

LONGEST_PAUSE = 60.0  # seconds; the first is of two, and each twice the one before


class CrashedError(RunError):
    """The run crashes again and again."""


@dataclass
class Restarts:
    """What is known of a run's earlier starts.

    Attributes:
        max_crashes: in a row, without a newer checkpoint between them, after which the run is refused.
        count: restarts so far, where the environment says it.
    """

    story: Story
    max_crashes: int
    count: int | None

    @classmethod
    def of(cls, run: Run, environ: Mapping[str, str]) -> Restarts:
        """Of a composed run.

        Raises:
            ConfigError: RESTART_COUNT is no number.
        """
        count = read_number(environ, "RESTART_COUNT", default=0, minimum=0) if environ.get("RESTART_COUNT") else None
        return cls(Story.of(run), run.checkpoint.max_crashes, count)

    def begin(self, nodes: int) -> None:
        """Write down that the run is started: what nodes write from here on is of this start.

        A container that is killed as a whole leaves no other line.
        """
        self.story.append("launch", nodes=nodes, **self._counted)

    def pause(self) -> tuple[float, str]:
        """Seconds to wait before the ranks are started, and why; 0 where the last start did not crash.

        Raises:
            CrashedError: it has crashed too often.
        """
        attempts = self.story.earlier()
        row = crashes_in_a_row(attempts)
        crashes = sum(1.0 if attempt.how == "crash" else LOST_WEIGHT for attempt in row)
        if crashes > self.max_crashes - 1e-6:
            error = CrashedError(
                f"{self.story.folder}: {len(row)} starts in a row crashed without a newer checkpoint "
                f"(checkpoint.max_crashes={self.max_crashes}); the first: {row[0].error}; mend that and start again"
            )
            self.note(Verdict(EXIT_REFUSED, error=str(error)), 0, told=False)
            raise error
        if not row or row[-1] is not attempts[-1]:  # stopped since, or never crashed
            return 0.0, ""
        count = len(row) if self.count is None else max(1, self.count)
        return min(LONGEST_PAUSE, 2.0 ** min(count, 10)), row[-1].error

    def note(self, verdict: Verdict, node: int, *, told: bool) -> None:
        """Write down how a node's ranks ended, and whether they had been `told` to stop."""
        self.story.append("end", code=verdict.code, error=verdict.error, node=node, told=told, **self._counted)

    @property
    def _counted(self) -> dict[str, int]:
        """The same on all nodes of a start, which share nothing else before they meet."""
        return {} if self.count is None else {"restart_count": self.count}
