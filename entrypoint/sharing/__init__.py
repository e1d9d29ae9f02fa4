"""Shared prompts: a batch's distinct tokens are computed once, whatever the trainer and its loss."""
