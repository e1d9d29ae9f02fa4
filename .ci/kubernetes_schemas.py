"""Prints a folder of JSON Schemas for kubeconform, made once a pin:  .venv/bin/python .ci/kubernetes_schemas.py

    <folder>/v1.31.14/networking.k8s.io_networkpolicy_v1.json     Kubernetes' own, of the oldest and the newest release
    <folder>/v1.31.14/v1_pod_v1.json                              (kubeconform calls the core group after its version)
    <folder>/crds/karpenter.sh_nodepool_v1.json                   custom resources

They come out of Go module zips, so that no site but the Go proxy is needed: Kubernetes has its OpenAPI document in its
module, the others their CRDs. Each zip is checked against the hash in PINS. Each schema holds all that it refers to,
and is strict: an object takes the fields it names and no others. CEL rules are not in it; an API server checks those.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CI = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preference-tuning"
OPENAPI = "api/openapi-spec/swagger.json"
KUBERNETES = ("v1.31.14", "v1.37.2")  # the oldest that the chart supports, and the newest
# Module, version, hash of the zip as in a go.sum, folder or file in it.
PINS = (
    ("k8s.io/kubernetes", "v1.31.14", "h1:UtjLfqvXLuSVDdJ4+NpQCIfFkKkLnAAVmxAEMsnkhjk=", OPENAPI),
    ("k8s.io/kubernetes", "v1.37.2", "h1:A2VDEiObzkYqFTKhSsn0ZEb0RlLEXpHWj93gi2HqEwE=", OPENAPI),
    ("volcano.sh/volcano", "v1.15.0", "h1:dW8hW/FPDqwcJ1GxGfpR/9qToH1t3+ySn+oaiEMfpm4=", "config/crd/volcano/bases/"),
    # Karpenter's core CRDs too; sigs.k8s.io/karpenter at this version is not on the proxy.
    (
        "github.com/aws/karpenter-provider-aws",
        "v1.15.1",
        "h1:6eH///KgWKDwD2R6wHRnKGN8Vu8OHueaXjNdx64TnuY=",
        "pkg/apis/crds/",
    ),
    (
        "github.com/prometheus-operator/prometheus-operator",
        "v0.85.0",
        "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=",
        "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
    ),
)
PREFIX = "#/definitions/"
META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"


def schemas() -> Path:
    """The folder of the pinned schemas, made where it is not there yet.

    Raises:
        SystemExit: a module that can't be had, or is not the pinned one.
    """
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = CACHE / f"kubernetes-schemas-{key}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=CACHE, prefix=f".{folder.name}."))
    try:
        _write(work)
        try:
            work.rename(folder)
        except OSError:  # lost a race: the winner's are as good
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _write(folder: Path) -> None:
    texts = {(module, version): _texts(module, version, total, inside) for module, version, total, inside in PINS}
    for version in KUBERNETES:
        definitions = json.loads(next(iter(texts[PINS[0][0], version])))["definitions"]
        (folder / version).mkdir()
        for name, definition in definitions.items():
            kinds = definition.get("x-kubernetes-group-version-kind", [])
            if len(kinds) == 1 and "metadata" in definition.get("properties", {}) and not name.endswith("List"):
                found = kinds[0]
                _store(folder / version, found["group"], found["kind"], found["version"], _reachable(name, definitions))
    (folder / "crds").mkdir()
    newest = json.loads(next(iter(texts[PINS[0][0], KUBERNETES[-1]])))["definitions"]
    for (module, _), found in texts.items():
        for text in found if module != PINS[0][0] else ():
            _write_crd(folder / "crds", yaml.load(text, Loader=yaml.CSafeLoader), _reachable(META, newest))


def _write_crd(folder: Path, crd: dict[str, Any], meta: dict[str, Any]) -> None:
    for version in crd["spec"]["versions"]:
        found = _strict(version["schema"]["openAPIV3Schema"], bare_is_empty=True)
        found["properties"]["metadata"] = {"$ref": PREFIX + META}
        found["definitions"] = meta["definitions"]
        _store(folder, crd["spec"]["group"], crd["spec"]["names"]["kind"], version["name"], found)


def _store(folder: Path, group: str, kind: str, version: str, found: dict[str, Any]) -> None:
    found = {"$schema": "http://json-schema.org/draft-07/schema#", **found, "required": _required(found)}
    (folder / f"{group or version}_{kind.lower()}_{version}.json").write_text(json.dumps(found), encoding="utf-8")


def _required(found: dict[str, Any]) -> list[str]:
    return sorted({"apiVersion", "kind", "metadata", *found.get("required", [])})


def _reachable(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The definition called `name` with all that it refers to, each strict, under its own `definitions`."""
    inside: dict[str, Any] = {}
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one not in inside:
            inside[one] = _strict(definitions[one], bare_is_empty=False)
            waiting += [reference.removeprefix(PREFIX) for reference in _references(definitions[one])]
    if QUANTITY in inside:
        inside[QUANTITY] = {"type": ["string", "number"]}
    return {**inside[name], "definitions": inside}


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from _references(child)
    elif isinstance(node, list):
        for child in node:
            yield from _references(child)


def _strict(node: Any, *, bare_is_empty: bool) -> Any:
    """`node` as JSON Schema, closed.

    Args:
        bare_is_empty: an object of which nothing is said holds nothing (a CRD's: the API server drops what it holds);
            else it holds anything.
    """
    if isinstance(node, list):
        return [_strict(child, bare_is_empty=bare_is_empty) for child in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string") or node.get("format") == "int-or-string":
        return {"type": ["integer", "string"], **{key: node[key] for key in ("pattern",) if key in node}}
    found = {
        name: {key: _strict(child, bare_is_empty=bare_is_empty) for key, child in part.items()}
        if name == "properties"
        else _strict(part, bare_is_empty=bare_is_empty)
        for name, part in node.items()
        if not name.startswith("x-kubernetes-") and name not in ("description", "format", "default", "example")
    }
    open_ = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    if node.get("type") == "object" and not open_ and ("properties" in node or bare_is_empty):
        found["additionalProperties"] = False
    return found


def _texts(module: str, version: str, total: str, inside: str) -> list[bytes]:
    """The files of a module's zip that `inside` names: one file, or all YAML files right in a folder."""
    go = subprocess.run([CI / "tools" / "go"], capture_output=True, text=True, check=True).stdout.strip()
    # A module that wants a newer compiler than this one still comes: nothing of it is compiled.
    environment = os.environ | {"GOSUMDB": "off", "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off"}
    answer = subprocess.run(
        [go, "mod", "download", "-json", f"{module}@{version}"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tempfile.gettempdir(),
    )
    got = json.loads(answer.stdout or "{}")
    if "Zip" not in got:
        sys.exit(f"{module}@{version}: can't be downloaded: {got.get('Error') or answer.stderr.strip()}")
    if got["Sum"] != total:
        sys.exit(f"{module}@{version}: is not the pinned module: its hash is {got['Sum']}, expected {total}")
    root = f"{module}@{version}/{inside}"
    with zipfile.ZipFile(got["Zip"]) as archive:
        wanted = [
            name
            for name in archive.namelist()
            if name == root or (inside.endswith("/") and name.startswith(root) and "/" not in name[len(root) :])
        ]
        return [archive.read(name) for name in wanted if name.endswith((".yaml", ".json"))]


if __name__ == "__main__":
    print(schemas())
