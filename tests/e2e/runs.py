"""Runs of the program as a user starts and ends them, and the files that they leave."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow as pa

from tests.process import ROOT, scrubbed

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = 600  # seconds for what takes ten on a quiet machine
ENTRYPOINT = ("-m", "entrypoint")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *ENTRYPOINT)
TWO_RANKS = {"LOCAL_WORLD_SIZE": "2"}
AT_ONCE = 2  # runs that are started together where none depends on another

# What every run of these tests shares. Of 24 prompts five are held out: five groups a step are four steps an epoch.
TINY_RUN = (
    "data.held_out_share=0.3",
    "train.batch_size=5",
    "train.learning_rate=1e-3",
    "train.max_length=200",
    "train.logging_steps=1",
)


@dataclass(frozen=True)
class Ended:
    """A process that has ended, and the two folders of its run."""

    code: int
    out: str
    err: str
    checkpoints: Path
    output: Path

    @property
    def last_word(self) -> str:
        """The last line of stderr."""
        return (self.err.strip().splitlines() or [""])[-1]

    @cached_property
    def record(self) -> dict[str, Any]:
        """run.json."""
        content: dict[str, Any] = json.loads((self.output / "run.json").read_text())
        return content

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl without the times."""
        return [{k: v for k, v in line.items() if k != "time"} for line in read_lines(self.checkpoints)]

    def curve(self, name: str) -> dict[int, float]:
        """A metric by step."""
        return {line["step"]: line["metrics"][name] for line in self.lines if name in line["metrics"]}

    def groups(self, part: str) -> list[dict[str, Any]]:
        """`train` or `held_out` groups as plain values."""
        (path,) = self.checkpoints.glob(f"prepared/*/{part}.arrow")
        with pa.memory_map(str(path)) as file:
            rows: list[dict[str, Any]] = pa.ipc.open_stream(file).read_all().to_pylist()
        return rows


@dataclass(frozen=True)
class Start:
    """What a run is started with; of two words for one key the later counts.

    Checkpoints go to `folder`/checkpoints, the output to `folder`/out, unless the words name other places.

    places: whether the command line says so, rather than a run file.
    """

    folder: Path
    words: tuple[str, ...]
    env: Mapping[str, str | None] | None = None
    program: Sequence[str] = ENTRYPOINT
    places: bool = True

    @contextmanager
    def process(self) -> Iterator[subprocess.Popen[str]]:
        """The run in a session of its own, killed at the end of the block if it is still there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        places = (f"checkpoint.path={self.folder / 'checkpoints'}", f"output.path={self.folder / 'out'}")
        words = {word.partition("=")[0]: word for word in (*(places if self.places else ()), *self.words)}
        with (self.folder / "stdout").open("w") as out, (self.folder / "stderr").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, *self.program, *words.values()],
                env=scrubbed(self.env),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                if process.poll() is None:
                    kill(process)

    def run(self) -> Ended:
        """Start it and wait for its end."""
        with self.process() as process:
            return self.ended(process)

    def ended(self, process: subprocess.Popen[str]) -> Ended:
        """Wait for the end of a run that was started so."""
        code = process.wait(PATIENCE)
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return Ended(code, out, err, self.folder / "checkpoints", self.folder / "out")

    def wait_for_step(self, process: subprocess.Popen[str], step: int, saved: int = 0) -> None:
        """Wait until metrics.jsonl holds `step`; with `saved`, until the checkpoint of that step is complete too."""
        checkpoints = self.folder / "checkpoints"

        def there() -> bool:
            assert process.poll() is None, f"the run ended by itself: {(self.folder / 'stderr').read_text()[-2000:]}"
            complete = not saved or (checkpoints / f"step-{saved:08d}").exists()
            return complete and any(line["step"] >= step for line in read_lines(checkpoints))

        wait_until(there)


def run(folder: Path, *words: str, env: Mapping[str, str | None] | None = None) -> Ended:
    """`python -m entrypoint <words>`, waited for."""
    return Start(folder, words, env).run()


def run_all(starts: Mapping[str, Start]) -> dict[str, Ended]:
    """Runs that have nothing to do with each other, a few at a time: most of each is a process' start."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(starts, pool.map(Start.run, starts.values()), strict=True))


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher and its process group, as a lost machine; waits until its ranks are gone too."""
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(PATIENCE)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, "a rank has outlived its launcher"


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until `condition` holds.

    Raises:
        TimeoutError: it never did.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing within {PATIENCE} s")
        time.sleep(0.005)


def read_lines(checkpoints: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl so far."""
    path = checkpoints / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def maths(run: Ended) -> list[tuple[int, float | None, dict[str, float]]]:
    """What a run logged of its numbers, (step, epoch, metrics): without times, the ranks' loads and its story.

    In the order of steps, of evaluation and loss: a run that was stopped in an evaluation makes it up when it is back.
    """
    aside = ("tokens/", "speed/", "time/", "story/")
    lines = sorted(run.lines, key=lambda line: (line["step"], min(line["metrics"])))
    return [
        (line["step"], line["epoch"], {n: v for n, v in line["metrics"].items() if not n.startswith(aside)})
        for line in lines
    ]


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved model or adapter."""
    from safetensors.torch import load_file

    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def sha256(path: Path) -> str:
    """Hexadecimal, as in run.json."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file below a folder with its time of change and its content's sum: what must not change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, sha256(path)) for path in files}
