"""The hand-off to the eval gate."""
