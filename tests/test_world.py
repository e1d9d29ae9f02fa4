"""Meetings of ranks: what rank 0 does for all, and what the others learn when it refuses."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from entrypoint.launch.topology import free_port
from tests.process import ROOT, scrubbed

PROGRAM = """
import sys
from entrypoint.errors import DataError, RunError
from entrypoint.world import joined

def refuse():
    raise DataError("no such bucket")

with joined(30) as world:
    made = world.once(lambda: {"key": f"made by {world.rank}"})
    assert made == {"key": "made by 0"}, made
    world.barrier()
    try:
        world.once(refuse)
    except RunError as error:
        print(f"{world.rank} {type(error).__name__} {error.exit_code} {error}")
    assert world.once(lambda: 7) == 7
    assert world.each(lambda: world.rank * 10) == world.rank * 10
    try:
        world.each(lambda: refuse() if world.rank == 2 else 5)
    except RunError as error:
        print(f"{world.rank} {type(error).__name__} {error.exit_code} {error}")
"""


def test_every_rank_gets_what_rank_0_made_and_what_any_rank_refused() -> None:
    meet = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM)],
            env=scrubbed({**meet, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = sorted(line for rank in ranks for line in rank.communicate(timeout=300)[0].splitlines())
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert said == [
        "0 DataError 64 no such bucket",
        "0 RefusedElsewhere 64 rank 2 refused the run: no such bucket",
        "1 RefusedElsewhere 64 rank 0 refused the run: no such bucket",
        "1 RefusedElsewhere 64 rank 2 refused the run: no such bucket",
        "2 DataError 64 no such bucket",
        "2 RefusedElsewhere 64 rank 0 refused the run: no such bucket",
    ]
