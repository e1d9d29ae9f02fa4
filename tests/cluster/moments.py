"""Moments of a run, by what it writes, and spot notices that come in them.

From a notice to the pod's SIGTERM it takes some tenths of a second, longer than a tiny run's save: from the moment on
the run's ranks stand still (SIGSTOP), until the pods are told.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.api import Object
from tests.cluster.plane import until
from tests.cluster.platform import Platform
from tests.cluster.pod import first_process
from tests.cluster.release import Release, metrics, seconds_since

PATIENCE = 420  # seconds for three processes that import torch on a busy machine
TICK = 0.002  # seconds between two looks at a run's files
RETRIES = "volcano.sh/job-retry-count"
TOLD = "SIGTERM: the rank is told"  # the launcher's line


@dataclass(frozen=True)
class Start:
    """One start of a run: the gang's pods, their ranks, and where the run's story was when it began."""

    platform: Platform
    release: Release
    restarts: int
    pods: Sequence[Object]
    ranks: Sequence[psutil.Process]
    begun: int

    @classmethod
    def of(cls, platform: Platform, release: Release) -> Start:
        """The newest, once every pod of it has its rank."""
        pods: list[Object] = []
        ranks: list[psutil.Process] = []
        restarts = 0

        def there() -> bool:
            nonlocal restarts
            restarts, pods[:] = release.restarts, release.pods
            new = all(pod["metadata"]["annotations"][RETRIES] == str(restarts) for pod in pods)
            ranks[:] = [rank for pod in pods for rank in _ranks(release, pod)]
            return new and release.running() and len(ranks) == len(pods)

        until(there, PATIENCE, f"the gang of {release.name} runs")
        story = _story(platform, release)
        return cls(platform, release, restarts, pods, ranks, story.rfind(b'"event": "launch"'))

    @property
    def folder(self) -> Path:
        """The run's checkpoints."""
        return self.platform.checkpoints(self.release.name)

    def has(self, event: str) -> bool:
        """Whether the run's story has this event of this start."""
        return f'"event": "{event}"'.encode() in _story(self.platform, self.release)[self.begun :]

    def log(self, node: int) -> str:
        """What the pod of a node has written so far."""
        return self.release.log(self.pods[node])

    @contextmanager
    def held(self, moment: Moment) -> Iterator[None]:
        """The ranks stand still from the moment on, during the block; after it uploads get through again.

        Raises:
            AssertionError: a rank has ended before.
        """
        deadline = time.monotonic() + PATIENCE
        try:
            while not self._stopped(moment):
                assert all(rank.is_running() for rank in self.ranks), f"{moment.__name__} never was:\n{self.log(0)}"
                assert time.monotonic() < deadline, f"{moment.__name__} was not within {PATIENCE} s:\n{self.log(0)}"
                time.sleep(TICK)
            yield
        finally:
            self._each(psutil.Process.resume)
            self.platform.uploads.set()

    def noticed(self, moment: Moment, *nodes: int) -> Start:
        """The next start, after a notice to some nodes in a moment of this one."""
        api = self.release.plane.api
        names = [self.pods[node]["spec"]["nodeName"] for node in nodes]
        with self.held(moment):
            begun = time.monotonic()
            for claim in self.release.claims:
                if claim.get("status", {}).get("nodeName") in names:
                    api.delete("nodeclaims.karpenter.sh", claim["metadata"]["name"])
            until(lambda: all(TOLD in self.log(node) for node in nodes), 60, f"nodes {nodes} are told")
            told = seconds_since(begun)
        until(lambda: self.release.restarts > self.restarts, PATIENCE, "Volcano restarts the gang")
        restarted = seconds_since(begun)
        following = Start.of(self.platform, self.release)
        times = f"told after {told}, restarted after {restarted}, running again after {seconds_since(begun)}"
        print(f"{self.release.name}: notice to node {', '.join(map(str, nodes))} while {moment.__name__}: {times}")
        return following

    def _stopped(self, moment: Moment) -> bool:
        """Stop every rank if this is the moment, and it still is when the last one stands still."""
        if not moment(self):
            return False
        self._each(psutil.Process.suspend)
        if moment(self):
            return True
        self._each(psutil.Process.resume)
        return False

    def _each(self, action: Callable[[psutil.Process], None]) -> None:
        for rank in self.ranks:
            with suppress(psutil.NoSuchProcess):
                action(rank)


Moment = Callable[[Start], bool]


def starting(start: Start) -> bool:
    """The ranks import, or wait for each other."""
    return not start.has("start")


def training(start: Start) -> bool:
    """A step is under way."""
    return start.has("ready")


def saving(start: Start) -> bool:
    """A checkpoint is being written."""
    return any(start.folder.glob("step-*.partial"))


def past_a_checkpoint(start: Start) -> bool:
    """A checkpoint is complete, and steps were done that are in none."""
    newest = max((int(folder.name[5:]) for folder in start.folder.glob("step-????????")), default=None)
    return newest is not None and max((line["step"] for line in metrics(start.folder)), default=0) > newest


def publishing(start: Start) -> bool:
    """The final model is on its way to the bucket; for long enough to be seen where `uploads` are held back."""
    folder = start.platform.s3.root / start.platform.bucket / start.release.name
    return (folder / ".run.json.unfinished").exists() and not (folder / "run.json").exists()


def exit_codes(release: Release) -> list[int]:
    """Of the gang's pods, in the order of their ends; of a pod whose machine has died there is none."""
    log = (release.plane.folder / "kubelet.log").read_text()
    ended = rf"^{release.namespace}/{release.name}-node\d+-0 ended: {{'trainer': (\d+)}}$"
    return [int(code) for code in re.findall(ended, log, re.MULTILINE)]


def _story(platform: Platform, release: Release) -> bytes:
    """The run's story so far."""
    file = platform.checkpoints(release.name) / "story.jsonl"
    return file.read_bytes() if file.exists() else b""


def _ranks(release: Release, pod: Object) -> list[psutil.Process]:
    """The processes that the launcher of a pod has started as ranks."""
    launcher = first_process(release.plane.folder, pod, "trainer")
    with suppress(psutil.Error):
        return [child for child in (launcher.children() if launcher else []) if "RANK" in child.environ()]
    return []
