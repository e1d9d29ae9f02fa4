"""Karpenter with its KWOK provider, and what there is to buy."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from urllib import request

from tests.cluster.instance_types import CAPACITY_TYPES, instance_types
from tests.cluster.programs import Programs
from tests.process import scrubbed
from tests.servers.server import serve


class Karpenter:
    """The controller, from `offer` to `close`; `inside` is a command that runs another in its network.

    KWOK's provider never says, as EC2 does, that it has no capacity. AWS's provider remembers that answer as offerings
    that are not available, for some minutes; here they are left out of the file that the provider reads when it starts,
    so Karpenter starts anew. It keeps nothing in memory that the API server does not hold.
    """

    def __init__(self, programs: Programs, folder: Path, kubeconfig: Path, address: str, inside: list[str]) -> None:
        self._programs, self._folder, self._address, self._inside = programs, folder, address, inside
        self._environment: Mapping[str, str] = {**scrubbed(), "KUBECONFIG": str(kubeconfig)}
        self._running = ExitStack()
        self._starts = 0

    def offer(self, *capacity_types: str) -> None:
        """From now on only `capacity_types` can be had, of every instance type in every zone; nothing given: all."""
        self.close()
        types = self._folder / "instance-types.json"
        types.write_text(json.dumps(instance_types(capacity_types or CAPACITY_TYPES), indent=1))
        self._starts += 1
        log = self._folder / ("karpenter.log" if self._starts == 1 else f"karpenter-{self._starts}.log")
        command = [*self._inside, *self._programs.karpenter(types)]
        self._running.enter_context(
            serve(command, env=self._environment, log=log, ready=_answers(self._address), timeout=120)
        )

    def close(self) -> None:
        """End it."""
        self._running.close()


def _answers(address: str) -> Callable[[], bool]:
    def ready() -> bool:
        with contextlib.suppress(OSError), request.urlopen(f"http://{address}:8081/readyz", timeout=1) as answer:
            return bool(answer.status == 200)
        return False

    return ready
