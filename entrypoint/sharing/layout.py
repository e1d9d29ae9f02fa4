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


@dataclass(frozen=True)
class Layout:
    """One packed row of N tokens for a batch of shape (B, L), of which P positions are scored, S of them distinct.

    Shape:
        ids, positions, own, prompt, counts (N,): token, its distance from its row's start, the part that it belongs
            to, the part of its prompt (its own in a prompt), and the rows of the batch that it stands for.
        scored, labels (S,): where the predicting token stands in the packed row, and the token that it is to predict.
        place, source (P,): the flat index into (B, L - 1) where a result belongs, and which of the S results it is.
    """

    ids: Ints
    positions: Ints
    own: Ints
    prompt: Ints
    counts: Ints
    scored: Ints
    labels: Ints
    place: Ints
    source: Ints
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Row:
    """Row `number` of the batch: the column where it starts, and those of its scored positions."""

    number: int
    start: int
    scored: Ints


@dataclass
class _Part:
    """Distinct tokens, their positions, the rows that have them, and what follows them there: a prompt's responses."""

    ids: Ints
    positions: Ints
    rows: list[_Row] = field(default_factory=list)
    followers: _Parts = field(default_factory=dict)


_Parts = dict[tuple[bytes, bytes], _Part]


def lay_out(input_ids: Any, attention_mask: Any, labels: Any, *, whole: bool = False) -> Layout | None:
    """The packed row of a batch; None where it has no scored position, or one on a token that is masked.

    A row's prompt ends with the token that predicts its first label; rows with one prompt share it, and those with the
    same response too. Tokens after a row's last scored position change nothing and are left out.

    Args:
        input_ids, attention_mask, labels: (B, L); labels -100 where nothing is scored, not shifted; the mask may be
            None, and padding may stand anywhere.
        whole: keep tokens that change no score too: for what counts them, or goes by a row's length.
    """
    ids, marks = _array(input_ids), _array(labels)
    attended = np.ones(ids.shape, bool) if attention_mask is None else _array(attention_mask) != 0
    scored = marks[:, 1:] != -100
    if not scored.any() or (scored & ~attended[:, :-1]).any():
        return None
    prompts: _Parts = {}
    for number in range(len(ids)):
        columns = np.flatnonzero(attended[number])
        wanted = np.flatnonzero(scored[number])
        if not len(columns) or not (whole or len(wanted)):
            continue
        first = wanted[0] if len(wanted) else columns[-1]
        if not whole:
            columns = columns[columns <= wanted[-1]]
        row = _Row(number, int(columns[0]), wanted)
        parts = prompts
        for span in (columns[columns <= first], columns[columns > first]):
            tokens, positions = ids[number, span], span - row.start
            part = parts.setdefault((tokens.tobytes(), positions.tobytes()), _Part(tokens, positions))
            part.rows.append(row)
            parts = part.followers
    return _packed(prompts, marks)


def _packed(prompts: _Parts, marks: Ints) -> Layout:
    arrays: dict[str, list[Ints]] = {name: [] for name in ("ids", "positions", "own", "prompt", "counts")}
    scored, labels, place, segments = [], [], [], []
    at = number = 0
    width = marks.shape[1] - 1

    def add(part: _Part, prompt: int) -> None:
        nonlocal at, number
        arrays["ids"].append(part.ids)
        arrays["positions"].append(part.positions)
        for name, value in (("own", number), ("prompt", prompt), ("counts", len(part.rows))):
            arrays[name].append(np.full(len(part.ids), value))
        at, number = at + len(part.ids), number + 1

    for prompt in prompts.values():
        start, own = at, number
        add(prompt, own)
        end = at - 1  # the prompt's last token, which predicts every response's first
        for response in prompt.followers.values():
            for row in response.rows:
                position = row.scored - row.start
                after = at + np.searchsorted(response.positions, position)
                scored.append(np.where(position <= prompt.positions[-1], end, after))
                labels.append(marks[row.number, row.scored + 1])
                place.append(row.number * width + row.scored)
            if len(response.ids):
                add(response, own)
        sizes = tuple(len(response.ids) for response in prompt.followers.values() if len(response.ids))
        segments.append(Segment(start, len(prompt.ids), sizes))
    # Rows with one response, as in pairs, have its results in common: the head computes each once.
    wanted = np.concatenate(labels)
    tokens = int(wanted.max()) + 1
    distinct, source = np.unique(np.concatenate(scored) * tokens + wanted, return_inverse=True)
    return Layout(
        **{name: np.concatenate(values) for name, values in arrays.items()},
        scored=distinct // tokens,
        labels=distinct % tokens,
        place=np.concatenate(place),
        source=source,
        segments=tuple(segments),
    )


def _array(tensor: Any) -> Ints:
    values: Ints = tensor.detach().cpu().numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor)
    return values
