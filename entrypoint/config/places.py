"""Where a run reads and writes: what can be said of these places without opening a connection."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from entrypoint.conf import Data, Run
from entrypoint.errors import ConfigError
from entrypoint.storage import is_s3, local_path

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def on_first_rank(environ: Mapping[str, str]) -> bool:
    """Whether this process is rank 0, or the launcher on its node."""
    return environ.get("RANK", "0") == "0" and environ.get("NODE_RANK", "0") == "0"


def check_places(run: Run, *, look: bool = True) -> None:
    """Refuse a missing model, addresses that can't be written, and outputs that would end up among the inputs.

    What rank 0 alone reads or writes is looked for on its node only.

    Args:
        look: whether folders of this machine are looked at, or only addresses.

    Raises:
        ConfigError: the first such place, in one line.
    """
    sources = sources_of(run.data)
    _check_address("model.path", run.model.path)
    _check_address("output.path", run.output.path)
    folders = {
        "checkpoint.path": run.checkpoint.path,
        "data.cache_path": run.data.cache_path,
        "model.cache_path": run.model.cache_path,
    }
    for name, folder in folders.items():
        _check_folder(name, folder, run.output.path)
    _check_mirror(run)
    mirror = {"checkpoint.mirror": run.checkpoint.mirror}
    _check_apart(run, sources, {"output.path": run.output.path, **mirror, **folders})
    if not look:
        return
    _check_model(run.model.path)
    if on_first_rank(os.environ):
        for name, target in {"output.path": run.output.path, **folders}.items():
            _check_writable(name, target)


def sources_of(data: Data) -> list[str]:
    """`data.path` as a list."""
    return [data.path] if isinstance(data.path, str) else list(data.path)


def check_sources(data: Data, *, look: bool = True) -> None:
    """Refuse traces that are not there, as far as that shows without opening a connection.

    Raises:
        ConfigError: the first such place, in one line.
    """
    for source in sources_of(data):
        _check_address("data.path", source)
        if look and on_first_rank(os.environ):
            _check_source(source)


def _check_address(name: str, address: str) -> None:
    """Refuse a scheme that is not S3's, an S3 address without a bucket, and credentials inside (not repeated)."""
    if "@" in address.partition("://")[2].partition("/")[0]:
        raise ConfigError(f"{name}: holds credentials; remove them: they come from the usual AWS chain")
    scheme = SCHEME.match(address)
    if scheme and not is_s3(address) and scheme[1] != "file":
        raise ConfigError(f"{name}: expected a local path or s3://bucket/…, got {address!r}")
    if not scheme and re.match(r"s3a?:", address):
        raise ConfigError(f"{name}: expected s3://bucket/…, got {address!r}")
    if is_s3(address) and not re.match(r"s3a?://[A-Za-z0-9][A-Za-z0-9._:-]*(/|$)", address):
        raise ConfigError(f"{name}: expected s3://bucket/…, got {address!r}: no bucket has this name")
    if not scheme and address.startswith("~"):
        raise ConfigError(f"{name}: `~` is not expanded here; write the whole path instead of {address!r}")


def _check_folder(name: str, folder: str | None, output: str) -> None:
    if folder is None and name == "checkpoint.path":
        raise ConfigError(
            f"{name}: is required where output.path is on S3 ({output}); give a folder that all ranks see"
        )
    if folder is None:
        return
    _check_address(name, folder)
    if is_s3(folder):
        seen = "each node has" if name == "model.cache_path" else "all ranks see"
        raise ConfigError(f"{name}: expected a folder that {seen}, got {folder!r}")


def _check_mirror(run: Run) -> None:
    """Refuse a mirror that is not on S3, or not a prefix of its own."""
    mirror, output = run.checkpoint.mirror, run.output.path
    if mirror is None:
        return
    _check_address("checkpoint.mirror", mirror)
    if not is_s3(mirror) or "/" not in mirror.partition("://")[2].strip("/"):
        raise ConfigError(f"checkpoint.mirror: expected s3://bucket/prefix, a prefix of this run's own, got {mirror!r}")
    if is_s3(output) and (_is_within(mirror, output) or _is_within(output, mirror)):
        raise ConfigError(f"checkpoint.mirror: {mirror} and output.path={output} lie in each other; keep them apart")


def _check_apart(run: Run, sources: list[str], targets: dict[str, str | None]) -> None:
    """Refuse a target at or below the traces or the base model: its files would be read as theirs."""
    inputs = [*(("data.path", source) for source in sources), ("model.path", run.model.path)]
    for name, target in targets.items():
        for other, source in inputs:
            if target is not None and _is_within(target, source):
                raise ConfigError(f"{name}: {target} is inside {other}={source}; give a place of its own")
    if run.checkpoint.path is not None and _normal(run.checkpoint.path) == _normal(run.output.path):
        raise ConfigError("checkpoint.path: is the same as output.path; give a folder of its own, or leave it out")


def _is_within(target: str, source: str) -> bool:
    """Whether `target` is at or below `source`, or what `source` matches where it is a glob."""
    here, there = _normal(target).split("/"), _normal(source).split("/")
    literal = not glob.has_magic(source) or os.path.exists(_normal(source))
    for at, wanted in enumerate(there):
        if wanted == "**" and not literal:
            return True
        if at >= len(here) or not (here[at] == wanted if literal else fnmatchcase(here[at], wanted)):
            return False
    return True


def _normal(address: str) -> str:
    """One spelling of an address, symbolic links followed, no slash at the end."""
    if is_s3(address):
        return "s3:/" + re.sub(r"/+", "/", f"/{address.partition('://')[2]}").rstrip("/")
    return os.path.realpath(local_path(address)).rstrip("/")


def _check_source(source: str) -> None:
    if is_s3(source):
        return
    path = str(local_path(source))
    if os.path.exists(path):
        return
    if glob.has_magic(path):
        if next(glob.iglob(path, recursive=True), None) is None:
            raise ConfigError(f"data.path: no file matches {source!r}")
    else:
        raise ConfigError(f"data.path: no such file or folder: {source!r}")


def _check_model(address: str) -> None:
    if is_s3(address):
        return
    path = str(local_path(address))
    if not os.path.exists(path):
        raise ConfigError(
            f"model.path: no such folder: {address!r}; nothing is fetched from a model hub: give a folder or s3://bucket/…"
        )
    if not os.path.isdir(path):
        raise ConfigError(f"model.path: expected a folder in Hugging Face's layout, got the file {address!r}")
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ConfigError(f"model.path: no config.json in {address!r}; it is no model in Hugging Face's layout")


def _check_writable(name: str, address: str | None) -> None:
    """Refuse a target that can't be made, known from the nearest folder above it that exists."""
    if address is None or is_s3(address):
        return
    place = Path(os.path.realpath(local_path(address)))
    there = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
    if not os.path.isdir(there):
        raise ConfigError(f"{name}: expected a folder, but {str(there)!r} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}: {str(there)!r} can't be written to by this user")
