"""The packed row of any batch: every distinct token once, every scored position after exactly its own row's tokens."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrypoint.sharing.attention import Parts
from entrypoint.sharing.forward import SharedPrompts
from entrypoint.sharing.layout import Layout, lay_out
from tests.sharing.batches import Batch, assert_alike, computed, numbers, ragged
from tests.sharing.models import shared_over, tiny

PAD = 0
Token = tuple[int, int]  # its id, its distance from the row's first token

# By hand --------------------------------------------------------------------------------------------------------------


def of_rows(*rows: tuple[list[int], list[int]], left: int = 0) -> Batch:
    """(prompt, response) rows, each with `left` places of padding before it, padded on the right to the longest."""
    length = left + max(len(prompt) + len(response) for prompt, response in rows)
    batch = {name: torch.zeros((len(rows), length), dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(rows), length), -100)
    for i, (prompt, response) in enumerate(rows):
        start, end = left + len(prompt), left + len(prompt) + len(response)
        batch["input_ids"][i, left:end] = torch.tensor(prompt + response)
        batch["attention_mask"][i, left:end] = 1
        batch["labels"][i, start:end] = torch.tensor(response)
    return batch


def packed(batch: Batch, **options: Any) -> Layout:
    layout = lay_out(batch["input_ids"], batch["attention_mask"], batch["labels"], **options)
    assert layout is not None
    return layout


@pytest.mark.parametrize("left", [0, 2])
def test_two_responses_to_one_prompt_by_hand(left: int) -> None:
    """Rows [5 6 | 7 8 9] and [5 6 | 4]: the prompt, then 7 8 (9 predicts nothing); the second response is 4 alone.

    6 predicts 4 and 7, 7 predicts 8, 8 predicts 9. Of 2 x (L - 1) places, row 0 has columns 1, 2 and 3, row 1 has 1.
    """
    layout = packed(of_rows(([5, 6], [7, 8, 9]), ([5, 6], [4]), left=left))
    width = 4 + left
    assert layout.ids.tolist() == [5, 6, 7, 8]
    assert layout.positions.tolist() == [0, 1, 2, 3]
    assert layout.own.tolist() == [0, 0, 1, 1]
    assert layout.prompt.tolist() == [0, 0, 0, 0]
    assert layout.counts.tolist() == [2, 2, 1, 1]
    assert layout.scored.tolist() == [1, 1, 2, 3]
    assert layout.labels.tolist() == [4, 7, 8, 9]
    assert layout.place.tolist() == [left + 1, left + 2, left + 3, width + left + 1]
    assert layout.source.tolist() == [1, 2, 3, 0]
    assert [(s.start, s.prompt, s.responses) for s in layout.segments] == [(0, 2, (2,))]


def test_two_groups_by_hand() -> None:
    """Rows of a group need not be neighbours; each group's prompt is followed by its responses."""
    layout = packed(of_rows(([5], [7, 8]), ([6, 6], [7, 8]), ([5], [9, 9, 9])))
    assert layout.ids.tolist() == [5, 7, 9, 9, 6, 6, 7]
    assert layout.positions.tolist() == [0, 1, 1, 2, 0, 1, 2]
    assert layout.own.tolist() == [0, 1, 2, 2, 3, 3, 4]
    assert layout.prompt.tolist() == [0, 0, 0, 0, 3, 3, 3]
    assert layout.counts.tolist() == [2, 1, 1, 1, 1, 1, 1]
    assert layout.scored.tolist() == [0, 0, 1, 2, 3, 5, 6]
    assert layout.labels.tolist() == [7, 9, 8, 9, 9, 7, 8]
    assert layout.place.tolist() == [0, 1, 6, 7, 8, 4, 5]
    assert layout.source.tolist() == [0, 2, 1, 3, 4, 5, 6]
    assert [(s.start, s.prompt, s.responses) for s in layout.segments] == [(0, 1, (1, 2)), (4, 2, (1,))]


