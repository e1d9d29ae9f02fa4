"""What a run can end with: one small tree of errors, each with its documented exit code.

0 done; 64 the configuration, the data or the run itself can't be used (starting again would not help);
75 stopped early, start again; 76 another rank was lost; anything else is a crash.
"""

EXIT_DONE = 0
EXIT_REFUSED = 64  # EX_USAGE of sysexits.h
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h
EXIT_LOST = 76  # EX_PROTOCOL of sysexits.h: a crash, but another rank's or a lost machine


class RunError(Exception):
    """An end of the run that is explained in one line: where, what was got, what was expected, what to do."""

    exit_code = EXIT_REFUSED
    by_all = False  # raised by every rank alike: one of each node says it
    hold = False  # the reason to stop is another node's, which leaves first
    sudden = False  # raised where the others may stand anywhere in a collective: they hear of it through the store


class ConfigError(RunError):
    """The configuration can't be used."""


class DataError(RunError):
    """The traces can't be used."""


class ModelError(RunError):
    """The base model can't be used."""


class CheckpointError(RunError):
    """The checkpoints, or an output that stands at `output.path`, can't be used by this run."""


class LockedError(CheckpointError):
    """Another run holds the checkpoint folder: this start never had it."""


class DivergedError(RunError):
    """The optimisation has left the region where its numbers mean anything."""

    by_all = True


class RefusedElsewhere(RunError):
    """Another rank has refused the run and said why: this one leaves with its exit code."""

    by_all = True


class StorageDownError(RunError):
    """The storage could not be reached for longer than a request is tried: the same command may succeed later."""

    exit_code = EXIT_STOPPED


class StoppedError(RunError):
    """The run was told to stop and has saved: the same command goes on from there."""

    exit_code = EXIT_STOPPED
    by_all = True

    def __init__(self, line: str, *, hold: bool = False) -> None:
        super().__init__(line)
        self.hold = hold


class TooLargeError(RunError):
    """A forward pass has run out of memory where others may be in a collective: the next start takes smaller ones."""

    exit_code = EXIT_STOPPED
    by_all = True
    sudden = True


class NoRoomError(TooLargeError):
    """And nothing that the next start could do by itself would help."""

    exit_code = EXIT_REFUSED


class LostRankError(RunError):
    """Another rank is gone, or was not heard of for too long: this one can't go on alone."""

    exit_code = EXIT_LOST
