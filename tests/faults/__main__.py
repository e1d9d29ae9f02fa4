"""The fault matrix: `python -m tests.faults`; one case alone: `python -m tests.faults --seed 7 --case kill:17`.

Runs are broken at moments that the seed chooses, started again until they end, and judged; see `table.py` for the
rows. What went wrong keeps its folder. The last lines are the table for docs/reliability.md.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

from tests.faults.judge import Verdict
from tests.faults.life import ENDED, PHASES
from tests.faults.scene import Scene, scene
from tests.faults.table import ROWS, Row
from tests.faults.zygote import Zygote

AT_ONCE = 2  # cases: what two cores take
NAMED = {row.name: row for row in ROWS if row.case}


@dataclass
class Tally:
    """What the cases of a row have shown."""

    verdicts: list[Verdict] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def judge(scene: Scene, row: Row, number: int, seed: int) -> Verdict:
    """One case.

    Raises:
        AssertionError: the run did not do what it must.
    """
    assert row.case is not None
    return row.case(scene, f"{row.name}-{number}", number, random.Random(f"{seed}/{row.name}/{number}"))


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    todo = [(NAMED[name], int(number)) for name, _, number in (case.partition(":") for case in options.case)]
    if not todo:
        todo = [(row, number) for row in NAMED.values() for number in range(row.count) if row.name in options.rows]
        todo.sort(key=lambda case: case[1] / case[0].count)  # of every row the same share at any time
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=options.dir))
    print(f"faults: {len(todo)} cases, seed {options.seed}, in {folder}", flush=True)
    tallies, lock, begun = {name: Tally() for name in NAMED}, threading.Lock(), time.monotonic()
    with (
        closing(Zygote(folder / "tiny")) as zygote,
        scene(folder, zygote) as shared,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):

        def one(row: Row, number: int) -> None:
            case, since = f"{row.name}:{number}", time.monotonic()
            if since - begun > 60 * options.minutes:
                return
            try:
                verdict = judge(shared, row, number, options.seed)
            except Exception as error:
                with lock:
                    tallies[row.name].failed.append(case)
                    print(f"{case} FAILED: {error}\n{traceback.format_exc()[-1500:]}", flush=True)
                    print(f"  again: python -m tests.faults --seed {options.seed} --case {case}", flush=True)
                return
            shutil.rmtree(folder / f"{row.name}-{number}", ignore_errors=True)
            said = ", ".join(f"{fault.what} in {fault.phase}: {fault.code}" for fault in verdict.faults)
            with lock:
                tallies[row.name].verdicts.append(verdict)
                print(f"{case} ok ({time.monotonic() - since:.0f} s): {said}", flush=True)

        for done in [pool.submit(one, row, number) for row, number in todo]:
            done.result()
    report(tallies, options.seed, time.monotonic() - begun)
    failed = [case for tally in tallies.values() for case in tally.failed]
    print(f"{len(failed)} failed: {' '.join(failed)}; see {folder}" if failed else "all judged equal", flush=True)
    code = run_tests(folder) if options.tests and not options.case else 0
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--case", action="append", default=[], help="ROW:NUMBER, as it is printed")
    parser.add_argument("--rows", nargs="+", default=list(NAMED), choices=list(NAMED))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no case begins later")
    parser.add_argument("--tests", action="store_true", help="the tests that show rows too, unless --case is given")
    parser.add_argument("--dir", help="where the runs are; default: the folder for temporary files")
    return parser.parse_args(argv)


def report(tallies: dict[str, Tally], seed: int, seconds: float) -> None:
    """The table."""
    columns = ("row", "runs", "faults", "where they hit", "steps repeated: starts", "seconds to the end", "failed")
    print(f"\nseed {seed}, {seconds / 60:.0f} min\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, tally in tallies.items():
        if not tally.verdicts and not tally.failed:
            continue
        faults = [fault for verdict in tally.verdicts for fault in verdict.faults]
        hit = Counter(fault.phase for fault in faults)
        where = ", ".join(f"{phase} {hit[phase]}" for phase in (*PHASES, ENDED) if hit[phase])
        repeated = Counter(steps for verdict in tally.verdicts for _, steps in verdict.repeated)
        steps = ", ".join(f"{steps}: {repeated[steps]}" for steps in sorted(repeated))
        injected = sum(verdict.injected for verdict in tally.verdicts)
        real = sum(fault.real for fault in faults)
        number = f"{sum(fault.phase != ENDED for fault in faults)}"
        number += f", {real} of the real command" if real else ""
        number += f", and {injected:,} of the storage" if injected else ""
        ends = sorted(fault.seconds for fault in faults if fault.phase != ENDED)
        ended = f"{median(ends):.1f}, at most {ends[-1]:.1f}" if ends else ""
        print(f"| {name} | {len(tally.verdicts)} | {number} | {where} | {steps} | {ended} | {len(tally.failed)} |")


def run_tests(folder: Path) -> int:
    """The suite's tests that show rows, and how many of each passed."""
    tests = sorted({test for row in ROWS for test in row.tests})
    said = folder / "tests.xml"
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={said}", *tests], check=False).returncode
    passed = Counter(
        f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').partition('[')[0]}"
        for case in ElementTree.parse(said).iter("testcase")
        if case.find("failure") is None and case.find("error") is None
    )
    print("\n| row | tests passed |\n|---|---|")
    for row in ROWS:
        print(f"| {row.fault} | {sum(passed[test] for test in row.tests)} |")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
