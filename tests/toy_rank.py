"""A rank that does what it is told: `python -m tests.toy_rank FOLDER "0:print=hello,exit=75" "1:exit=0"`.

Every rank first writes FOLDER/started.RANK with its pid and environment. Then it takes its words one by one:

    exit=N       report the verdict N, exit with N        crash=N   exit with N, nothing reported
    verdict=N    report the verdict N, go on              die=NAME  end by the signal NAME
    hold         75, where another node was told to stop  fail=S    exit with 1, and S as the error
    catch        note TERM, INT and USR1 in signals.RANK  until=NAME wait until that signal was noted
    ignore=NAME  ignore that signal                       wait=FILE wait for FOLDER/FILE
    touch=FILE   write FOLDER/FILE                        print=S, complain=S   a line on stdout, stderr
    flood=N      N long lines on stdout                   child     a child of its own; its pid goes to child.RANK
    told         75, told as the others were            alone     75, told and left without them
    orphan       a grandchild whose parent leaves at once; it lives until FOLDER/orphan-may-leave is there
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from entrypoint.launch.verdict import Verdict, report

DEADLINE = 60.0  # seconds; nothing waits longer, so that a failing test leaves no process behind
RANK = os.environ["RANK"]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Poll until `condition()`; ends the process with 99 where it never comes."""
    until = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > until:
            print(f"toy rank {RANK}: {what} never came", file=sys.stderr)
            os._exit(99)
        time.sleep(0.01)


def note(folder: Path, name: str, text: str) -> None:
    with open(folder / name, "a") as file:
        file.write(text + "\n")


def signum(name: str) -> int:
    return int(signal.Signals[f"SIG{name}"])


def act(folder: Path, word: str, value: str) -> None:
    match word:
        case "exit":
            report(Verdict(int(value)))
            sys.exit(int(value))
        case "hold":
            report(Verdict(75, hold=True))
            sys.exit(75)
        case "told" | "alone":
            report(Verdict(75, told=True, alone=word == "alone"))
            sys.exit(75)
        case "fail":
            report(Verdict(1, error=value))
            sys.exit(1)
        case "crash":
            sys.exit(int(value))
        case "verdict":
            report(Verdict(int(value)))
        case "die":
            signal.signal(signum(value), signal.SIG_DFL) if value != "KILL" else None
            os.kill(os.getpid(), signum(value))
            signal.pause()
        case "catch":
            for name in ("TERM", "INT", "USR1"):
                signal.signal(signum(name), lambda number, _: note(folder, f"signals.{RANK}", str(number)))
            note(folder, f"ready.{RANK}", "")
        case "ignore":
            signal.signal(signum(value), signal.SIG_IGN)
            note(folder, f"ready.{RANK}", "")
        case "until":
            noted = folder / f"signals.{RANK}"
            wait_for(lambda: noted.exists() and str(signum(value)) in noted.read_text().split(), f"SIG{value}")
        case "wait":
            wait_for((folder / value).exists, value)
        case "touch":
            note(folder, value, "")
        case "print":
            print(value)
        case "complain":
            print(value, file=sys.stderr)
        case "flood":
            for number in range(int(value)):
                print(f"{number:06d}" + "x" * 500)
        case "child":
            child = subprocess.Popen([sys.executable, "-S", "-c", f"import time; time.sleep({DEADLINE})"])
            note(folder, f"child.{RANK}", str(child.pid))
        case "orphan":
            code = (
                "import os, sys, time\nif os.fork(): os._exit(0)\n"
                "folder, until = sys.argv[1], time.monotonic() + 60\n"
                "open(folder + '/orphan', 'w').write(f'{os.getpid()} ')\n"
                "while not os.path.exists(folder + '/orphan-may-leave') and time.monotonic() < until:\n"
                "    time.sleep(0.01)\n"
            )
            subprocess.run([sys.executable, "-S", "-c", code, str(folder)], check=True)
        case _:
            raise SystemExit(f"toy rank: unknown word {word!r}")


def main() -> None:
    folder = Path(sys.argv[1])
    started = {"pid": os.getpid(), "env": dict(os.environ), "argv": sys.argv[1:], "tty": sys.stdout.isatty()}
    partial = folder / f".started.{RANK}"
    partial.write_text(json.dumps(started))
    partial.rename(folder / f"started.{RANK}")
    for script in sys.argv[2:]:
        rank, _, words = script.partition(":")
        if rank in (RANK, "*"):
            for word in filter(None, words.split(",")):
                act(folder, *word.partition("=")[::2])


if __name__ == "__main__":
    main()
