"""The Volcano Queue of the run, waited for until it is Open, and a scheduler that can never scale from zero nodes.

Volcano's webhook refuses a Job whose Queue is not Open, and a Queue is made some 10 to 50 ms before it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import yaml

from entrypoint.errors import ConfigError
from entrypoint.kubernetes import Answer, Cluster, Unreachable

QUEUES = "/apis/scheduling.volcano.sh/v1beta1/queues"
POLL = 0.25  # seconds
ROLES_LAG = 10.0  # seconds that a role made a moment ago may take to be known to the API server
# Plugins that refuse a gang larger than what the cluster has now, when the action `enqueue` asks them.
VOTERS = ("overcommit", "proportion", "capacity")


Say = Callable[[str], None]


def check_queue(cluster: Cluster, name: str, gpus: int, scheduler_config: str | None, waiting: Say, warn: Say) -> str:
    """Wait until the Queue is Open; returns what to say of it.

    Args:
        gpus: that the gang asks for.
        scheduler_config: namespace/name of Volcano's ConfigMap, judged where it may be read; None: not asked for.
        waiting: told what is being waited for.
        warn: told what lets this run start, and costs others.

    Raises:
        ConfigError: it will not open, or can never hold the gang, or the scheduler can't start one from zero nodes.
    """
    began = time.monotonic()
    while not _is_open(cluster, name, gpus, waiting, patient=time.monotonic() - began < ROLES_LAG):
        time.sleep(POLL)
    waited = time.monotonic() - began
    judged = f"; {_judge_scheduler(cluster, scheduler_config, warn)}" if scheduler_config else ""
    return f"{name} is Open after {waited:.1f} s{judged}"


def _is_open(cluster: Cluster, name: str, gpus: int, waiting: Say, *, patient: bool) -> bool:
    try:
        answer = cluster.get(f"{QUEUES}/{quote(name, safe='')}")
    except Unreachable as error:  # a network policy may be in force later than its pod
        waiting(f"the Kubernetes API at {cluster.address} can't be reached ({error})")
        return False
    if answer.status == 200:
        most = str(((answer.content.get("spec") or {}).get("capability") or {}).get("nvidia.com/gpu", ""))
        if most.isdecimal() and int(most) < gpus:
            raise ConfigError(
                f"Queue {name}: its capability is nvidia.com/gpu: {most}, expected at least {gpus}, which the gang "
                "asks for: it would never be let in, and nodes be bought for it; raise it, lower nodes, or name another"
            )
        state = str((answer.content.get("status") or {}).get("state") or "")
        if state in ("Closed", "Closing"):
            raise ConfigError(
                f"Queue {name}: is {state}; open it (vcctl queue operate -a open -n {name}) or name another"
            )
        waiting(f"Queue {name} has state {state!r}, expected Open; look at Volcano's controller")
        return state == "Open"
    if answer.status in (401, 403) and patient:
        waiting(f"Queue {name}: the pod's account may not read it yet ({answer.message})")
        return False
    if answer.status >= 500 or answer.status == 429:
        waiting(f"the Kubernetes API answers {answer.status} ({answer.message})")
        return False
    raise _refusal(name, answer)


def _refusal(name: str, answer: Answer) -> ConfigError:
    if answer.status in (401, 403):
        return ConfigError(
            f"Queue {name}: the pod's account may not read it ({answer.message}); "
            "grant get on queues.scheduling.volcano.sh"
        )
    if answer.status == 404 and not answer.content:  # the API server knows no such kind
        return ConfigError(f"Queue {name}: the cluster has no Queues; install Volcano 1.12 or later")
    if answer.status == 404:
        return ConfigError(f"Queue {name}: there is none; create it, or name one that exists")
    return ConfigError(f"Queue {name}: the Kubernetes API answers {answer.status} ({answer.message})")


def _judge_scheduler(cluster: Cluster, place: str, warn: Say) -> str:
    """Refuse a configuration that can't scale from zero; says whether one was seen."""
    namespace, _, name = place.partition("/")
    try:
        answer = cluster.get(f"/api/v1/namespaces/{quote(namespace, safe='')}/configmaps/{quote(name, safe='')}")
    except Unreachable:
        answer = Answer(0, {})
    if answer.status != 200:
        return f"Volcano's scheduler configuration was not looked at ({place}: {answer.status or 'no answer'})"
    for key, text in (answer.content.get("data") or {}).items():
        config = read_config(str(text)) if key.endswith(".conf") else None
        if config and (voters := voters_of(config)):
            raise ConfigError(
                f"ConfigMap {place}: this Volcano never scales from zero nodes: the action enqueue asks "
                f"{', '.join(voters)}, which refuse a gang that is larger than the cluster is now; write "
                f'actions: "allocate, backfill", or enableJobEnqueued: false beside {" and ".join(voters)}'
            )
        if config and any(plugin["name"] == "proportion" for tier in config.tiers for plugin in tier):
            warn(
                f"ConfigMap {place}: with the plugin proportion a run that waits for nodes can keep another, whose "
                "nodes are there and paid for, from starting; write capacity in its place where several run at once"
            )
    return "its scheduler can start from zero nodes"


@dataclass(frozen=True)
class SchedulerConfig:
    """What volcano-scheduler.conf says: its actions, and its plugins, as written, by tier."""

    actions: list[str]
    tiers: list[list[dict[str, Any]]]


def read_config(text: str) -> SchedulerConfig | None:
    """What is written; None: nothing that the scheduler takes, and it has a configuration of its own then."""
    try:
        config: Any = yaml.safe_load(text)
        tiers = [[{**plugin, "name": plugin["name"]} for plugin in tier["plugins"]] for tier in config["tiers"]]
        return SchedulerConfig([action.strip() for action in str(config["actions"]).split(",")], tiers)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        return None


def voters_of(config: SchedulerConfig) -> list[str]:
    """The plugins that keep a gang out of a cluster without nodes; empty: none does.

    Tiers vote in turn: within one a refusal wins, and the plugin `sla` in an earlier one lets a gang in after a while.
    """
    if "enqueue" not in config.actions:
        return []
    found: list[str] = []
    for tier in config.tiers:
        asked = [plugin["name"] for plugin in tier if plugin.get("enableJobEnqueued", True) is not False]
        found += [name for name in asked if name in VOTERS]
        if "sla" in asked and not found:
            return []
    return found
