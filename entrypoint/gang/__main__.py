"""`python -m entrypoint.gang`: gives a gang's nodes back where it does not start in time, and tries again later."""

from __future__ import annotations

import re
import signal
import sys
from types import FrameType

from entrypoint.errors import EXIT_DONE, ConfigError, RunError
from entrypoint.gang.job import VolcanoJob
from entrypoint.gang.watcher import Limits, Watcher
from entrypoint.kubernetes import in_cluster

OPTIONS = ("--job", "--record", "--wait-timeout", "--retry-after", "--retries")
SECONDS = {"h": 3600, "m": 60, "s": 1}
USAGE = """\
Watches the gang of one Volcano Job, in a pod of the same cluster: nodes that wait for others are paid for.

  python -m entrypoint.gang --job NAMESPACE/NAME --record CONFIGMAP --wait-timeout 30m --retry-after 15m --retries 10

  --job NAMESPACE/NAME    the Volcano Job
  --record CONFIGMAP      beside the Job; what must outlive this pod is written there
  --wait-timeout TIME     a gang whose pods don't all run after so long is aborted: 90s, 30m, 1h30m
  --retry-after TIME      and resumed after so long
  --retries N             so often in a row; then it stays aborted

A Job that stays aborted, by exit code 64, by somebody or after the last try, is watched again once it is resumed.
Exit codes: 0 the run has ended or is gone; 64 the options, or the pod's rights, can't be used; 76 the API server was
silent for an hour: start it again.
"""


def main(argv: list[str]) -> int:
    """Watch the Job that `argv` names; returns the documented exit code."""
    if "--help" in argv or "-h" in argv:
        print(USAGE, end="")
        return EXIT_DONE
    signal.signal(signal.SIGTERM, end)
    try:
        (namespace, name), record, limits = parse(argv)
        return Watcher(VolcanoJob(in_cluster(), namespace, name, record), limits).run()
    except RunError as error:
        print(f"entrypoint: gang: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def end(signum: int, frame: FrameType | None) -> None:
    """Leave as a process that a signal ended: the pod is moved, and the next one goes on."""
    raise SystemExit(128 + signum)


def parse(argv: list[str]) -> tuple[tuple[str, str], str, Limits]:
    """(namespace, name) of the Job, the record's name, the limits.

    Raises:
        ConfigError: an option is missing, unknown, given twice or has a wrong value.
    """
    given: dict[str, str] = {}
    rest = iter(argv)
    for word in rest:
        option, equals, value = word.partition("=")
        if option not in OPTIONS or option in given:
            raise ConfigError(f"expected each of {', '.join(OPTIONS)} once, got {word}")
        given[option] = value if equals else next(rest, "")
    for option in OPTIONS:
        if not given.get(option):
            raise ConfigError(f"{option}: got nothing; give it")
    namespace, _, name = given["--job"].partition("/")
    if not (namespace and name):
        raise ConfigError(f"--job: expected NAMESPACE/NAME, got {given['--job']}")
    if not re.fullmatch("[0-9]+", given["--retries"]):
        raise ConfigError(f"--retries: expected a whole number >= 0, got {given['--retries']}")
    limits = Limits(
        wait=seconds("--wait-timeout", given["--wait-timeout"]),
        rest=seconds("--retry-after", given["--retry-after"]),
        retries=int(given["--retries"]),
    )
    return (namespace, name), given["--record"], limits


def seconds(option: str, text: str) -> float:
    """The seconds of a time such as 1h30m.

    Raises:
        ConfigError: it is none.
    """
    if not re.fullmatch("([0-9]+[hms])+", text):
        raise ConfigError(f"{option}: expected a time such as 90s, 30m or 1h30m, got {text}")
    return float(sum(int(count) * SECONDS[unit] for count, unit in re.findall("([0-9]+)([hms])", text)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
