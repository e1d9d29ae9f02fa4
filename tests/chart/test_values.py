"""The chart's values: each is read, described and tested; each values file says how it is run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.helm import CHART, VALUES, run
from tests.process import ROOT

HASHING = "_frozen.tpl"  # hashes all values, to name those that an upgrade would change: that reads none of them
TEMPLATES = sorted(path for path in (CHART / "templates").rglob("*") if path.is_file() and path.name != HASHING)
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
COMMENT = re.compile(r"/\*.*?\*/", re.S)
ACTION = re.compile(r"\{\{(.*?)\}\}", re.S)
LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|`[^`]*`')
ALIAS = re.compile(r"\$values := [.$\w]*\.Values\b(?!\.)|\$values\b")
READ = re.compile(r"\.Values\b(?:\.[A-Za-z0-9_]+)*")
HANDED = re.compile(r'"(?P<name>\w+)" (?:\$|\.|\w)*\.Values\.(?P<group>[\w.]+)')  # (dict "image" .Values.image)


def leaves(schema: dict[str, Any], *path: str) -> Iterator[str]:
    """Dotted names of the chart's values; `training`, which it hands on whole, is one."""
    for name, part in schema["properties"].items():
        if "default" in part or name == "training":
            yield ".".join((*path, name))
        else:
            yield from leaves(part, *path, name)


def actions(text: str) -> str:
    """What is inside {{ }}, `$values` spelt out as .Values."""
    found = " ".join(ACTION.findall(COMMENT.sub("", text)))
    return ALIAS.sub(lambda match: ".Values" if match[0] == "$values" else "", found)


def reads(text: str, helpers: str) -> set[str]:
    """Values that the actions in `text` read, as dotted keys; "" is all of them at once.

    A group that is handed on by name counts as what `helpers`, all actions together, read below that name.
    """
    found = set()
    for handed in HANDED.finditer(text):
        below = set(re.findall(rf"(?<![\w)])\.{handed['name']}\.(\w+)", helpers))
        found |= {f"{handed['group']}.{key}" for key in below} or {handed["group"]}
    text = LITERAL.sub("", HANDED.sub("", text))
    return found | {read.removeprefix(".Values").removeprefix(".") for read in READ.findall(text)}


def within(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.")


LEAVES = list(leaves(SCHEMA))
ACTIONS = {path.name: actions(path.read_text(encoding="utf-8")) for path in TEMPLATES}
READS = {name: reads(text, " ".join(ACTIONS.values())) for name, text in ACTIONS.items()}


def test_reads_are_found_by_their_full_names() -> None:
    """The lints below would be blind to a value read in a way that this does not see."""
    text = actions(
        '{{ if .Values.a.b }}{{ $.Values.c | quote }}{{/* .Values.d */}}{{ fail ".Values.e" }}.Values.f{{ .Values }}'
        '{{ include "x" (dict "image" .Values.g) }}{{ include "y" (dict "tags" .Values.h.i) }}'
        "{{ $values := $root.Values }}{{ $values.j.k }}"
    )
    assert reads(text, "if .image.tag .Values.image.no") == {"a.b", "c", "", "g.tag", "h.i", "j.k"}


@pytest.mark.parametrize("name", READS)
def test_a_template_reads_values_by_their_full_names_and_only_documented_ones(name: str) -> None:
    """A whole group handed on, or all values, would hide which of them are read."""
    unknown = {read for read in READS[name] if not any(within(read, leaf) for leaf in LEAVES)}
    assert not unknown, f"{name} reads .Values.{', .Values.'.join(sorted(unknown))}: not single keys of values.yaml"


def test_every_value_is_read_by_a_template() -> None:
    found = set().union(*READS.values())
    assert [leaf for leaf in LEAVES if not any(within(read, leaf) for read in found)] == []


def given(document: dict[str, Any]) -> Iterator[str]:
    """Dotted keys that a unit-test file sets, by `set:`, for the suite or for one test."""
    for part in (document, *document.get("tests", [])):
        yield from (part.get("set") or {})


def test_every_value_is_set_to_something_else_by_a_unit_test() -> None:
    files = sorted((CHART / "tests").glob("*_test.yaml"))
    found = {name for path in files for part in yaml.safe_load_all(path.read_text()) for name in given(part)}
    untested = [leaf for leaf in LEAVES if not any(within(name, leaf) for name in found)]
    assert untested == [], "no test in chart/tests sets these"


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_a_values_file_begins_with_the_command_that_runs_it(path: Path) -> None:
    """Not only a command: that very one, with `template` for `install`, renders."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    command = re.fullmatch(r"# helm install (\S+ \./chart -f values/\S+.*)", first)
    assert command, first
    words = shlex.split(command[1], comments=True)
    assert f"values/{path.name}" in words
    done = run("helm4", "template", *words)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_a_values_file_holds_differences_only(path: Path) -> None:
    def same(tree: dict[str, Any], defaults: dict[str, Any], *above: str) -> Iterator[str]:
        for name, value in tree.items():
            default = defaults.get(name, ...)
            if isinstance(value, dict) and isinstance(default, dict) and value:
                yield from same(value, default, *above, name)
            elif value == default and type(value) is type(default):
                yield ".".join((*above, name))

    assert list(same(yaml.safe_load(path.read_text(encoding="utf-8")), DEFAULTS)) == []


def test_the_readme_is_the_one_that_helm_docs_writes(tmp_path: Path) -> None:
    for name in ("Chart.yaml", "README.md.gotmpl", "values.yaml"):
        (tmp_path / name).write_bytes((CHART / name).read_bytes())
    done = run("helm-docs", "--chart-search-root", tmp_path)
    assert done.returncode == 0, done.stderr
    readme = (CHART / "README.md").read_text()
    assert (tmp_path / "README.md").read_text() == readme, "`make chart-readme` writes it"
    assert re.findall(r"^\|.*\|\s*\|$", readme, re.M) == [], "a `--` inside a description ends it for helm-docs"


@pytest.mark.parametrize("path", sorted((ROOT / ".ci/tools").glob("*/go.*")), ids=lambda path: path.parent.name)
def test_a_pin_names_no_index_and_no_host_but_modules(path: Path) -> None:
    assert not re.search(r"://|GOPROXY|=> \.|=> /", path.read_text().replace(" h1:", " "))
