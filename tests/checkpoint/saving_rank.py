"""One rank that saves while its storage fails: `python -m tests.checkpoint.saving_rank FOLDER FAULT`.

Step 1 is saved, or is not where FAULT begins with `first-`; step 2 meets the fault; step 3 does not. Rank 0 prints, for
each, what is complete afterwards. Run it where FOLDER is a small tmpfs of its own for `full` and `read-only`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from entrypoint.errors import RunError
from entrypoint.tracking.metrics_log import METRICS, MetricsLog, read_metrics
from entrypoint.world import World, joined
from tests.checkpoint.states import State, checkpoints

OTHER_USER = 65534


class Fault:
    """What happens to the storage, and its end; metrics are logged while it is full to the last byte."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.filler = folder / "filler"
        self.log = MetricsLog(folder, resumed_at=0, fresh=True) if kind == "full" else None

    def begin(self) -> None:
        if self.kind == "full":
            with self.filler.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(b"x" * 65536):
                    pass
            assert self.log is not None
            for step in (1, 2, 3):
                self.log.log(step, {"loss": float(step)}, epoch=None)
            os.truncate(self.filler, self.filler.stat().st_size - 400_000)  # not enough for what is saved
        elif self.kind == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)
        else:
            self.folder.chmod(0o500)

    def end(self) -> None:
        if self.kind == "full":
            self.filler.unlink()
            assert self.log is not None
            self.log.log(4, {"loss": 4.0}, epoch=None)
            self.log.close()
            print("metrics of", *(line["step"] for line in read_metrics(self.folder / METRICS)))
        elif self.kind == "read-only":
            subprocess.run(["mount", "-o", "remount,rw", self.folder], check=True)
        else:
            self.folder.chmod(0o700)


def main(folder: Path, kind: str, world: World) -> None:
    first = kind.startswith("first-")
    fault = Fault(kind.removeprefix("first-") if world.is_main else "", folder)
    run, store = State.fresh(400), checkpoints(folder, world=world)
    for step in (1, 2, 3):
        at_fault = step == 2 or (step == 1 and first)
        if at_fault and world.is_main:
            fault.begin()
        world.barrier()
        run.step()
        run.save(store)
        store.wait()
        world.barrier()
        if at_fault and world.is_main:
            fault.end()
        world.barrier()
        world.say(f"{step}: {' '.join(sorted(path.name for path in folder.glob('step-*')))}, newest {store.newest}")


if __name__ == "__main__":
    path, kind = Path(sys.argv[1]), sys.argv[2]
    if kind.endswith("permission") and os.getuid() == 0:  # whom no mode keeps out
        os.chown(path, OTHER_USER, OTHER_USER)
        os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)
    try:
        with joined(300) as world:
            main(path, kind, world)
    except RunError as error:
        print(f"entrypoint: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
