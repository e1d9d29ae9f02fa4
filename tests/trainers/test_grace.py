"""What a notice can cost, by hand."""

from __future__ import annotations

from torch import nn

from entrypoint.training.grace import Grace


class Told:
    """What was said and warned of."""

    def __init__(self, seconds: float, known: dict[str, float] | None = None) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        interval = "checkpoint.save_every=100"
        self.grace = Grace(seconds, interval=interval, known=known, say=self.said.append, warn=self.warned.append)


def test_before_the_first_save_the_model_says_what_is_needed() -> None:
    """1000 x 1000 trained weights of 12 bytes are 12 MB; in 2 s 6 MB/s. The frozen half doesn't count."""
    told = Told(2)
    model = nn.ModuleList([nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False)])
    model[1].requires_grad_(False)
    told.grace.begin(model)
    assert told.said == [
        "a notice to stop leaves 2 s: a checkpoint of 0.012 GB needs 0.006 GB/s; measured at the first save"
    ]


def test_a_save_that_fits_costs_a_step_at_most_and_is_told_once() -> None:
    told = Told(120)
    for _ in range(2):
        told.grace.measured(bytes=200_000_000_000, seconds=80.0, step_seconds=40.0)
    assert told.said == [
        "a notice to stop costs no more than the step under way (40.0 s): it is finished and saved (80.0 s, 200 GB at "
        "2.5 GB/s) within the 120 s that there are"
    ]
    assert not told.warned


def test_a_save_that_does_not_fit_is_warned_of_with_what_it_would_need() -> None:
    """A 32B model in fp32 with Adam: 384 GB at 2 GB/s take 192 s; of 120 s a step leaves 100: 3.84 GB/s."""
    told = Told(120, {"bytes": 384_000_000_000, "seconds": 192.0, "step_seconds": 20.0, "stall": 1.0})
    told.grace.begin(nn.Linear(1, 1))  # known from an earlier start
    assert told.warned == [
        "checkpoint.grace_seconds=120 is less than a step (20.0 s) and a save (192.0 s, 384 GB at 2 GB/s) take; "
        "3.8 GB/s are needed. A notice costs up to the interval between two checkpoints (checkpoint.save_every=100), "
        "as a crash does"
    ]
    assert not told.said
