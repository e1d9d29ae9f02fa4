"""One plane for all tests of a worker, and a namespace for each."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.cluster.container import prepare_image
from tests.cluster.events import what_happened
from tests.cluster.machine import MachineError, check_machine
from tests.cluster.plane import Plane, start_plane, until
from tests.cluster.platform import Platform, make_platform

HERE = Path(__file__).parent
LONG = ("test_gang.py", "test_partial.py")  # first, so that no worker is left alone with them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is marked `cluster`, and comes in an order that several workers can share."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test also prints the events, the pods' last lines and where the logs are."""
    report = yield
    plane = getattr(item, "funcargs", {}).get("plane")
    if report.failed and plane is not None:
        report.sections.append(("cluster", what_happened(plane)))
    return report


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A control plane without any run in it."""
    try:
        check_machine()
    except MachineError as error:
        pytest.exit(str(error), returncode=1)  # one line: every test would say the same
    prepare_image()
    begun = time.monotonic()
    with start_plane(tmp_path_factory.mktemp("plane")) as plane:
        print(f"the plane was ready after {time.monotonic() - begun:.1f} s")
        yield plane


@pytest.fixture(scope="session")
def platform(plane: Plane, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A namespace with traces, a base model and a file system, for every release of these tests."""
    with make_platform(plane, "train", tiny, tmp_path_factory.mktemp("platform")) as platform:
        yield platform


@pytest.fixture
def namespace(plane: Plane) -> Iterator[str]:
    """A namespace that enforces Pod Security `restricted`; gone, with all that is in it, after the test."""
    name = f"test-{secrets.token_hex(3)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    plane.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    until(lambda: plane.api.find("serviceaccounts", "default", name), 30, "the namespace's service account")
    yield name
    plane.api.delete("namespaces", name)
    until(lambda: plane.api.find("namespaces", name) is None, 120, f"namespace {name} gone")