def test_a_response_that_is_there_twice_is_computed_once_by_hand() -> None:
    """As in DPO, where a good response makes several pairs: both rows have the one's two results, and the head computes
    four: 6 predicts 4 and 7, 7 predicts 8, 4 predicts 4."""
    layout = packed(of_rows(([5, 6], [7, 8]), ([5, 6], [4, 4]), ([5, 6], [7, 8])))
    assert layout.ids.tolist() == [5, 6, 7, 4]
    assert layout.counts.tolist() == [3, 3, 2, 1]
    assert layout.scored.tolist() == [1, 1, 2, 3]
    assert layout.labels.tolist() == [4, 7, 8, 4]
    assert layout.place.tolist() == [1, 2, 7, 8, 4, 5]
    assert layout.source.tolist() == [1, 2, 1, 2, 0, 3]


def test_whole_rows_keep_what_predicts_nothing() -> None:
    batch = of_rows(([5, 6], [7, 8]), ([5, 6], [4]), ([3], []))
    assert packed(batch).ids.tolist() == [5, 6, 7]
    assert packed(batch, whole=True).ids.tolist() == [5, 6, 7, 8, 4, 3]


def test_labels_with_holes_by_hand() -> None:
    """A conversation of two turns, [5 | 6 | 7 | 8]: 6 and 8 are answers. 6's hole 7 is neither prompt nor scored."""
    batch = of_rows(([5], [6, 7, 8]), ([5], [6, 9, 9]))
    batch["labels"][:, 2] = -100
    layout = packed(batch)
    assert layout.ids.tolist() == [5, 6, 7, 6, 9]
    assert layout.scored.tolist() == [0, 2, 4]
    assert layout.labels.tolist() == [6, 8, 9]
    assert layout.place.tolist() == [0, 2, 3, 5]
    assert layout.source.tolist() == [0, 1, 0, 2]


def test_a_batch_that_scores_nothing_has_no_row() -> None:
    batch = of_rows(([5, 6], [7]))
    batch["labels"][:] = -100
    assert lay_out(batch["input_ids"], batch["attention_mask"], batch["labels"]) is None


def test_a_batch_that_scores_a_masked_token_has_no_row() -> None:
    batch = of_rows(([5, 6], [7, 8]))
    batch["attention_mask"][0, 2] = 0  # 7, which predicts 8
    assert lay_out(batch["input_ids"], batch["attention_mask"], batch["labels"]) is None


def test_no_mask_attends_to_all() -> None:
    batch = of_rows(([5, 6], [7, 8]), ([5, 6], [7, 9]))
    layout = lay_out(batch["input_ids"], None, batch["labels"])
    assert layout is not None
    assert layout.ids.tolist() == packed(batch).ids.tolist()


# Any batch ------------------------------------------------------------------------------------------------------------

TOKENS = st.integers(1, 4)  # so few that prompts and responses are each other's beginnings
LABELS = ("response", "some", "none", "last")


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Rows that draw their prompt and response from small pools; padding and holes anywhere; any label mask.

    What is masked holds any id. A position is scored where it is attended: TRL masks labels where it masks tokens.
    """
    prompts = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=1, max_size=3))
    answers = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=6), min_size=1, max_size=4))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        prompt, answer = draw(st.sampled_from(prompts)), draw(st.sampled_from(answers))
        kind = draw(st.sampled_from(LABELS))
        attended = [True] * len(prompt + answer)
        if draw(st.booleans()):
            attended = draw(st.lists(st.booleans(), min_size=len(attended), max_size=len(attended)))
        first = {"response": len(prompt), "some": 1, "none": len(attended), "last": len(attended) - 1}[kind]
        wanted = [
            i >= first and attended[i - 1] and (kind != "some" or draw(st.booleans())) for i in range(len(attended))
        ]
        rows.append((draw(st.integers(0, 3)), prompt + answer, attended, wanted))
    length = max(left + len(ids) for left, ids, _, _ in rows) + draw(st.integers(0, 2))
    batch = {name: torch.zeros((len(rows), length), dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["input_ids"][:] = draw(TOKENS)  # what stands in padding
    batch["labels"] = torch.full((len(rows), length), -100)
    for i, (left, ids, attended, wanted) in enumerate(rows):
        span = slice(left, left + len(ids))
        batch["input_ids"][i, span] = torch.tensor(ids)
        batch["attention_mask"][i, span] = torch.tensor(attended).long()
        batch["labels"][i, span] = torch.where(torch.tensor(wanted), torch.tensor(ids), -100)
    return batch


def attended(batch: Batch, row: int, *, until: int | None = None) -> list[Token]:
    """A row's tokens up to column `until`, one by one."""
    found: list[Token] = []
    start = None
    for column, (token, mask) in enumerate(
        zip(batch["input_ids"][row].tolist(), batch["attention_mask"][row].tolist(), strict=True)
    ):
        if mask and (until is None or column <= until):
            start = column if start is None else start
            found.append((token, column - start))
    return found


