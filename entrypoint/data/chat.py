"""What a prompt and a response are: text, or chat messages written as JSON.

A value is chat if and only if it parses as a JSON list, not empty, of objects whose `role` and `content` are strings
(other keys are kept for the chat template; a null says nothing and goes). Its canonical form is compact JSON with
sorted keys, so that two ways to write the same messages are one prompt. Only values whose first character, after
white space, is `[` are ever parsed.

A chat input must leave the next turn to the assistant: its last message is not the assistant's.
A chat output is one assistant message, or the whole conversation: the input's messages, then one assistant message.
Its content is the response, so a response is the same whether it was logged as text or as chat.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Mask = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Message = dict[str, Any]

ASCII_SPACES = r"[\s\x{b}\x{1c}-\x{1f}]+"  # what str.split takes for white space, in RE2
NOTHING = 0xFF  # no byte of UTF-8
ASCII_SPACE = np.isin(np.arange(256), [*b"\t\n\v\f\r\x1c\x1d\x1e\x1f "])
# Bytes that begin white space beyond ASCII in UTF-8: U+0085 and U+00A0, U+1680, U+2000 and its like, U+3000.
MAYBE_SPACE = ASCII_SPACE | np.isin(np.arange(256), [0xC2, 0xE1, 0xE2, 0xE3])


@dataclass(frozen=True)
class Texts:
    """The texts of a batch of N rows, canonical.

    Shape: each (N,). `key` is what makes two prompts the same: `prompt` itself, or its normal form.
    `empty` and `unparsable` mark rows whose texts mean nothing.
    """

    key: pa.Array
    prompt: pa.Array
    response: pa.Array
    chat: Mask
    empty: Mask
    unparsable: Mask


def canonical(inputs: pa.Array, outputs: pa.Array, *, form: str, match: str) -> Texts:
    """Canonical texts of a batch.

    Args:
        inputs, outputs: strings. Shape: (N,).
        form: `data.format`: auto, text or chat.
        match: `data.match`: exact or normalized.
    """
    leads = _first_bytes(inputs), _first_bytes(outputs)
    empty = _blank(inputs, leads[0]) | _blank(outputs, leads[1])
    rows = len(inputs)
    chat, unparsable = np.zeros(rows, bool), np.zeros(rows, bool)
    prompts, responses = inputs, outputs
    looks = _looks((inputs, outputs), leads, empty, form)
    if looks is not None:
        chat_in, chat_out = looks
        prompts, responses = _parse(inputs, outputs, (chat_in, chat_out), (chat, empty, unparsable), form)
    if match == "exact":
        return Texts(prompts, prompts, responses, chat, empty, unparsable)
    return Texts(_normalized(prompts, chat), prompts, responses, chat, empty, unparsable)


def messages(value: str) -> list[Message] | None:
    """The messages that `value` holds, or None if it isn't chat."""
    try:
        parsed = json.loads(value)
        if not isinstance(parsed, list) or not parsed:
            return None
        for message in parsed:
            if not isinstance(message, dict):
                return None
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                return None
        found = [{key: value for key, value in message.items() if value is not None} for message in parsed]
        dump(found).encode()  # a lone surrogate is JSON but not text
    except (ValueError, RecursionError):
        return None
    return found


