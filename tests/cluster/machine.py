"""What this machine must allow: namespaces, a bridge and layered mounts, so root on Linux, in no closed container."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

PROGRAMS = {"ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux"}  # and Debian's package of each
# In namespaces that vanish with the command: what a pod needs (enter.py, network.py), without a trace of it.
PROBE = """
set -e
ip link add probe0 type bridge
ip link add probe1 type veth peer name probe2
mount -t tmpfs tmpfs /tmp
mkdir /tmp/upper /tmp/work /tmp/root
mount -t overlay -o lowerdir=/,upperdir=/tmp/upper,workdir=/tmp/work overlay /tmp/root
"""


class MachineError(RuntimeError):
    """This machine can't hold a plane."""


def check_machine() -> None:
    """Try what a plane and its pods need.

    Raises:
        MachineError: one line with what is missing, and what to do.
    """
    if sys.platform != "linux":
        raise MachineError(f"the plane needs Linux; got {sys.platform}: run it in a virtual machine")
    if os.geteuid() != 0:
        raise MachineError(f"the plane needs root for network namespaces; got user id {os.geteuid()}: run as root")
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise MachineError(f"the plane needs the program {program}; got none on PATH: apt-get install {package}")
    command = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "sh", "-c", PROBE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().replace("\n", "; ")
        raise MachineError(
            f"the plane needs namespaces, a bridge and overlay mounts; got {said!r}: "
            "run it on a machine or in a privileged container"
        )
