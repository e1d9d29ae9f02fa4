"""The fault matrix: each of its rows, what shows it, and how many of it there are."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults import cases
from tests.faults.cases import Case


@dataclass(frozen=True)
class Row:
    """One kind of fault.

    Attributes:
        name: of its cases here, `name:7`; empty: tests alone show it.
        fault: what happens.
        must: what it must lead to.
        case: makes one case.
        count: cases in `make faults`.
        small: numbers of the cases in `make test`.
        tests: what else shows it: files of the suite, in both.
    """

    name: str
    fault: str
    must: str
    case: Case | None = None
    count: int = 0
    small: tuple[int, ...] = ()
    tests: tuple[str, ...] = ()


ROWS = (
    Row(
        "kill",
        "kill -9 of a machine or of a rank, at random moments; a disk lost with it",
        "the same end; at most what was saved last is repeated",
        cases.kill,
        count=34,
        small=(0, 3),
        tests=("tests/e2e/test_interruption.py", "tests/checkpoint/test_save.py", "tests/storage/test_mirror.py"),
    ),
    Row(
        "term",
        "SIGTERM at random moments: to the launcher, one rank, all, twice",
        "75; no step repeated",
        cases.term,
        count=34,
        small=(1, 4),
        tests=("tests/e2e/test_notice.py", "tests/test_launcher.py"),
    ),
    Row(
        "rank",
        "one rank stopped (SIGSTOP) or killed",
        "the others leave within train.collective_timeout",
        cases.rank,
        count=10,
        small=(1,),
        tests=("tests/test_lost_ranks.py", "tests/e2e/test_notice.py"),
    ),
    Row(
        "world",
        "world size changed at resume: 1 to 2, 2 to 1, 2 to 3",
        "the same course within 1e-5",
        cases.world,
        count=6,
        small=(2,),
        tests=("tests/trainers/test_world_size.py", "tests/e2e/test_interruption.py"),
    ),
    Row(
        "",
        "every file of a checkpoint truncated, bit-flipped, removed, emptied; of a copy in the mirror too",
        "the next older one, and a warning",
        tests=("tests/checkpoint/test_find.py", "tests/storage/test_mirror.py"),
    ),
    Row(
        "",
        "disk full, read-only, permission denied",
        "training goes on or ends with a reason; older checkpoints intact",
        tests=("tests/checkpoint/test_storage_faults.py",),
    ),
    Row(
        "s3",
        "S3: 5xx, resets, lost and half answers, slow, black hole, wrong credentials",
        "nothing lost, no hang beyond the bound",
        cases.s3,
        count=24,
        small=(0,),
        tests=("tests/storage/test_faults.py", "tests/storage/test_mirror.py", "tests/e2e/test_storage.py"),
    ),
    Row(
        "two",
        "two runs started on one checkpoint folder",
        "one wins, the other says who holds it: 64",
        cases.two,
        count=10,
        small=(0,),
        tests=("tests/checkpoint/test_lock.py",),
    ),
    Row(
        "clock",
        "the clock set back by a day, files with new times",
        "order comes from the step",
        cases.clock,
        count=4,
        small=(0,),
        tests=("tests/checkpoint/test_find.py",),
    ),
)
