"""Runs a Dockerfile's steps without an engine, so that what is tested is what it says.

A stage is a folder; `/opt` in a step means the folder's. Its base image is this machine's own system and Python. Of the
instructions those are known that ours has, and of their options none but `COPY --from`; another ends the test.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.process import ROOT

IGNORED = ("--mount=type=cache,target=/root/.cache", "--mount=type=secret,id=pip.conf,target=/etc/pip.conf")


@dataclass
class Image:
    """A stage that was built: its folder and what a container of it starts with."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0"
    entrypoint: list[str] = field(default_factory=list)


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction and its arguments, on one line; comments and the parser's own lines are left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def build(text: str, target: str, folder: Path, env: Mapping[str, str]) -> Image:
    """Build the stage `target` and those that it needs, each into a folder of its name below `folder`.

    Args:
        env: what a RUN step gets beside the stage's own variables; it wins.
    """
    stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for word, rest in instructions(text):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = (base, [])
        elif stages:
            stages[name][1].append((word, rest))
    built: dict[str, Image] = {}
    for name in stages:
        if name == target or _needed(name, target, stages):
            built[name] = _build(*stages[name], folder / name, built, env)
    return built[target]


def _needed(name: str, target: str, stages: dict[str, tuple[str, list[tuple[str, str]]]]) -> bool:
    base, steps = stages[target]
    sources = {base} | {match[1] for _, rest in steps if (match := re.match(r"--from=(\S+)", rest))}
    return any(name == source or _needed(name, source, stages) for source in sources if source in stages)


def _build(
    base: str, steps: list[tuple[str, str]], root: Path, built: Mapping[str, Image], env: Mapping[str, str]
) -> Image:
    image = Image(root)
    if base in built:
        image = Image(root, dict(built[base].env), built[base].workdir)
        _link(built[base].root, root)
    root.mkdir(exist_ok=True)
    for word, rest in steps:
        if word == "ENV":
            image.env |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "WORKDIR":
            image.workdir = rest
        elif word == "USER":
            image.user = rest
        elif word == "ENTRYPOINT":
            image.entrypoint = json.loads(rest)
        elif word == "COPY":
            _copy(image, rest, built)
        elif word == "RUN":
            _run(image, rest, env)
        else:
            raise AssertionError(f"{word}: not known here; teach this module what it does")
    return image


def _copy(image: Image, rest: str, built: Mapping[str, Image]) -> None:
    *sources, target = rest.split()
    goal = image.root / os.path.join(image.workdir, target).lstrip("/")
    if sources[0].startswith("--from="):
        stage, path = sources
        _link(built[stage.removeprefix("--from=")].root / path.lstrip("/"), goal)
        return
    for name in sources:
        source = ROOT / name
        place = goal / source.name if target.endswith("/") else goal
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=_left_out)
        else:
            shutil.copy(source, place)


def _left_out(folder: str, names: list[str]) -> list[str]:
    """What .dockerignore keeps from the builder: whatever is not let in, by itself or with a folder around it."""
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    place = Path(folder).relative_to(ROOT)

    def out(name: str) -> bool:
        path = f"{place / name}/"
        return name == "__pycache__" or not any(
            path.startswith(f"{entry}/") or f"{entry}/".startswith(path) for entry in let_in
        )

    return [name for name in names if out(name)]


def _run(image: Image, rest: str, env: Mapping[str, str]) -> None:
    for option in IGNORED:
        rest = rest.replace(option, "")
    assert not rest.lstrip().startswith("--"), f"RUN {rest}: an option that is not known here"
    workdir = image.root / image.workdir.lstrip("/")
    workdir.mkdir(parents=True, exist_ok=True)
    command = rest.replace("/opt/", f"{image.root}/opt/").replace("mkdir /opt", f"mkdir {image.root}/opt")
    done = subprocess.run(
        ["sh", "-ec", command], env={**image.env, **env}, cwd=workdir, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"RUN {rest}\n{done.stdout}\n{done.stderr}"


def _link(source: Path, target: Path) -> None:
    """A copy that shares its files' bytes: nothing here changes a file in place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target, symlinks=True, copy_function=os.link)


# A container: the stage's folder at its place, the rest of the system read-only, and another user.
CONTAINER = r"""
set -e
new=$1; image=$2; run=$3; storage=$4; python=$5; user=$6; shift 6
mount -t tmpfs root "$new"
cd "$new"
mkdir -p usr etc/run proc dev tmp storage ".$python" opt
for name in bin sbin lib lib64; do
    if [ -L "/$name" ]; then
        cp -P "/$name" "$name"
    elif [ -d "/$name" ]; then
        mkdir "$name" && mount --bind "/$name" "$name"
    fi
done
mount --bind /usr usr
mount -o remount,bind,ro usr
case "$python" in /usr|/usr/*) ;; *) mount --bind "$python" ".$python"; mount -o remount,bind,ro ".$python" ;; esac
cp -r /etc/ld.so.cache /etc/alternatives etc/ 2>/dev/null || true
mount --bind "$run" etc/run
mount -o remount,bind,ro etc/run
mount --bind "$image/opt" opt
mount -o remount,bind,ro opt
mount --rbind /dev dev
mount -t proc proc proc
mount -t tmpfs -o mode=1777 tmp tmp
mount --bind "$storage" storage
mount -o remount,ro "$new"
exec chroot "$new" setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups --no-new-privs \
    --inh-caps=-all --bounding-set=-all "$@"
"""


@dataclass(frozen=True)
class Container:
    """Starts an image as the chart does: `run` is read at /etc/run, `storage` is /storage; nothing else is given."""

    image: Image
    folder: Path
    run: Path
    storage: Path

    def __call__(self, *command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Wait for `command`, by default found on the image's own PATH; in a mount and process space of its own."""
        assert os.geteuid() == 0, "to start a container, and to be another user in it, takes root"
        self.folder.mkdir(exist_ok=True)
        env = {name: value.replace("${PATH}", "/usr/local/bin:/usr/bin:/bin") for name, value in self.image.env.items()}
        env["OMP_NUM_THREADS"] = "1"  # as all tests: threads that wait for each other on a busy machine take minutes
        start = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", CONTAINER, "sh"]
        places = [self.folder, self.image.root, self.run, self.storage, Path(sys.base_prefix), self.image.user]
        inside = ["env", "-i", "-C", self.image.workdir, *(f"{name}={value}" for name, value in env.items())]
        return subprocess.run(
            [*start, *map(str, places), *inside, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
