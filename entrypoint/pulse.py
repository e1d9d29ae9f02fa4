"""Pulse: each rank lets the others know, through the rendezvous store, that it is there, or why it leaves.

A thread with a connection of its own: the main thread may be in a collective, or wait for hours for what rank 0 does
for all. A rank that is dead, stopped or cut off falls silent; one that computes does not.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict

import torch.distributed as dist

from entrypoint.errors import EXIT_LOST
from entrypoint.watch import Leaving

INTERVAL = 0.5  # seconds between two beats
SHARE = 0.9  # of the time-out: sooner than a collective's own, which doesn't say who is lost, and of NCCL's is an abort
PATIENCE_WHEN_TOLD = 15.0  # seconds of silence: of a notice's time nothing is to be waited away for a lost rank
STORE_GONE = 10.0  # seconds: rank 0 may have left in order, and this rank be about to
ANNOUNCE = 2.5  # seconds for the others to hear
LEAVING, HEARD = "leaving", "leaving/heard"


class Pulse:
    """This rank's beat and what it knows of the others'; `timeout` is that of a collective, in seconds."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self._store, self._rank, self._size, self._limit = store, rank, size, SHARE * timeout
        self._names = [f"beat/{other}" for other in range(size)]
        self._clock = 0.0  # seconds in which this process ran: while it was stopped nobody was silent
        self._beats = [b""] * size
        self._since = [0.0] * size  # by `_clock`: when each was heard of
        self._exchanged = 0.0
        self._gone: float | None = None
        self._heard: Leaving | None = None
        self._heard_at = 0.0  # by `_clock`
        self._own: Leaving | None = None
        self._closed, self._wake, self._announced = threading.Event(), threading.Event(), threading.Event()

    def start(self) -> None:
        """Begin; every rank's first beat must be there."""
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def close(self) -> None:
        """Neither beat nor hear from now on."""
        self._closed.set()

    def news(self, passed: float, *, told: bool) -> Leaving | None:
        """Why this rank is to leave: another has said so, or was not heard of for too long."""
        if self._closed.is_set() or self._own is not None:  # it leaves in order, or for the reason that it told
            return None
        self._clock += min(passed, 1.0)
        if self._heard:
            if self._rank or self._announced.is_set() or self._clock - self._heard_at >= ANNOUNCE:
                return self._heard
            return None  # the store goes with rank 0, and not all have heard
        limit = min(PATIENCE_WHEN_TOLD, self._limit) if told else self._limit
        if self._gone is not None and self._clock - self._gone > min(STORE_GONE, limit):
            return Leaving(EXIT_LOST, "rank 0 is gone, and the store with it; leaving", waited=True)
        if self._clock - self._exchanged > limit:
            return Leaving(EXIT_LOST, f"the store of rank 0 has not answered for {limit:g} s; leaving", waited=True)
        silent = [rank for rank, since in enumerate(self._since) if self._clock - since > limit]
        if silent:
            who = ", ".join(map(str, silent[:8])) + ("" if len(silent) <= 8 else f" and {len(silent) - 8} more")
            return Leaving(EXIT_LOST, f"nothing was heard of rank {who} for {limit:g} s; leaving", waited=True)
        return None

    def announce(self, leaving: Leaving) -> None:
        """Tell the others why this rank leaves, and no more after it.

        Rank 0 waits a moment until they know, since the store ends with it.
        """
        self._own = leaving
        self._wake.set()
        self._announced.wait(ANNOUNCE)
        self.close()

    def listen(self, seconds: float) -> Leaving | None:
        """What another rank has announced, or does within `seconds`."""
        deadline = time.monotonic() + seconds
        while self._heard is None and self._gone is None and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.05)  # until the thread has asked the store
        return self._heard

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._exchange()
            except (dist.DistError, RuntimeError):  # the store is gone, and rank 0 with it
                self._gone = self._clock
                self._announced.set()
                return
            self._wake.wait(INTERVAL if self._own is None else 0.05)
            self._wake.clear()

    def _exchange(self) -> None:
        """Beat, hear the others' beats, say and hear who leaves."""
        self._store.add(self._names[self._rank], 1)
        beats = self._store.multi_get(self._names)
        now = self._clock
        for other, beat in enumerate(beats):
            if beat != self._beats[other]:
                self._beats[other], self._since[other] = beat, now
        self._exchanged = now
        if self._own is not None and not self._store.check([LEAVING]):
            self._store.set(LEAVING, json.dumps(asdict(self._own)))
        if self._own is not None and self._rank:
            self._announced.set()
        if self._store.check([LEAVING]):
            if self._heard is None:
                self._heard_at = self._clock
                self._heard = Leaving(**json.loads(self._store.get(LEAVING)))
                self._store.add(HEARD, 1)
            if self._store.add(HEARD, 0) >= self._size:
                self._announced.set()