def scored(batch: Batch) -> list[tuple[int, int]]:
    """(row, column) of every token that predicts a label."""
    marks = batch["labels"].tolist()
    return [(b, t) for b, row in enumerate(marks) for t in range(len(row) - 1) if row[t + 1] != -100]


def distinct(batch: Batch, *, whole: bool) -> Counter[tuple[tuple[Token, ...], ...]]:
    """How many rows have each prompt, as (prompt,), and each response to it, as (prompt, response)."""
    found: Counter[tuple[tuple[Token, ...], ...]] = Counter()
    places = scored(batch)
    for b in range(len(batch["input_ids"])):
        columns = [t for row, t in places if row == b]
        row = attended(batch, b, until=None if whole or not columns else columns[-1])
        if not row or not (whole or columns):
            continue
        prompt = attended(batch, b, until=columns[0]) if columns else row
        found[(tuple(prompt),)] += 1
        if len(row) > len(prompt):
            found[(tuple(prompt), tuple(row[len(prompt) :]))] += 1
    return found


def visible(layout: Layout) -> np.ndarray[Any, Any]:
    """(N, N): which packed token a packed token may see, by the definition."""
    see = np.zeros((len(layout), len(layout)), bool)
    for q in range(len(layout)):
        for k in range(len(layout)):
            mine = layout.own[k] in (layout.own[q], layout.prompt[q])
            see[q, k] = mine and layout.positions[k] <= layout.positions[q]
    return see


@settings(max_examples=300, deadline=None)
@given(batch=batches(), whole=st.booleans())
def test_any_batch_is_packed_without_loss_and_without_repetition(batch: Batch, whole: bool) -> None:
    layout = lay_out(batch["input_ids"], batch["attention_mask"], batch["labels"], whole=whole)
    places = scored(batch)
    if layout is None:
        assert not places
        return
    # Every scored position, once, in its place, with its label, after its own row's tokens and no other's.
    width = batch["labels"].shape[1] - 1
    assert sorted(layout.place.tolist()) == [b * width + t for b, t in places]
    results = list(zip(layout.scored.tolist(), layout.labels.tolist(), strict=True))
    assert len(set(results)) == len(results) == len(set(layout.source.tolist()))
    see = visible(layout)
    for source, place in zip(layout.source, layout.place, strict=True):
        (at, label), (b, t) = results[source], divmod(int(place), width)
        assert label == batch["labels"][b, t + 1]
        seen = sorted(np.flatnonzero(see[at]), key=lambda k: layout.positions[k])
        assert [(layout.ids[k], layout.positions[k]) for k in seen] == attended(batch, b, until=t)
    # Every distinct prompt and response, once, with the number of rows that have it.
    found: Counter[tuple[tuple[Token, ...], ...]] = Counter()
    for part in np.unique(layout.own):
        where = np.flatnonzero(layout.own == part)
        prompt = np.flatnonzero(layout.own == layout.prompt[where[0]])
        chain = (prompt, where) if layout.prompt[where[0]] != part else (where,)
        key = tuple(tuple(zip(layout.ids[x].tolist(), layout.positions[x].tolist(), strict=True)) for x in chain)
        assert key not in found
        assert (layout.counts[where] == layout.counts[where[0]]).all()
        found[key] = int(layout.counts[where[0]])
    assert found == distinct(batch, whole=whole)
    assert len(layout) == sum(len(key[-1]) for key in found)
    assert len(layout) == sum(segment.prompt + sum(segment.responses) for segment in layout.segments)


