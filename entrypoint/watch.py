"""Watch: what this process was told by signals, and a thread that ends it where its main thread can't.

A handler of Python's runs between two bytecodes of the main thread: not while that thread waits in a collective, runs
a query or loads weights. So signals are read from a pipe by a thread, which also looks after the other ranks.
Whatever the main thread does, the process leaves

- with 75, where it was told to stop and there is nothing to save, or the saving takes longer than `patience`;
- with 64, 75 or 76, where another rank has left so, or crashed, and said it;
- with 76, where another rank was not heard of for too long.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from entrypoint.errors import EXIT_LOST, EXIT_STOPPED
from entrypoint.launch.verdict import Verdict, leave, report

NOTHING, SAVE, STOP = 0, 1, 2  # what a signal says; the most of all ranks counts
MEANING = {signal.SIGTERM: STOP, signal.SIGINT: STOP, signal.SIGUSR1: SAVE}

AT_ONCE = 0.0  # seconds that a told process has to leave by itself: nothing is to be saved
SHORTLY = 3.0  # what was computed is written first
TIDY = 1.0  # seconds for what was registered for the process' end
TICK = 0.2  # seconds between two looks at the other ranks


@dataclass(frozen=True)
class Leaving:
    """Why nobody can go on.

    Attributes:
        code: 75 where a rank was told to stop before there was anything to agree on, 64 or 75 where one ran out of
            memory, else 76.
        why: one line.
        waited: the time that the main thread has to leave by itself is over.
    """

    code: int
    why: str
    waited: bool = False


class Peers(Protocol):
    """The other ranks, as `Watch` sees them."""

    def news(self, passed: float, *, told: bool) -> Leaving | None:
        """Why this rank is to leave, if it is; `passed` seconds after the last call."""

    def announce(self, leaving: Leaving) -> None:
        """Let the others know, within a bounded time, and `close`."""

    def close(self) -> None:
        """Neither tell nor hear anything from now on."""


class Watch:
    """One for a process.

    Attributes:
        patience: seconds that the process has to leave by itself once it was told to; None: as long as it takes.
        peers: the other ranks, once they have met.
        last_words: called with the code before the process is ended.
    """

    def __init__(self) -> None:
        self.patience: float | None = AT_ONCE
        self.peers: Peers | None = None
        self.last_words: Callable[[int], None] = lambda code: None
        self._stop = self._save = False
        self._reader = self._writer = -1
        self._ending = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def told(self) -> int:
        """NOTHING, SAVE or STOP: the most that this process was told."""
        return STOP if self._stop else SAVE if self._save else NOTHING

    def listen(self) -> None:
        """Take the signals from now on, in the main thread; a second one changes nothing."""
        self.start()
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in MEANING:
            signal.signal(number, _nothing)

    def start(self) -> None:
        """Begin to watch."""
        if self._thread is None:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def take(self, meaning: int) -> None:
        """As if a signal had come that says so."""
        self._stop |= meaning == STOP
        self._save |= meaning == SAVE

    def saved(self) -> None:
        """What SIGUSR1 asked for is done; a stop stands."""
        self._save = False

    def close(self) -> None:
        """The main thread ends the process from here on."""
        self._ending.acquire()

    def _run(self) -> None:
        last = time.monotonic()
        told_at = heard_at = None
        while True:
            self._read()
            now = time.monotonic()
            passed, last = now - last, now
            if self._stop and told_at is None:
                told_at = now
            if self.peers and (news := self.peers.news(passed, told=self._stop)):
                heard_at = now if heard_at is None else heard_at
                if news.waited or now - heard_at >= SHORTLY or self.patience == AT_ONCE:
                    self._end(news)
            patience = self.patience  # the main thread changes it
            if told_at is not None and patience is not None and now - told_at >= patience:
                leaving = Leaving(EXIT_STOPPED, "told to stop; start the same command again to go on")
                if self.peers:
                    self.peers.announce(leaving)
                self._end(leaving)

    def _read(self) -> None:
        """What came within a tick."""
        if select.select([self._reader], [], [], TICK)[0]:
            for number in os.read(self._reader, 4096):
                self.take(MEANING.get(signal.Signals(number), NOTHING))

    def _end(self, leaving: Leaving) -> None:
        """End the process, unless the main thread is about to."""
        self._ending.acquire()
        error = leaving.why if leaving.code == EXIT_LOST else ""
        alone = self._stop and leaving.code == EXIT_STOPPED
        # First: of a rank that has reported the launcher says nothing more, and the line is the log's last.
        report(Verdict(leaving.code, hold=not self._stop, told=self._stop, error=error, alone=alone))
        if self.peers:
            self.peers.close()  # the store goes with rank 0, and torch would say so
        if leaving.code == EXIT_LOST or os.environ.get("LOCAL_RANK", "0") == "0":
            with contextlib.suppress(OSError):
                os.write(2, f"entrypoint: {leaving.why}\n".encode())
        with contextlib.suppress(Exception):
            self.last_words(leaving.code)
        leave(leaving.code, TIDY)


def _nothing(number: int, frame: FrameType | None) -> None:
    """The byte on the wakeup pipe is the news."""
