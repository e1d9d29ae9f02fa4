"""A few cases of the fault matrix; `make faults` runs all of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.__main__ import NAMED, judge
from tests.faults.life import ENDED
from tests.faults.scene import Scene, scene
from tests.faults.table import ROWS
from tests.faults.zygote import Zygote
from tests.process import ROOT

pytestmark = pytest.mark.slow

SEED = 1
SMALL = [(name, number) for name, row in NAMED.items() for number in row.small]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("faults"), zygote) as made:
        yield made


@pytest.mark.parametrize(("name", "number"), SMALL, ids=[f"{name}:{number}" for name, number in SMALL])
def test_a_run_that_is_broken_ends_as_if_it_had_not_been(shared: Scene, name: str, number: int) -> None:
    verdict = judge(shared, NAMED[name], number, SEED)
    assert any(fault.phase != ENDED for fault in verdict.faults)


def test_every_row_is_shown_by_tests_that_are_there() -> None:
    named = [test.split("::") for row in ROWS for test in row.tests]
    assert [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text()] == []
    assert all(row.case or row.tests for row in ROWS)
