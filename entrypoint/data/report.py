"""What became of every row: used, or dropped for one reason, in a table that adds up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

from entrypoint.errors import DataError


class Reason(IntEnum):
    """Why a row is not used. A row that several reasons fit is counted under the first, in this order."""

    USED = 0
    OTHER_DATE = 1
    OTHER_MODEL = 2
    NO_CONSENT = 3
    CONTRADICTION = 4
    EMPTY = 5
    REWARD = 6
    UNPARSABLE = 7
    DUPLICATE = 8
    TOO_LONG = 9
    ONE_RESPONSE = 10
    NO_SPREAD = 11
    BELOW_THRESHOLD = 12  # of a row before duplicates are merged, where data.threshold_scope is row


LABELS = {
    Reason.OTHER_DATE: "outside data.date_from..date_to",
    Reason.OTHER_MODEL: "not sampled from data.models",
    Reason.NO_CONSENT: "no consent",
    Reason.CONTRADICTION: "partition key contradicts the file's column",
    Reason.EMPTY: "empty input or output",
    Reason.REWARD: "reward null, NaN or outside 0..1",
    Reason.UNPARSABLE: "unparsable chat",
    Reason.DUPLICATE: "duplicate response (merged)",
    Reason.TOO_LONG: "too long",
    Reason.ONE_RESPONSE: "group left with one response",
    Reason.NO_SPREAD: "group without spread",
    Reason.BELOW_THRESHOLD: "below threshold",
}
# What to do where a reason leaves nothing.
REMEDIES = {
    Reason.OTHER_DATE: "widen data.date_from and data.date_to",
    Reason.OTHER_MODEL: "look at data.models and the column model",
    Reason.NO_CONSENT: "look at the column user_consent, or set data.require_consent=false where it is not needed",
    Reason.CONTRADICTION: "write the partition that the rows belong to",
    Reason.EMPTY: "look at the columns input and output",
    Reason.REWARD: "look at data.reward_column: rewards are expected in 0..1",
    Reason.UNPARSABLE: "set data.format=text, or write messages as a list of {role, content}",
    Reason.DUPLICATE: "a prompt needs at least two different responses",
    Reason.TOO_LONG: "raise train.max_length",
    Reason.ONE_RESPONSE: "a prompt needs at least two different responses; data.match=normalized finds more of them",
    Reason.NO_SPREAD: "a prompt needs responses with different rewards",
    Reason.BELOW_THRESHOLD: "lower data.min_reward_threshold, or look at data.reward_column",
}


class NoGroupLeft(DataError):
    """Every row was dropped; `table` says why, for printing below the one-line message."""

    def __init__(self, message: str, counts: Counts) -> None:
        super().__init__(message)
        self.counts = counts
        self.table = counts.text()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.counts)


@dataclass
class Counts:
    """Rows by what became of them, and what warnings need to know.

    `dropped` has Reason's names as keys. Invariant: rows == train_rows + held_out_rows + sum of dropped.
    """

    rows: int = 0
    train_rows: int = 0
    train_groups: int = 0
    held_out_rows: int = 0
    held_out_groups: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    conflicting: int = 0  # merged responses whose rewards differed (their mean is used)
    models: dict[str, int] = field(default_factory=dict)  # sampling model -> rows left by the rules for single rows
    other_models: int = 0  # of these rows, those not sampled from data.behaviour_model
    logps_used: int = 0  # used rows whose recorded log-probs belong to the same tokens
    logps_differ: int = 0  # used rows whose recorded token ids differ, so that their log-probs are not used
    refusal: str = ""  # what the chat template said to the first prompt that it refused

    def drop(self, reason: Reason, rows: int) -> None:
        """Count `rows` more rows under `reason`."""
        if rows:
            self.dropped[reason.name] = self.dropped.get(reason.name, 0) + int(rows)

    @property
    def used(self) -> int:
        return self.train_rows + self.held_out_rows

    @property
    def adds_up(self) -> bool:
        """Whether every row is used or counted under a reason."""
        return self.rows == self.used + sum(self.dropped.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Counts:
        return cls(**values)

    def text(self) -> str:
        """The table: one line a fate, rows and share of all rows, the total last."""
        lines = [
            (f"used in training, {self.train_groups:,} groups", self.train_rows),
            (f"used in evaluation (held out), {self.held_out_groups:,} groups", self.held_out_rows),
        ]
        for reason, label in LABELS.items():
            rows = self.dropped.get(reason.name, 0)
            if rows:
                lines.append((f"dropped: {label}", rows))
        lines.append(("rows", self.rows))
        name = max(len(label) for label, _ in lines)
        number = max(len(f"{rows:,}") for _, rows in lines)
        text = [f"{label:<{name}}  {rows:>{number},}  {_percent(rows, self.rows):>7}" for label, rows in lines]
        text.insert(-1, "-" * len(text[0]))
        if self.conflicting:
            text.append(f"{self.conflicting:,} merged responses had different rewards: their mean is used")
        if self.refusal:
            text.append(f"the chat template refused a prompt, the first with: {self.refusal}")
        return "\n".join(text)

    def no_group_left(self, where: str) -> NoGroupLeft:
        """The error to raise when nothing is left to train on; it names the commonest reason."""
        if not self.rows:
            return NoGroupLeft(f"{where}: no rows in the files; expected labelled traces", self)
        if self.held_out_groups:
            message = (
                f"all {self.held_out_groups:,} groups left are held out; set data.held_out_share lower or add traces"
            )
            return NoGroupLeft(f"{where}: {message}", self)
        worst = max(self.dropped, key=lambda name: self.dropped[name])
        message = (
            f"{where}: no group left to train on: of {self.rows:,} rows {self.dropped[worst]:,} were dropped as"
            f" '{LABELS[Reason[worst]]}', the table has every reason; {REMEDIES[Reason[worst]]}"
        )
        return NoGroupLeft(message, self)


def _percent(rows: int, total: int) -> str:
    return f"{100 * rows / total:.1f} %" if total else "-"
