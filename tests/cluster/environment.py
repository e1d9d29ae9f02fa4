"""A container's environment, as a kubelet makes it of the pod."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tests.cluster.api import Object

Data = Callable[[str, str, bool], Mapping[str, bytes]]  # (configmaps or secrets, name, optional) to its keys


def environment(pod: Object, container: Object, address: str, base: Mapping[str, str], data: Data) -> dict[str, str]:
    """`base` (the image's and the cluster's own variables), then `envFrom`, then `env`: the later over the earlier."""
    result = dict(base)
    for source in container.get("envFrom", []):
        for kind, reference in (("configmaps", source.get("configMapRef")), ("secrets", source.get("secretRef"))):
            if reference:
                found = data(kind, reference["name"], reference.get("optional", False))
                result |= {source.get("prefix", "") + key: value.decode() for key, value in found.items()}
    for variable in container.get("env", []):
        value = _value(variable, pod, container, address, data, result)
        if value is not None:
            result[variable["name"]] = value
    return result


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` replaced where NAME is known; `$$(NAME)` is a literal `$(NAME)`."""

    def replaced(match: re.Match[str]) -> str:
        return match[0][1:] if match[0].startswith("$$") else variables.get(match[1], match[0])

    return re.sub(r"\$?\$\(([-._a-zA-Z0-9]+)\)", replaced, text)


def field(pod: Object, path: str, address: str) -> str:
    """What a `fieldRef` names.

    Raises:
        ValueError: a path that no kubelet knows, or not this one.
    """
    metadata, spec = pod["metadata"], pod["spec"]
    if keyed := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
        return str(metadata.get(keyed[1], {}).get(keyed[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        return "\n".join(f'{key}="{value}"' for key, value in sorted(metadata.get(path[9:], {}).items()))
    known = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "status.podIP": address,
        "status.podIPs": address,
        "status.hostIP": address.rpartition(".")[0] + ".1",
    }
    if path not in known:
        raise ValueError(f"fieldRef {path!r} is not known; there is: {', '.join(known)}")
    return str(known[path])


def _value(
    variable: Object, pod: Object, container: Object, address: str, data: Data, known: Mapping[str, str]
) -> str | None:
    source: dict[str, Any] = variable.get("valueFrom", {})
    if "fieldRef" in source:
        return field(pod, source["fieldRef"]["fieldPath"], address)
    if "resourceFieldRef" in source:
        kind, _, resource = source["resourceFieldRef"]["resource"].partition(".")
        return str(container.get("resources", {}).get(kind, {}).get(resource, "0"))
    for kind, reference in (("configmaps", source.get("configMapKeyRef")), ("secrets", source.get("secretKeyRef"))):
        if reference:
            found = data(kind, reference["name"], reference.get("optional", False)).get(reference["key"])
            if found is None and not reference.get("optional", False):
                raise ValueError(f"{kind} {reference['name']!r} has no key {reference['key']!r}")
            return None if found is None else found.decode()
    return expand(variable.get("value", ""), known)
