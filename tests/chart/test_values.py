"""The chart's values: each is read, described and tested; each values file says how it is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.helm import CHART, VALUES, run
from tests.process import ROOT

TEMPLATES = sorted(path for path in (CHART / "templates").rglob("*") if path.is_file())
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
COMMENT = re.compile(r"/\*.*?\*/", re.S)
ACTION = re.compile(r"\{\{(.*?)\}\}", re.S)
LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|`[^`]*`')
READ = re.compile(r"\.Values\b(?:\.[A-Za-z0-9_]+)*")
FREE = ("training",)  # what is below it belongs to the trainer: the chart hands it on whole


def leaves(tree: dict[str, Any], *path: str) -> Iterator[str]:
    """Dotted keys of `tree` that are no groups."""
    for name, value in tree.items():
        if isinstance(value, dict) and value and (*path, name) != FREE:
            yield from leaves(value, *path, name)
        else:
            yield ".".join((*path, name))


def reads(text: str) -> set[str]:
    """Values that a template reads, as dotted keys; "" is all of them at once."""
    actions = " ".join(LITERAL.sub("", action) for action in ACTION.findall(COMMENT.sub("", text)))
    return {found.removeprefix(".Values").removeprefix(".") for found in READ.findall(actions)}


def within(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.")


LEAVES = list(leaves(DEFAULTS))
READS = {path.name: reads(path.read_text(encoding="utf-8")) for path in TEMPLATES}


def test_reads_are_found_by_their_full_names() -> None:
    """The lint below would be blind to a value read in a way that this does not see."""
    text = '{{ if .Values.a.b }}{{ $.Values.c | quote }}{{/* .Values.d */}}{{ fail ".Values.e" }}.Values.f{{ .Values }}'
    assert reads(text) == {"a.b", "c", ""}


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
        for name, value in (part.get("set") or {}).items():
            if isinstance(value, dict) and value:
                yield from leaves(value, *name.split("."))
            yield name


def test_every_value_is_set_to_something_else_by_a_unit_test() -> None:
    files = sorted((CHART / "tests").glob("*_test.yaml"))
    found = {name for path in files for part in yaml.safe_load_all(path.read_text()) for name in given(part)}
    untested = [leaf for leaf in LEAVES if not any(within(name, leaf) or within(leaf, name) for name in found)]
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
    assert (tmp_path / "README.md").read_text() == (CHART / "README.md").read_text(), "`make chart-readme` writes it"


def test_nothing_of_the_chart_names_an_index_or_a_host_to_build_from() -> None:
    manifests = [*(ROOT / ".ci").rglob("go.mod"), *(ROOT / ".ci").rglob("go.sum")]
    assert [path for path in manifests if "://" in path.read_text()] == []