def dump(value: list[Message]) -> str:
    """The canonical form of messages."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def blank(values: pa.Array) -> Mask:
    """Whether a value is null, empty or nothing but white space. Shape: (N,)."""
    return _blank(values, _first_bytes(values))


def _blank(values: pa.Array, first: Bytes) -> Mask:
    result: Mask = first == NOTHING
    maybe = np.flatnonzero(MAYBE_SPACE[first])
    if len(maybe):
        result[maybe] |= _mask(pc.fill_null(pc.utf8_is_space(values.take(pa.array(maybe))), True))
    return result


def _looks(
    texts: tuple[pa.Array, pa.Array], leads: tuple[Bytes, Bytes], empty: Mask, form: str
) -> tuple[Mask, Mask] | None:
    """Which inputs and which outputs are worth parsing; None if none is."""
    if form == "text":
        return None
    if form == "chat":
        return ~empty, ~empty
    chat_in, chat_out = (_bracketed(*each) & ~empty for each in zip(texts, leads, strict=True))
    return (chat_in, chat_out) if chat_in.any() or chat_out.any() else None


def _parse(
    inputs: pa.Array, outputs: pa.Array, looks: tuple[Mask, Mask], marks: tuple[Mask, Mask, Mask], form: str
) -> tuple[pa.Array, pa.Array]:
    """Prompts and responses of the rows that look like chat, parsed; sets the marks chat, empty and unparsable."""
    chat, empty, unparsable = marks
    chat_in, chat_out = looks
    where = np.flatnonzero(chat_in | chat_out)
    index = pa.array(where)
    pairs = zip(where.tolist(), inputs.take(index).to_pylist(), outputs.take(index).to_pylist(), strict=True)
    prompts, responses = [], []
    for row, given, answer in pairs:
        history = _cached_messages(given) if chat_in[row] else None
        reply = messages(answer) if chat_out[row] else None
        prompt, response = given, answer
        if form == "chat" and (history is None or reply is None):
            unparsable[row] = True
        if history is not None:
            chat[row], prompt = True, dump(history)
            unparsable[row] |= history[-1]["role"] == "assistant"
            empty[row] |= not history[-1]["content"].strip()
        if reply is not None:
            found = _response(reply, history)
            unparsable[row] |= found is None
            response = found or ""
            empty[row] |= found is not None and not found.strip()
        prompts.append(prompt)
        responses.append(response)
    return _replaced(inputs, where, prompts), _replaced(outputs, where, responses)


def _response(reply: list[Message], history: list[Message] | None) -> str | None:
    *before, last = reply
    if last["role"] != "assistant" or (before and before != history):
        return None
    return str(last["content"])


@lru_cache(maxsize=1024)  # prompts repeat, usually in neighbouring rows
def _cached_messages(value: str) -> list[Message] | None:
    return messages(value)


def _normalized(prompts: pa.Array, chat: Mask) -> pa.Array:
    """Normal forms: Unicode NFC, runs of white space as one space, lower case; of chat, within each content."""
    keys = pc.utf8_trim(pc.replace_substring_regex(pc.ascii_lower(prompts), ASCII_SPACES, " "), " ")
    # Arrow's own utf8_normalize (25.0) gives the decomposed form for NFC: what is beyond ASCII goes through Python.
    where = np.flatnonzero(chat | ~_mask(pc.fill_null(pc.string_is_ascii(prompts), True)))
    if not len(where):
        return keys
    texts = zip(prompts.take(pa.array(where)).to_pylist(), chat[where].tolist(), strict=True)
    return _replaced(keys, where, [_plain_chat(text) if is_chat else _plain(text) for text, is_chat in texts])


def _plain_chat(prompt: str) -> str:
    return dump([message | {"content": _plain(message["content"])} for message in json.loads(prompt)])


def _plain(content: str) -> str:
    return unicodedata.normalize("NFC", " ".join(content.lower().split()))


def _replaced(values: pa.Array, where: npt.NDArray[np.int64], new: list[str]) -> pa.Array:
    mask = np.zeros(len(values), bool)
    mask[where] = True
    return pc.replace_with_mask(values, pa.array(mask), pa.array(new, values.type))


def _bracketed(values: pa.Array, first: Bytes) -> Mask:
    """Whether the first character after white space is `[`. Shape: (N,)."""
    result: Mask = first == ord("[")
    rest = np.flatnonzero(ASCII_SPACE[first])
    if len(rest):
        result[rest] = _mask(
            pc.fill_null(pc.starts_with(pc.ascii_ltrim_whitespace(values.take(pa.array(rest))), "["), False)
        )
    return result


def _first_bytes(values: pa.Array) -> Bytes:
    """The first byte that is not ASCII white space, NOTHING where there is none. Shape: (N,).

    A few bytes are looked at and no text is copied. After a run of more than 16 the byte is white space all the same:
    so odd a value is worth a closer look.
    """
    wide: Any = np.int64 if pa.types.is_large_string(values.type) else np.int32
    _, offsets_buffer, data_buffer = values.buffers()
    first = np.full(len(values), NOTHING, np.uint8)
    if data_buffer is None or not len(values):
        return first
    text: Bytes = np.frombuffer(data_buffer, np.uint8)
    offsets: npt.NDArray[Any] = np.frombuffer(offsets_buffer, wide)[values.offset : values.offset + len(values) + 1]
    where = np.flatnonzero(offsets[1:] > offsets[:-1])
    if values.null_count:
        where = where[_mask(values.is_valid())[where]]
    at, ends = offsets[:-1][where].astype(np.int64), offsets[1:][where]
    for _ in range(17):
        found = text[at]
        first[where] = found
        spaced = ASCII_SPACE[found]
        if not spaced.any():
            break
        first[where[spaced & (at + 1 >= ends)]] = NOTHING
        more = spaced & (at + 1 < ends)
        where, at, ends = where[more], at[more] + 1, ends[more]
    return first


def _mask(values: pa.Array) -> Mask:
    found: Mask = values.to_numpy(zero_copy_only=False).astype(bool)
    return found
