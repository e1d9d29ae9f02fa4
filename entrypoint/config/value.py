"""One value of the run file: from what YAML or the command line made of it to what the key is, or a refusal."""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from typing import Any

from entrypoint.config.keys import INT_MAX, Key
from entrypoint.errors import ConfigError

WHOLE_BATCH = ("aot", "aot_unpaired", "sft")  # TRL's losses that sort, or average tokens, over one forward call
SHOWN = 80  # characters of a value that a message repeats
PASSWORD = re.compile(r"(?<=//)[^/@\s]+(?=@)")  # of http://user:password@host; a message never repeats it
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def show(value: Any) -> str:
    """`value` as YAML spells it, on one line and not too long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number of thousands of digits"
    text = PASSWORD.sub("…", text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def spell(name: str) -> str:
    """A key's or a file's name as it stands, unless it would break the line or fill it."""
    return name if name.isprintable() and len(name) <= 2 * SHOWN else show(name)


def read_value(key: Key, value: Any) -> Any:
    """`value` as the key's type.

    An integral float is an integer (Helm prints 1000000 as 1e+06, and JSON Schema agrees), an integer is a number.
    Nothing else is converted: text that looks like a number and a number where text is wanted are refused.

    Raises:
        ConfigError: a wrong type, out of bounds or not one of the choices.
    """
    if value is None and key.optional:
        return None
    if key.word is not None and value == key.word:
        return value
    if key.form is not None and isinstance(value, str) and re.fullmatch(key.form.pattern, value, re.ASCII):
        return value
    if key.kind == "bool":
        return value if isinstance(value, bool) else _refuse(key, value)
    if key.kind in ("int", "float"):
        return _number(key, value)
    if key.kind == "str":
        return _text(key, value)
    return _texts(key, value)


def expected(key: Key) -> str:
    """What the key takes, in words: `an integer >= 1 or null`."""
    if key.choices:
        words = f"one of {', '.join(key.choices)}" if len(key.choices) > 1 else key.choices[0]
    else:
        words = {
            "bool": "true or false",
            "int": "an integer",
            "float": "a number",
            "str": "text",
            "texts": "a list of text, such as [a, b]",
            "paths": "a path or a list of paths",
        }[key.kind]
    bounds = [(">=", key.minimum), (">", key.above), ("<=", key.maximum), ("<", key.below)]
    words += "".join(
        f"{' and' if at else ''} {sign} {bound:.15g}"
        for at, (sign, bound) in enumerate(pair for pair in bounds if pair[1] is not None)
    )
    words += f" or {key.word}" if key.word else ""
    words += f" or {key.form.words}" if key.form else ""
    return f"{words} or null" if key.optional else words


def _number(key: Key, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        quoted = isinstance(value, str) and _is_number(value)
        hint = "; remove the quotes, or decode it: ${oc.decode:${oc.env:NAME}}" if quoted else ""
        _refuse(key, value, hint)
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(key, value)
    if key.kind == "int":
        if value != int(value):
            _refuse(key, value)
        value = int(value)
        if key.maximum is None and value > INT_MAX:
            _refuse(key, value, f"; the most is {INT_MAX}")
    if (
        (key.minimum is not None and value < key.minimum)
        or (key.maximum is not None and value > key.maximum)
        or (key.above is not None and value <= key.above)
        or (key.below is not None and value >= key.below)
    ):
        _refuse(key, value)
    try:
        return value if key.kind == "int" else float(value)
    except OverflowError:
        return _refuse(key, value)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _text(key: Key, value: Any) -> str:
    if key.choices:
        if value in key.choices:
            return str(value)
        if value in WHOLE_BATCH:
            _refuse(key, value, "; it needs the whole batch at once, which is computed in parts")
        close = get_close_matches(value, key.choices, n=1) if isinstance(value, str) else []
        _refuse(key, value, f"; did you mean {close[0]}?" if close else "")
    if isinstance(value, bool):
        _refuse(key, value, "; put it in quotes: YAML reads yes, no, on, off, true and false as booleans")
    if isinstance(value, int | float):
        _refuse(key, value, "; put it in quotes")
    if not isinstance(value, str):
        _refuse(key, value)
    if not value.strip():
        _refuse(key, value, "; write null to leave it out" if key.optional else "")
    if value != value.strip():
        _refuse(key, value, "; remove the blanks around it")
    if CONTROL.search(value):
        _refuse(key, value, "; remove the line break or control character")
    if not _encodable(value):
        _refuse(key, value, "; it is not valid Unicode")
    if key.optional and value.lower() == "none":
        _refuse(key, value, "; write null to leave it out")
    return str(value)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _texts(key: Key, value: Any) -> str | list[str]:
    if key.kind == "paths" and isinstance(value, str):
        return _text(key, value)
    if not isinstance(value, list):
        _refuse(key, value)
    if key.kind == "paths" and not value:
        _refuse(key, value, "; give at least one")
    return [_text(key, item) for item in value]


def _refuse(key: Key, value: Any, hint: str = "") -> Any:
    raise ConfigError(f"{key.name}: expected {expected(key)}, got {show(value)}{hint}")
