"""`key`: how a configuration dataclass declares one key, its default, its meaning and its bounds."""

from __future__ import annotations

from dataclasses import field
from typing import Any, NamedTuple

from omegaconf import MISSING

REQUIRED = MISSING  # a key without a default; OmegaConf's own mark


class Form(NamedTuple):
    """A form of text: as a pattern that the whole text matches, and in words."""

    pattern: str
    words: str


def key(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    word: str | None = None,
    form: Form | None = None,
) -> Any:
    """One key of the run file.

    Args:
        default: the one home of this number; a `list` or a dataclass type is built anew for each configuration.
        doc: what it does, with its unit; it becomes the schema's description.
        choices: the only values a string key can have.
        minimum, maximum: inclusive bounds.
        above, below: exclusive bounds.
        word, form: what a number may be instead: this text, or any of this form.
    """
    metadata = {
        "doc": doc,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "word": word,
        "form": form,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
