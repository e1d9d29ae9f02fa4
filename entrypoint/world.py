"""The ranks of a run: who this process is, and how one rank does for all what only one may do.

Waiting goes through the rendezvous store, not through a collective: rank 0 may read traces for an hour, and no
collective's timeout should know of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from entrypoint.errors import (
    EXIT_LOST,
    EXIT_REFUSED,
    EXIT_STOPPED,
    ConfigError,
    LostRankError,
    RefusedElsewhere,
    RunError,
    StoppedError,
)
from entrypoint.pulse import Pulse
from entrypoint.watch import NOTHING, STOP, Leaving, Watch

T = TypeVar("T")

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
WAIT_DAYS = 7  # longer than any preparation of data; who waits for a rank that is lost is ended by `Watch`
FAREWELL_SECONDS = 10  # rank 0 keeps the store open this long, so that the others learn why it leaves
HEARSAY = 1.5  # seconds in which a rank whose collective broke may learn why


@dataclass
class World:
    """This rank among `size` ranks; `store` is None where it is alone, `patience` is a barrier's, in seconds.

    `once`, `each` and `barrier` are meetings: every rank must come to all of them, in the same order.
    """

    rank: int
    size: int
    store: dist.Store | None
    patience: int = 1800
    watch: Watch = field(default_factory=Watch)
    meetings: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def once(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank, as JSON; the others wait as long as it takes.

        Raises:
            RunError: what `make` raised on rank 0; RefusedElsewhere with its exit code on the others.
        """
        return self._meet(make, makers=[0])[0]

    def each(self, make: Callable[[], T]) -> T:
        """What `make` gives on this rank, once every rank has made its own; where one refuses, all leave.

        Raises:
            RunError: what `make` raised here; RefusedElsewhere with the exit code of the first that refused.
        """
        made: list[T] = []

        def keep() -> None:
            made.append(make())

        self._meet(keep, makers=list(range(self.size)))
        return made[0]

    def barrier(self) -> None:
        """Wait for every rank, as long as a collective would: a lost one must not hold the others for ever."""
        if self.store is None:
            return
        name = self._meeting()
        if self.store.add(f"{name}/arrived", 1) == self.size:
            self.store.set(f"{name}/all", "1")
        self.store.wait([f"{name}/all"], timedelta(seconds=self.patience))

    def _meet(self, make: Callable[[], T], makers: list[int]) -> list[T]:
        """What the makers made, on every rank."""
        if self.store is None:
            return [make()]
        name, refusal = self._meeting(), None
        if self.rank in makers:
            try:
                said: dict[str, Any] = {"made": make()}
            except RunError as error:
                refusal, said = error, {"error": str(error), "exit_code": error.exit_code}
            self.store.set(f"{name}/{self.rank}", json.dumps(said))
        names = [f"{name}/{rank}" for rank in makers]
        self.store.wait(names, timedelta(days=WAIT_DAYS))
        heard = [json.loads(self.store.get(key)) for key in names]
        refused = next(((rank, said) for rank, said in zip(makers, heard, strict=True) if "error" in said), None)
        if refused is None:
            return [said["made"] for said in heard]
        self._farewell(name)
        if refusal is not None:
            raise refusal
        elsewhere = RefusedElsewhere(f"rank {refused[0]} refused the run: {refused[1]['error']}")
        elsewhere.exit_code = refused[1]["exit_code"]
        elsewhere.hold = elsewhere.exit_code == EXIT_STOPPED and self.watch.told != STOP
        raise elsewhere

    def _meeting(self) -> str:
        self.meetings += 1
        return f"meeting-{self.meetings}"

    def _farewell(self, name: str) -> None:
        """Rank 0 holds the store: it leaves when every rank has heard why, or after a while."""
        assert self.store is not None
        deadline = time.monotonic() + FAREWELL_SECONDS
        self.store.add(f"{name}/heard", 1)
        while self.is_main and self.store.add(f"{name}/heard", 0) < self.size and time.monotonic() < deadline:
            time.sleep(0.05)  # polling a counter of other processes; bounded by the deadline

    def part(self) -> None:
        """Leave in order, once for a run: rank 0, which holds the store, last."""
        if self.store is not None:
            with suppress(dist.DistError, RuntimeError):  # rank 0, and the store with it, did not wait that long
                self._farewell("end")

    def agreed(self, wanted: int = NOTHING) -> int:
        """The most that any rank was told, or wants by itself, the same on all; one all-reduce of one number."""
        return int(self.most(max(self.watch.told, wanted)))

    def check_stop(self, doing: str) -> None:
        """Where every rank comes by again and again while nothing is to be saved: leave together, if one was told to.

        Raises:
            StoppedError: on all ranks alike.
        """
        if self.agreed() == STOP:
            raise StoppedError(
                f"told to stop while {doing}; start the same command again to go on", hold=self.watch.told != STOP
            )

    def say(self, line: str) -> None:
        """Print a line of the run's log, on rank 0."""
        if self.is_main:
            print(line, flush=True)

    def warn(self, line: str) -> None:
        """Print a warning, on rank 0."""
        if self.is_main:
            print(f"entrypoint: warning: {line}", file=sys.stderr, flush=True)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def most(self, value: float) -> float:
        """The greatest of the ranks' values."""
        greatest = torch.tensor(value, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
        return float(greatest)


@contextmanager
def joined(collective_timeout: int, watch: Watch | None = None) -> Iterator[World]:
    """Join the run's ranks as RANK, LOCAL_RANK and WORLD_SIZE say, and leave them in order.

    Args:
        collective_timeout: seconds after which a lost rank is given up, in a collective and out of it.
        watch: what this process is told.

    Raises:
        LostRankError: another rank never came, or was lost on the way.
        StoppedError: another rank has left so before the first step.
    """
    watch = watch or Watch()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size > 1 and "LOCAL_RANK" not in os.environ:
        raise ConfigError("LOCAL_RANK: not set, expected this rank's number on its node, beside WORLD_SIZE and RANK")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_WORLD_SIZE: rank {local_rank} of this node has no CUDA device, there are "
                f"{torch.cuda.device_count()}; start one rank a device"
            )
        torch.cuda.set_device(local_rank)
        # On an H200 torch prefers cuDNN's attention, which builds a plan for each new length (0.4 to 0.5 s on a B200:
        # github.com/modelscope/FunASR/issues/3704); a packed row's prompts have lengths of their own each time.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if size == 1:
        # accelerate makes a process group and DDP even for a lone rank where it sees these.
        hidden = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
        try:
            yield World(rank, size, None, watch=watch)
        finally:
            os.environ.update(hidden)
        return
    world, pulse = _meet(rank, size, collective_timeout, watch)
    try:
        yield world
        # Without the barrier a fast rank's leaving aborted a slow one (1 of 12 runs, SIGABRT after the results were
        # written). Only here: after an error it would hide that behind a time-out.
        world.barrier()
        pulse.close()
        dist.destroy_process_group()
        world.part()
    except RunError as error:
        if error.sudden:
            pulse.announce(Leaving(error.exit_code, str(error)))
        else:
            pulse.close()
            world.part()
        raise
    except Exception as error:
        raise _broken(error, world, pulse) from error


