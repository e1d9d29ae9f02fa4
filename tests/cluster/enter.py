"""Becomes one container:  python -I -S enter.py SPEC  (standard library alone, so that it starts in 30 ms).

The container's process is number 1 of namespaces of its own, in its pod's network. Its root is this machine's, under
a layer that vanishes with it: the project's environment stands in for the image.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

NEWNS, NEWPID = 0x00020000, 0x20000000  # of sched.h
RDONLY, NOSUID, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 8, 32, 4096, 16384, 1 << 18  # of sys/mount.h
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # of sys/prctl.h
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
CANNOT_START = 128

libc = ctypes.CDLL(None, use_errno=True)


def main(path: str) -> int:
    """Run the container that the JSON file describes; its exit code, 128 + n where signal n ended it."""
    with open(path) as file:
        spec = json.load(file)
    for namespace in ("net", "uts", "ipc"):
        with open(f"/proc/{spec['sandbox']}/ns/{namespace}") as handle:
            _checked(libc.setns(handle.fileno(), 0))
    _checked(libc.unshare(NEWNS | NEWPID))
    child = os.fork()
    if child == 0:
        try:
            _end_with_parent()
            _become(spec)
        except BaseException as error:
            print(f"the container could not start: {error}", flush=True)
            os._exit(CANNOT_START)
    with open(spec["pid_file"] + ".new", "w") as file:
        file.write(str(child))
    os.rename(spec["pid_file"] + ".new", spec["pid_file"])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(spec: dict[str, Any]) -> None:
    _mount(None, "/", None, REC | PRIVATE)
    root = _root(spec["scratch"])
    _mount("proc", root + "/proc", "proc", NOSUID | NOEXEC)
    _bind("/sys", root + "/sys", read_only=True)
    _devices(root)
    image = [{"source": source, "target": target, "read_only": True} for target, source in spec["image"].items()]
    # By their depth: a work tree in /tmp is seen though the pod has a volume there.
    for mount in sorted([*image, *spec["mounts"]], key=lambda mount: mount["target"]):
        _bind(mount["source"], _inside(root, mount["target"]), read_only=mount["read_only"])
    for path in spec["image"]:
        _open_way(root, path)
    if spec["read_only_root"]:
        _mount(None, root, None, BIND | REMOUNT | RDONLY)
    os.chroot(root)
    os.chdir(spec["directory"])
    os.setgroups(spec["groups"])
    os.setgid(spec["group"])
    os.setuid(spec["user"])  # from root to another: every capability is gone
    _end_with_parent()  # again: the kernel forgets it with the user
    if spec["no_new_privileges"]:
        _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP) and number in signal.valid_signals():
            signal.signal(number, signal.SIG_DFL)
    os.execvpe(spec["command"][0], spec["command"], spec["environment"])


def _root(scratch: str) -> str:
    os.makedirs(scratch, exist_ok=True)
    _mount("tmpfs", scratch, "tmpfs", 0, "mode=755")
    upper, work, root = (f"{scratch}/{name}" for name in ("upper", "work", "root"))
    for folder in (upper, work, root):
        os.mkdir(folder, 0o755)
    _mount("overlay", root, "overlay", 0, f"lowerdir=/,upperdir={upper},workdir={work}")
    return root


def _open_way(root: str, path: str) -> None:
    """In the container's layer alone, any user may pass the folders above the environment (a home is closed)."""
    parts = path.strip("/").split("/")
    for end in range(1, len(parts)):
        folder = f"{root}/{'/'.join(parts[:end])}"
        mode = os.stat(folder).st_mode
        if not mode & 0o001:
            os.chmod(folder, mode & 0o7777 | 0o011)


def _inside(root: str, path: str) -> str:
    """Where `path` leads in the container: /var/run is a link to /run, of the container's and not of this machine's."""
    place, parts = root, path.strip("/").split("/")
    while parts:
        part = parts.pop(0)
        if os.path.islink(f"{place}/{part}"):
            link = os.readlink(f"{place}/{part}")
            place = root if link.startswith("/") else place
            parts = [*link.strip("/").split("/"), *parts]
        elif part == "..":
            place = root if place == root else os.path.dirname(place)
        else:
            place = f"{place}/{part}"
    return place


def _devices(root: str) -> None:
    _mount("tmpfs", root + "/dev", "tmpfs", NOSUID, "mode=755,size=64k")
    for name in DEVICES:
        _bind(f"/dev/{name}", f"{root}/dev/{name}")
    os.mkdir(root + "/dev/shm")
    _mount("tmpfs", root + "/dev/shm", "tmpfs", NOSUID, "mode=1777,size=64m")
    os.symlink("/proc/self/fd", root + "/dev/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{root}/dev/{name}")


def _bind(source: str, target: str, *, read_only: bool = False) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    _mount(source, target, None, BIND | REC)
    if read_only:
        _mount(None, target, None, BIND | REMOUNT | RDONLY)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, data)]
    _checked(libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), target)


def _end_with_parent() -> None:
    _checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))


def _checked(result: int, what: str = "") -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    code = main(sys.argv[1])
    os._exit(code if code >= 0 else 128 - code)