@settings(max_examples=150, deadline=None)
@given(batch=batches(), window=st.sampled_from([None, 1, 3]))
def test_the_parts_of_sdpa_show_what_the_mask_shows(batch: Batch, window: int | None) -> None:
    layout = lay_out(batch["input_ids"], batch["attention_mask"], batch["labels"])
    if layout is None:
        return
    wanted = visible(layout)
    if window is not None:
        wanted &= layout.positions[None] > layout.positions[:, None] - window
    parts = Parts(layout, None if window is None else lambda k, q: k > q - window, torch.device("cpu"))
    starts = np.cumsum([0, *parts.lengths])
    found = np.zeros_like(wanted)
    for i, (prompt, mask) in enumerate(zip(parts.prompts, parts.masks, strict=True)):
        keys = np.arange(starts[i], starts[i + 1])
        shown = np.tri(len(keys), dtype=bool) if mask is None else mask[0, 0].numpy()
        if prompt is not None:
            keys = np.concatenate([np.arange(starts[prompt], starts[prompt + 1]), keys])
        found[np.ix_(np.arange(starts[i], starts[i + 1]), keys)] = shown
    assert (found == wanted).all()


def test_parts_without_a_mask_by_hand() -> None:
    """A prompt and a response that is alone with it are causal; so is one token, which sees all that stands before it.

    Rows [5 6 | 7 8], [5 6 | 4 4 4] and [3 | 9 9]: parts 5 6, then 7, then 4 4, then 3 9.
    """
    layout = packed(of_rows(([5, 6], [7, 8]), ([5, 6], [4, 4, 4]), ([3], [9, 9])))
    parts = Parts(layout, None, torch.device("cpu"))
    assert parts.lengths == [2, 1, 2, 2]
    assert parts.prompts == [None, 0, 0, None]
    assert [mask if mask is None else mask.tolist() for mask in parts.masks] == [
        None,
        None,
        [[[[True, True, True, False], [True, True, True, True]]]],
        None,
    ]


@cache
def model_of(name: str, kind: str) -> tuple[Any, SharedPrompts]:
    model = tiny(name, kind, num_hidden_layers=2, vocab_size=8)
    return model, shared_over(model)


@pytest.mark.parametrize(("name", "kind"), [("Llama", "sdpa"), ("Llama", "eager"), ("Mistral window", "sdpa")])
@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_any_batch_gives_the_plain_numbers(name: str, kind: str, batch: Batch) -> None:
    """Also with padding on the left and holes: with rotary positions, only distances count."""
    model, shared = model_of(name, kind)
    with computed(model) as shapes:
        with shared.off():
            plain = numbers(model, batch)
        assert_alike(numbers(model, batch), plain, floor=10.0)
    assert shapes[1][0] == (1 if scored(batch) else len(batch["input_ids"]))


def test_a_masked_token_that_is_scored_gives_the_plain_numbers() -> None:
    model, shared = model_of("Llama", "sdpa")
    batch = of_rows(([5, 6], [7, 3]), ([5, 6], [4, 3]))
    batch["attention_mask"][0, 2] = 0
    with computed(model) as shapes:
        with shared.off():
            plain = numbers(model, batch)
        assert_alike(numbers(model, batch), plain)
    assert shapes == [(2, 4), (2, 4)]


def test_absolute_positions_are_those_of_padding_on_the_right() -> None:
    """GPT-2 numbers tokens by their column, so padding on the left changes its numbers; shared, they stay the same."""
    model = tiny("GPT2", n_layer=2)
    shared, batch = shared_over(model), ragged()
    left = {name: values.clone() for name, values in batch.items()}
    for i, length in enumerate(batch["attention_mask"].sum(1)):
        for values in left.values():
            values[i] = values[i].roll(values.shape[1] - int(length))
    with torch.no_grad():
        on_left, on_right = (model(**side, fused_lm_head=True) for side in (left, batch))
        with shared.off():
            plain = model(**batch, fused_lm_head=True)
            unlike = model(**left, fused_lm_head=True)
    for out in (on_left, on_right):
        assert torch.allclose(out.log_probs[out.label_mask], plain.log_probs[plain.label_mask], atol=1e-5)
    assert not torch.allclose(unlike.log_probs[unlike.label_mask], plain.log_probs[plain.label_mask], atol=0.1)
