"""What counts as chat, and what a response is."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from entrypoint.data.chat import Texts, blank, canonical, dump, messages

USER = [{"role": "user", "content": "Hi"}]
REPLY = [{"role": "assistant", "content": "Hello"}]


def one(given: str, answer: str, form: str = "auto", match: str = "exact") -> Texts:
    return canonical(pa.array([given]), pa.array([answer]), form=form, match=match)


def test_two_serialisations_are_one_prompt() -> None:
    loose = '[ {"role": "user",\n "content": "caf\\u00e9", "name": null} ]'
    tight = '[{"content":"café","role":"user"}]'
    assert one(loose, "x").key[0].as_py() == one(tight, "x").key[0].as_py() == tight
    assert one(loose, "x").chat.tolist() == [True]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[1]",
        "[draft] an answer",
        '{"role": "user", "content": "Hi"}',
        '[{"role": "user"}]',
        '[{"role": "user", "content": null}]',
        '[{"role": "user", "content": ["Hi"]}]',
        '[{"role": 1, "content": "Hi"}]',
        '[{"role": "user", "content": "Hi"}',
        '[{"role": "user", "content": "Hi"}] and more',
        '[{"role": "user", "content": "\\ud800"}]',
        "[" * 100_000,
        '[{"role": "user", "content": "Hi", "n": ' + "9" * 5000 + "}]",
    ],
    ids=range(13),
)
def test_what_does_not_parse_is_text(text: str) -> None:
    assert messages(text) is None
    texts = one(text, "answer")
    assert texts.prompt[0].as_py() == text
    assert not texts.chat[0]
    assert not texts.unparsable[0]
    assert one(text, json.dumps(REPLY), form="chat").unparsable.tolist() == [True]


def test_white_space_before_the_bracket_is_fine_and_text_form_parses_nothing() -> None:
    given = " \n\t" + json.dumps(USER)
    assert one(given, "x").chat[0]
    assert one(" " * 40 + json.dumps(USER), "x").chat[0]
    assert one(given, "x", form="text").prompt[0].as_py() == given


def test_other_keys_reach_the_template() -> None:
    named = [{"role": "user", "content": "Hi", "name": "Ada"}]
    assert json.loads(one(json.dumps(named), "x").prompt[0].as_py()) == named


@pytest.mark.parametrize(
    ("given", "answer", "expected"),
    [
        (USER, REPLY, "Hello"),
        (USER, USER + REPLY, "Hello"),  # the whole conversation
        (USER, [{"role": "user", "content": "Other"}, *REPLY], None),  # of another conversation
        (USER, REPLY + REPLY, None),  # which of the two?
        (USER, USER, None),  # nobody answered
        (USER + REPLY, REPLY, None),  # it was not the assistant's turn
        (USER + REPLY + USER, REPLY, "Hello"),
        ([{"role": "system", "content": "Be brief"}, *USER], "Hello", "Hello"),
        ("Hi", REPLY, "Hello"),
        ("Hi", USER + REPLY, None),
    ],
    ids=range(10),
)
def test_the_response_of_a_chat_output(given: Any, answer: Any, expected: str | None) -> None:
    texts = one(*(value if isinstance(value, str) else json.dumps(value) for value in (given, answer)))
    assert texts.unparsable.tolist() == [expected is None]
    if expected is not None:
        assert texts.response[0].as_py() == expected


def test_chat_form_wants_both_to_be_chat() -> None:
    assert one(json.dumps(USER), json.dumps(REPLY), form="chat").unparsable.tolist() == [False]
    assert one(json.dumps(USER), "Hello", form="chat").unparsable.tolist() == [True]
    assert one("Hi", json.dumps(REPLY), form="chat").unparsable.tolist() == [True]


def test_blank() -> None:
    values = [None, "", " ", "\u00a0\u3000\u2003\x0b", " " * 100, "x", " x", "é", "\u3042", " " * 100 + "x", "\0"]
    expected = [True] * 5 + [False] * 6
    for kind in (pa.string(), pa.large_string()):
        array = pa.array(values, kind)
        assert blank(array).tolist() == expected
        assert blank(array[3:7]).tolist() == expected[3:7]
    assert blank(pa.nulls(3, pa.string())).tolist() == [True] * 3
    assert blank(pa.array([], pa.string())).tolist() == []


def test_an_empty_message_is_empty() -> None:
    silent = [{"role": "user", "content": " \n"}]
    assert one(json.dumps(silent), "x").empty.tolist() == [True]
    assert one("Hi", json.dumps([{"role": "assistant", "content": ""}])).empty.tolist() == [True]


def test_normal_forms() -> None:
    """NFC (e + combining acute = é), runs of white space, case: of text, and of each message's content."""
    variants = ["Caf\u00e9 au  lait", " cafe\u0301\u00a0AU\tlait\n"]
    keys = {one(text, "x", match="normalized").key[0].as_py() for text in variants}
    assert keys == {"café au lait"}
    chats = [dump([{"role": "user", "content": text}]) for text in variants]
    keys = {one(text, "x", match="normalized").key[0].as_py() for text in chats}
    assert keys == {'[{"content":"café au lait","role":"user"}]'}
    assert one(variants[1], "x", match="normalized").prompt[0].as_py() == variants[1]