def _meet(rank: int, size: int, timeout: int, watch: Watch) -> tuple[World, Pulse]:
    """All ranks, each looked after by the others from here on."""
    patience = timedelta(seconds=timeout)
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", rank, size, timeout=patience)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        collectives = dist.PrefixStore("collectives", store)
        dist.init_process_group(backend, store=collectives, rank=rank, world_size=size, timeout=patience)
        world = World(rank, size, dist.PrefixStore("world", store), patience=timeout, watch=watch)
        beats = dist.PrefixStore("pulse", store.clone())
        beats.add(f"beat/{rank}", 1)
        world.barrier()
    except (dist.DistError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostRankError(f"{where}: not all of {size} ranks met within {timeout} s: {_line(error)}") from error
    watch.peers = pulse = Pulse(beats, rank, size, timeout)
    pulse.start()
    watch.start()
    return world, pulse


def _broken(error: Exception, world: World, pulse: Pulse) -> Exception:
    """What an error that is none of ours means for this rank; where it is this rank's alone, the others learn of it."""
    text = str(error)
    communication = isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text
    heard = pulse.listen(HEARSAY) if communication else None
    if heard and heard.code == EXIT_STOPPED:
        return StoppedError(heard.why, hold=world.watch.told != STOP)
    if heard and heard.code == EXIT_REFUSED:
        return RefusedElsewhere(heard.why)
    if heard or communication:
        return LostRankError(heard.why if heard else f"another rank is lost: {_line(error)}")
    pulse.announce(Leaving(EXIT_LOST, f"rank {world.rank} crashed: {type(error).__name__}: {_line(error)}; leaving"))
    return error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
