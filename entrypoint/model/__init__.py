"""The base model's files, and the final model's."""
