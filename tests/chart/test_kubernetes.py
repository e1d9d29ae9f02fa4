"""Every values file's objects are what Kubernetes, Volcano and Karpenter take: strictly, without a cluster."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.helm import HELMS, VALUES, run, template
from tests.process import ROOT

SCHEMAS = runpy.run_path(str(ROOT / ".ci/kubernetes_schemas.py"))
VERSIONS: tuple[str, ...] = SCHEMAS["KUBERNETES"]
Objects = list[dict[str, Any]]


@pytest.fixture(scope="session")
def folder() -> Path:
    made: Path = SCHEMAS["schemas"]()
    return made


def problems(objects: Objects, folder: Path, version: str = VERSIONS[0]) -> list[str]:
    """What kubeconform finds, an object a line."""
    name = "{{.Group}}_{{.ResourceKind}}_{{.ResourceAPIVersion}}.json"
    done = run(
        *("kubeconform", "-strict", "-output", "json", "-kubernetes-version", version.removeprefix("v")),
        *("-schema-location", f"{folder}/{version}/{name}", "-schema-location", f"{folder}/crds/{name}"),
        stdin=yaml.safe_dump_all(objects, sort_keys=False),
    )
    found = [f"{item['kind']}: {item['msg']}" for item in json.loads(done.stdout)["resources"]]
    assert bool(found) == bool(done.returncode), done.stderr
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_a_values_files_objects_are_valid(helm: str, version: str, path: Path, folder: Path) -> None:
    objects = template(helm, "-f", path, "--kube-version", version)
    assert {"ConfigMap", "Job"} <= {found["kind"] for found in objects}
    assert problems(objects, folder, version) == []


OPTIONS = {
    "a file system that is there": "storage.fsx.fileSystemId=fs-0123456789abcdef0,storage.fsx.dnsName=a.b,"
    "storage.fsx.mountName=c",
    "what is off by default": "podMonitor.enabled=true,queue.parent=team,gang.priorityClassName=high,storage.keep=true,"
    "nodeClass.placementGroup=gang,nodeClass.tags.team=a,nodeClass.instanceStorePolicy=,nodeClass.rootVolumeGiB=900,"
    "networkPolicy.apiServerCIDRs={10.0.0.1/32},image.pullSecrets={registry},podLabels.team=a,podAnnotations.team=a",
}


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)
def test_the_objects_that_no_values_file_has_are_valid(settings: str, folder: Path) -> None:
    assert problems(template("helm4", "-f", ROOT / "values/grpo.yaml", "--set", settings), folder) == []


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_both_helms_make_the_same_objects(path: Path) -> None:
    three, four = (sorted(json.dumps(found) for found in template(helm, "-f", path)) for helm in HELMS)
    assert three == four


def drop(name: str) -> Callable[[Any], None]:
    return lambda part: part.pop(name)


def put(name: str, value: Any) -> Callable[[Any], None]:
    return lambda part: part.__setitem__(name, value)


PLANTED = {
    "a node class without its group": ("NodePool", "spec.template.spec.nodeClassRef", drop("group")),
    "a misspelt disruption": ("NodePool", "spec.disruption", put("consolidateAfer", "5m")),
    "a label that is a number": ("NodePool", "metadata", put("labels", {"a": 1})),
    "a node class without subnets": ("EC2NodeClass", "spec", drop("subnetSelectorTerms")),
    "a weight in quotes": ("Queue", "spec", put("weight", "1")),
    "a task without containers": ("Job", "spec.tasks.0.template.spec", drop("containers")),
    "a misspelt security context": ("Job", "spec.tasks.0.template.spec.containers.0", put("securtyContext", {})),
    "a policy without its name": ("Job", "spec.policies.0", put("exit", 64)),
    "misspelt metadata": ("ConfigMap", "metadata", put("lables", {})),
    "data that is a number": ("ConfigMap", "data", put("n", 1)),
    "an unknown kind": ("Queue", "", put("kind", "Quue")),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_found(planted: str, folder: Path, grpo: Objects) -> None:
    kind, path, change = PLANTED[planted]
    objects: Objects = json.loads(json.dumps(grpo))
    part: Any = next(found for found in objects if found["kind"] == kind and found["apiVersion"] != "batch/v1")
    for step in path.split(".") if path else []:
        part = part[int(step) if step.isdigit() else step]
    change(part)
    assert len(problems(objects, folder)) == 1


@pytest.fixture(scope="module")
def grpo() -> Objects:
    return template("helm4", "-f", ROOT / "values/grpo.yaml")


def test_the_schemas_of_the_kinds_in_use_hold_all_that_they_refer_to(folder: Path, grpo: Objects) -> None:
    for found in grpo:
        group, _, version = found["apiVersion"].rpartition("/")
        name = f"{group or version}_{found['kind'].lower()}_{version}.json"
        path = next(path for path in (folder / VERSIONS[0] / name, folder / "crds" / name) if path.exists())
        schema = json.loads(path.read_text())
        assert schema["additionalProperties"] is False
        references = set(SCHEMAS["_references"](schema))
        assert references <= {f"#/definitions/{name}" for name in schema["definitions"]}
