"""Checkpoints: a run's state, saved while training goes on and found again whole."""

from entrypoint.checkpoint.checkpoints import Checkpoints, Saved

__all__ = ["Checkpoints", "Saved"]
