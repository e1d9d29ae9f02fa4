"""Which tokens of a batch are distinct, and where each stands in one packed row without padding.

    [prompt 1][response 1a][response 1b]…[prompt 2][response 2a]…

A response sees its prompt and itself. Its first token is predicted by the prompt's last one, which is computed once for
all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """A prompt and its responses in the packed row: where it starts, and the tokens of each part."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class Layout:
    """One packed row of N tokens for a batch of shape (B, L), of which S positions are scored.

    Shape:
        ids, positions, own, prompt, counts (N,): token, its distance from its row's start, the part that it belongs
            to, the part of its prompt (its own in a prompt), and the rows of the batch that it stands for.
        scored, labels, place (S,): where the predicting token stands in the packed row, the token that it is to
            predict, and the flat index into (B, L - 1) where the result belongs.
    padded: B x L, what a plain forward would compute.
    """

    ids: Ints
    positions: Ints
    own: Ints
    prompt: Ints
    counts: Ints
    scored: Ints
    labels: Ints
    place: Ints
    segments: tuple[Segment, ...]
    padded: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class _Group:
    """Rows with one prompt: its tokens and positions, and each row's own part."""

    ids: Ints
    positions: Ints
    rows: list[_Row] = field(default_factory=list)


@dataclass(frozen=True)
class _Row:
    """What follows the prompt in row `number`: tokens, positions, and the scored positions by column."""

    number: int
    columns: Ints
    ids: Ints
    positions: Ints
    scored: Ints


def lay_out(input_ids: Any, attention_mask: Any, labels: Any, *, whole: bool = False) -> Layout | None:
    """The packed row of a batch; None where it has no scored position, or one on a token that is masked.

    A row's prompt ends with the token that predicts its first label. Tokens after a row's last scored position
    change nothing and are left out.

    Args:
        input_ids, attention_mask, labels: (B, L); labels -100 where nothing is scored, not shifted; the mask may be
            None, and padding may stand anywhere.
        whole: keep tokens that change no score too: an MoE router's auxiliary loss counts them.
    """
    ids, marks = _array(input_ids), _array(labels)
    attended = np.ones(ids.shape, bool) if attention_mask is None else _array(attention_mask) != 0
    scored = marks[:, 1:] != -100
    if not scored.any() or (scored & ~attended[:, :-1]).any():
        return None
    groups: dict[tuple[bytes, bytes], _Group] = {}
    for number in range(len(ids)):
        columns = np.flatnonzero(attended[number])
        wanted = np.flatnonzero(scored[number])
        if not len(columns) or not (whole or len(wanted)):
            continue
        first = wanted[0] if len(wanted) else columns[-1]
        if not whole:
            columns = columns[columns <= wanted[-1]]
        prompt = columns[columns <= first]
        key = (ids[number, prompt].tobytes(), (prompt - columns[0]).tobytes())
        group = groups.setdefault(key, _Group(ids[number, prompt], prompt - columns[0]))
        rest = columns[columns > first]
        group.rows.append(_Row(number, rest, ids[number, rest], rest - columns[0], wanted))
    return _packed(list(groups.values()), marks, ids.size)


def _packed(groups: list[_Group], marks: Ints, padded: int) -> Layout:
    parts: dict[str, list[Ints]] = {name: [] for name in ("ids", "positions", "own", "prompt", "counts")}
    scored, labels, place, segments = [], [], [], []
    at = part = 0
    width = marks.shape[1] - 1

    def add(ids: Ints, positions: Ints, prompt: int, count: int) -> None:
        nonlocal at, part
        parts["ids"].append(ids)
        parts["positions"].append(positions)
        for name, value in (("own", part), ("prompt", prompt), ("counts", count)):
            parts[name].append(np.full(len(ids), value))
        at, part = at + len(ids), part + 1

    for group in groups:
        start, prompt = at, part
        add(group.ids, group.positions, prompt, len(group.rows))
        end = at - 1  # the prompt's last token, which predicts every response's first
        for row in group.rows:
            before = at
            scored.append(
                np.where(row.scored < row.columns[0], end, before + np.searchsorted(row.columns, row.scored))
                if len(row.columns)
                else np.full(len(row.scored), end)
            )
            labels.append(marks[row.number, row.scored + 1])
            place.append(row.number * width + row.scored)
            if len(row.ids):
                add(row.ids, row.positions, prompt, 1)
        sizes = tuple(len(row.ids) for row in group.rows if len(row.ids))
        segments.append(Segment(start, len(group.ids), sizes))
    return Layout(
        **{name: np.concatenate(values) for name, values in parts.items()},
        scored=np.concatenate(scored),
        labels=np.concatenate(labels),
        place=np.concatenate(place),
        segments=tuple(segments),
        padded=padded,
    )


def _array(tensor: Any) -> Ints:
    values: Ints = tensor.detach().cpu().numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor)
    return values
