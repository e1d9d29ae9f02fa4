"""A pod's volumes as folders of this machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.api import Api, Object
from tests.cluster.environment import Data, field


@dataclass(frozen=True)
class Volumes:
    """Makes the volumes of one pod in `folder`; claims lie in `claims`, where they outlive it."""

    api: Api
    pod: Object
    folder: Path
    claims: Path
    address: str
    data: Data

    def prepare(self) -> dict[str, Path]:
        """Every volume of the pod by its name.

        Raises:
            ValueError: a kind of volume that this kubelet doesn't know.
        """
        return {volume["name"]: self._prepare(volume) for volume in self.pod["spec"].get("volumes", [])}

    def release(self) -> None:
        """Unmount what `prepare` mounted."""
        for folder in sorted(self.folder.glob("*")):
            if folder.is_mount():
                subprocess.run(["umount", "--lazy", folder], check=True)

    def _prepare(self, volume: Object) -> Path:
        folder = self.folder / volume["name"]
        if "persistentVolumeClaim" in volume:
            return self._claim(volume["persistentVolumeClaim"]["claimName"])
        folder.mkdir(parents=True, exist_ok=True)
        if "emptyDir" in volume:
            if volume["emptyDir"].get("medium") == "Memory":
                subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
            folder.chmod(0o777)
            return self._own([folder], folder)
        sources = volume["projected"]["sources"] if "projected" in volume else [volume]
        mode = (volume.get("projected") or volume.get("configMap") or volume.get("secret") or {}).get(
            "defaultMode", 0o644
        )
        written = [file for source in sources for file in self._write(source, folder, mode)]
        return self._own([folder, *written], folder)

    def _write(self, source: Object, folder: Path, mode: int) -> Iterable[Path]:
        content: Mapping[str, bytes]
        if "configMap" in source:
            content = _chosen(source["configMap"], self._object("configmaps", source["configMap"]))
        elif "secret" in source:
            content = _chosen(source["secret"], self._object("secrets", source["secret"]))
        elif "downwardAPI" in source:
            items = source["downwardAPI"].get("items", [])
            content = {i["path"]: field(self.pod, i["fieldRef"]["fieldPath"], self.address).encode() for i in items}
        elif "serviceAccountToken" in source:
            content = {source["serviceAccountToken"]["path"]: self._token(source["serviceAccountToken"]).encode()}
        else:
            raise ValueError(f"this kubelet has no volumes of kind {', '.join(sorted(set(source) - {'name'}))}")
        for name, value in content.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(value)
            file.chmod(mode)
            yield file

    def _object(self, kind: str, source: Object) -> Mapping[str, bytes]:
        return self.data(kind, source.get("name") or source["secretName"], source.get("optional", False))

    def _token(self, source: Object) -> str:
        spec = self.pod["spec"]
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [source["audience"]] if "audience" in source else [],
                "expirationSeconds": source.get("expirationSeconds", 3600),
            },
        }
        account = spec.get("serviceAccountName", "default")
        made = self.api.create("serviceaccounts", request, self.pod["metadata"]["namespace"], sub=(account, "token"))
        return str(made["status"]["token"])

    def _claim(self, name: str) -> Path:
        """A claim's folder; one file system (`volumeHandle`) is one folder, whoever claims it."""
        claim = self.api.get("persistentvolumeclaims", name, self.pod["metadata"]["namespace"])
        volume = self.api.get("persistentvolumes", claim["spec"]["volumeName"])
        csi = volume["spec"].get("csi", {})
        folder = self.claims / csi.get("volumeHandle", volume["metadata"]["name"])
        folder.mkdir(parents=True, exist_ok=True)
        driver = self.api.find("csidrivers.storage.k8s.io", csi["driver"]) if csi else None
        policy = (driver or {}).get("spec", {}).get("fsGroupPolicy", "ReadWriteOnceWithFSType")
        shared = "ReadWriteMany" in volume["spec"]["accessModes"]
        # As a kubelet does it: a volume that several nodes may mount keeps its owner, unless the driver says `File`.
        return self._own([folder], folder) if policy == "File" or not shared else folder

    def _own(self, paths: list[Path], result: Path) -> Path:
        group = self.pod["spec"].get("securityContext", {}).get("fsGroup")
        for path in paths if group is not None else []:
            os.chown(path, -1, group)
            mode = path.stat().st_mode
            path.chmod(mode | (0o2770 if path.is_dir() else 0o440))
        return result


def _chosen(source: Object, content: Mapping[str, bytes]) -> Mapping[str, bytes]:
    return {item["path"]: content[item["key"]] for item in source["items"]} if source.get("items") else content
