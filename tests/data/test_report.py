"""The table of drops: aligned, adding up, and carried by the error that ends a run without a group."""

from __future__ import annotations

import pickle

from entrypoint.data.report import LABELS, Counts, NoGroupLeft, Reason
from entrypoint.errors import EXIT_REFUSED


def counts() -> Counts:
    found = Counts(rows=12_345, train_rows=10_000, train_groups=1_250, held_out_rows=1_000, held_out_groups=125)
    found.drop(Reason.NO_CONSENT, 1_000)
    found.drop(Reason.NO_CONSENT, 300)
    found.drop(Reason.TOO_LONG, 45)
    found.drop(Reason.EMPTY, 0)
    return found


def test_the_table() -> None:
    """10,000 / 12,345 = 81.0 %; 1,000: 8.1 %; 1,300: 10.5 %; 45: 0.4 %. What dropped nothing has no line."""
    assert counts().text().splitlines() == [
        "used in training, 1,250 groups             10,000   81.0 %",
        "used in evaluation (held out), 125 groups   1,000    8.1 %",
        "dropped: no consent                         1,300   10.5 %",
        "dropped: too long                              45    0.4 %",
        "----------------------------------------------------------",
        "rows                                       12,345  100.0 %",
    ]


def test_it_adds_up_or_says_so() -> None:
    assert counts().adds_up
    less = counts()
    less.rows += 1
    assert not less.adds_up


def test_notes_below_the_table() -> None:
    found = counts()
    found.conflicting, found.refusal = 3, "no system role"
    assert found.text().splitlines()[-2:] == [
        "3 merged responses had different rewards: their mean is used",
        "the chat template refused a prompt, the first with: no system role",
    ]


def test_every_reason_has_words() -> None:
    assert set(LABELS) == set(Reason) - {Reason.USED}
    assert len(set(LABELS.values())) == len(LABELS)


def test_json_and_back() -> None:
    assert Counts.from_dict(counts().to_dict()) == counts()


def test_an_empty_table() -> None:
    assert Counts().text().splitlines()[-1].split() == ["rows", "0", "-"]


def test_the_error_names_the_commonest_reason_and_survives_a_process_border() -> None:
    found = Counts(rows=10)
    found.drop(Reason.TOO_LONG, 7)
    found.drop(Reason.ONE_RESPONSE, 3)
    error = pickle.loads(pickle.dumps(found.no_group_left("s3://bucket/lake")))
    assert isinstance(error, NoGroupLeft)
    assert error.exit_code == EXIT_REFUSED
    assert error.table == found.text()
    assert str(error) == (
        "s3://bucket/lake: no group left to train on: of 10 rows 7 were dropped as 'too long',"
        " the table has every reason; raise train.max_length"
    )
