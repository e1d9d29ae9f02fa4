"""The command line: options, and overrides in Hydra's grammar.

Every override is one key and one value; whether it says `key=value`, `+key=value` or `++key=value` makes no difference,
because the composed tree is checked against the dataclasses in any case.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from entrypoint.conf import METHODS
from entrypoint.config.keys import Key, keys
from entrypoint.config.unknown import unknown_key
from entrypoint.config.value import show, spell
from entrypoint.errors import ConfigError

LITERAL = re.compile(r"\+{0,2}([a-z_][a-z0-9_.]*)=([^\[\]{}'\"].*)", re.DOTALL)
WITH_VALUE = {"--config-dir": "config_dir", "-cd": "config_dir", "--config-name": "config_name", "-cn": "config_name"}
SWITCHES = {"--help": "help", "-h": "help", "--version": "version"}


@dataclass
class CommandLine:
    """What the words after `python -m entrypoint` say; `show` is help, version, cfg or nothing."""

    values: dict[str, Any] = field(default_factory=dict)  # by dotted key
    method: str | None = None
    config_dir: str | None = None
    config_name: str | None = None
    show: str | None = None


def parse(argv: list[str]) -> CommandLine:
    """Read `argv` (without the program's name).

    Raises:
        ConfigError: an unknown option, an override that can't be read, one that is given twice.
    """
    line = CommandLine()
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            _override(line, word)
            continue
        option, equals, value = word.partition("=")
        if option in SWITCHES and not equals:
            line.show = SWITCHES[option]
        elif option in WITH_VALUE or option in ("--cfg", "-c"):
            _option(line, option, value if equals else next(words, ""))
        else:
            raise _bad_option(word, option)
    if bool(line.config_dir) != bool(line.config_name):
        given, lacking = ("--config-dir", "--config-name") if line.config_dir else ("--config-name", "--config-dir")
        raise ConfigError(
            f"{given}: needs {lacking} too: --config-dir /etc/run --config-name run reads /etc/run/run.yaml"
        )
    return line


def _option(line: CommandLine, option: str, value: str) -> None:
    if not value:
        raise ConfigError(f"{spell(option)}: needs a value")
    if option in WITH_VALUE:
        setattr(line, WITH_VALUE[option], value)
    elif value == "job":
        line.show = "cfg"
    else:
        raise ConfigError(f"{spell(option)}: expected job, got {show(value)}")


def _bad_option(word: str, option: str) -> ConfigError:
    name = option.lstrip("-")
    if option in ("-m", "--multirun"):
        return ConfigError(f"{option}: one command is one run; start another for other values")
    if any(name in keys(method) or name in ("method", *METHODS) for method in METHODS):
        return ConfigError(f"{show(word)}: keys are written without dashes: {spell(name)}=…")
    options = ", ".join(["--config-dir", "--config-name", "--cfg job", "--help", "--version"])
    return ConfigError(f"{show(word)}: no such option; there are {options}, and keys, written key=value")


def _override(line: CommandLine, word: str) -> None:
    name, value = _parse_override(word)
    if name in ("method", "method.name") and not isinstance(value, dict):
        if not isinstance(value, str) or value not in METHODS:
            raise ConfigError(f"{spell(name)}: expected one of {', '.join(METHODS)}, got {show(value)}")
        if line.method not in (None, value):
            raise ConfigError(f"method: is given twice on the command line, as {line.method} and {value}")
        line.method = value
    elif name in line.values:
        raise ConfigError(
            f"{spell(name)}: is given twice on the command line, as {show(line.values[name])} and {show(value)}"
        )
    else:
        line.values[name] = value


def _parse_override(word: str) -> tuple[str, Any]:
    name = word.lstrip("+~").partition("=")[0]
    if not name:
        raise ConfigError(f"{show(word)}: expected key=value")
    if re.match(r"hydra[./@]|hydra$", name):
        raise ConfigError(f"{spell(name)}: Hydra's own settings have no effect here; remove it")
    try:
        override: Override = OverridesParser.create().parse_override(word)
    except Exception as error:  # the grammar's visitor raises more than Hydra's own exceptions
        literal = LITERAL.fullmatch(word)
        if literal and _takes_text(literal[1]):
            return literal[1], literal[2]  # a Hive path has `=` in it, and so may a URL; the grammar has not
        raise _unreadable(word, name, error) from None
    if override.is_delete():
        known = any(name in keys(method) for method in METHODS)
        if not known and name not in ("method", "train"):
            raise unknown_key(name, "grpo")
        raise ConfigError(f"{show(word)}: a key can't be removed; leave it out, and it has its default")
    if override.package is not None:
        raise ConfigError(f"{show(word)}: groups stay where they are; remove @{override.package}")
    if override.is_sweep_override():
        text = word.partition("=")[2]
        raise ConfigError(f"{spell(name)}: expected one value, got {show(text)}; a list is written [a,b]")
    return override.key_or_group.replace("/", "."), override.value()


def _takes_text(name: str) -> bool:
    found: list[Key] = [keys(method)[name] for method in METHODS if name in keys(method)]
    return bool(found) and found[0].kind in ("str", "paths") and not found[0].choices


def _unreadable(word: str, name: str, error: Exception) -> ConfigError:
    if "=" not in word:
        return ConfigError(f"{show(word)}: expected key=value")
    reason = spell(str(error).partition("\n")[0].strip())
    return ConfigError(
        f"{name}: {show(word)} can't be read ({reason}); put text with = , [ ] or {{ }} in quotes: 'a=b'"
    )
