"""What all cases share: a tiny model, tiny traces, a real S3 server, the zygote, and the straight run of each shape."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e import traces
from tests.e2e.runs import TINY_RUN, Ended
from tests.faults.life import Life
from tests.faults.zygote import Zygote
from tests.servers.s3 import S3Server, s3_server

STEPS, SAVE_EVERY, EVAL_STEPS = 12, 3, 4
TIMEOUT = 20  # train.collective_timeout, seconds: a rank that stands still on a busy machine is none that is lost


@dataclass(frozen=True)
class Shape:
    """Which run; runs of one shape end with the same bits."""

    method: str
    ranks: int
    fsdp: bool = False

    def __str__(self) -> str:
        return f"{self.method}-{self.ranks}" + ("-fsdp" if self.fsdp else "")

    @property
    def words(self) -> tuple[str, ...]:
        """What its command line says beside the places."""
        return (
            f"method={self.method}",
            f"train.max_steps={STEPS}",
            f"train.eval_steps={EVAL_STEPS}",
            f"train.collective_timeout={TIMEOUT}",
            f"train.sharding={'fsdp' if self.fsdp else 'none'}",
            f"checkpoint.save_every={SAVE_EVERY}",
            "checkpoint.max_crashes=99",
            *TINY_RUN,
            "train.micro_batch_tokens=150",  # several forward calls in a step and in the reference pass
        )


SHAPES = (
    *(Shape(method, ranks) for ranks in (1, 2) for method in ("grpo", "dpo")),
    *(Shape(method, 2, fsdp=True) for method in ("grpo", "dpo")),
)


@dataclass
class Straight:
    """A run that nothing happened to."""

    ended: Ended
    seconds: dict[str, float]  # that it spent in each phase


@dataclass
class Scene:
    """One for a process; cases may use it from several threads."""

    folder: Path
    lake: Path
    tiny: Path
    s3: S3Server
    zygote: Zygote
    _straight: dict[Shape, Straight] = field(default_factory=dict)
    _locks: dict[Shape, threading.Lock] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def straight(self, shape: Shape) -> Straight:
        """The straight run of a shape, made when it is asked for first."""
        with self._lock:
            lock = self._locks.setdefault(shape, threading.Lock())
        with lock:
            if shape not in self._straight:
                life = self.life(f"straight-{shape}", shape)
                start = life.start()
                seconds = start.watch_phases()
                ended = start.end()
                if ended.code != 0:
                    raise RuntimeError(f"{life.folder}: the straight run ended with {ended.code}: {ended.err[-2000:]}")
                self._straight[shape] = Straight(ended, seconds)
            return self._straight[shape]

    def life(self, name: str, shape: Shape, *words: str) -> Life:
        """A run that may be started again and again; `words` count where the shape's own differ."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        said = (
            f"data.path={self.lake}",
            f"model.path={self.tiny}",
            f"checkpoint.path={folder / 'checkpoints'}",
            f"output.path={folder / 'out'}",
            *shape.words,
            *words,
        )
        by_key = {word.partition("=")[0]: word for word in said}
        return Life(self.zygote, folder, shape.ranks, shape.fsdp, by_key)


@contextlib.contextmanager
def scene(folder: Path, zygote: Zygote) -> Iterator[Scene]:
    """Everything started, and ended with the block."""
    lake = traces.write_hive(folder / "lake", traces.learnable())
    with s3_server(folder / "s3") as server:
        yield Scene(folder, lake, zygote.model, server, zygote)
