"""Preference tuning of a language model on labelled production traces, by GRPO or DPO."""

__version__ = "0.1.0"
