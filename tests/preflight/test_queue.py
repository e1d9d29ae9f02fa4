"""The Queue, asked for over TLS with the pod's own account: a server that answers as the API server does."""

from __future__ import annotations

import itertools
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entrypoint import kubernetes
from entrypoint.preflight import queue
from entrypoint.preflight.__main__ import main
from entrypoint.preflight.queue import read_config, voters_of
from tests.servers.kubernetes import Reply, certificate, kubernetes_api, refusal

QUEUE = "/apis/scheduling.volcano.sh/v1beta1/queues/training"
CONFIG = "/api/v1/namespaces/volcano-system/configmaps/volcano-scheduler-configmap"
STOCK = """
actions: "enqueue, allocate, backfill"
tiers:
- plugins:
  - name: priority
  - name: gang
    enablePreemptable: false
  - name: conformance
- plugins:
  - name: overcommit
  - name: drf
    enablePreemptable: false
  - name: predicates
  - name: proportion
  - name: nodeorder
  - name: binpack
"""

Answers = dict[str, Any]  # path to an object, to (status, object), or to what is called for one


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    """What the server answers; without a token it answers 401, and no such path is no such kind."""
    found: Answers = {CONFIG: refusal(403, "configmaps is forbidden")}

    def handle(method: str, path: str, sent: dict[str, Any]) -> Reply:
        answer = found.get(path, (404, None))
        answer = answer() if callable(answer) else answer
        return answer if isinstance(answer, tuple) else (200, answer)

    account = tmp_path / "serviceaccount"
    with kubernetes_api(account, handle) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(kubernetes, "ACCOUNT", account)
        monkeypatch.setattr(queue, "POLL", 0.01)
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # of the outside world
        yield found


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Preflight of the Queue and the scheduler alone; its code and its last line."""

    def run(*options: str, scheduler: str = "volcano-system/volcano-scheduler-configmap") -> tuple[int, str]:
        deadline = [] if any(option.startswith("--deadline") for option in options) else ["--deadline=20"]
        config = ["--scheduler-config", scheduler] if scheduler else []
        code = main(["--queue", "training", "--checks=", *config, *deadline, *options])
        out, err = capfd.readouterr()
        return code, (err or out).strip().splitlines()[-1]

    return run


Ask = Callable[..., tuple[int, str]]


def test_a_queue_is_waited_for_until_it_is_open(answers: Answers, ask: Ask) -> None:
    """At first it has no state yet, and before that the role that lets it be read is not known yet."""
    early = [refusal(403, "queues is forbidden"), {"metadata": {}}, {"status": {"state": ""}}]
    answers[QUEUE] = lambda: early.pop(0) if early else {"status": {"state": "Open"}}
    code, line = ask()
    assert code == 0
    assert line.startswith("preflight: queue: ok, training is Open after ")
    assert line.endswith("(volcano-system/volcano-scheduler-configmap: 403)")
    assert early == []


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            refusal(404, 'queues "training" not found'),
            "Queue training: there is none; create it, or name one that exists",
        ),
        ((404, None), "Queue training: the cluster has no Queues; install Volcano 1.12 or later"),
        ({"status": {"state": "Closed"}}, "Queue training: is Closed; open it"),
        (
            {"spec": {"capability": {"nvidia.com/gpu": "15"}}, "status": {"state": "Open"}},
            "Queue training: its capability is nvidia.com/gpu: 15, expected at least 16, which the gang asks for",
        ),
        (refusal(418, "no"), "Queue training: the Kubernetes API answers 418 (no)"),
    ],
)
def test_a_queue_that_will_not_open_by_itself_is_refused(answers: Answers, ask: Ask, answer: Any, says: str) -> None:
    answers[QUEUE] = answer
    code, line = ask("--gpus=16")
    assert code == 64
    assert line.startswith(f"entrypoint: preflight: queue: {says}")


def test_a_queue_that_just_holds_the_gang_is_as_good_as_any(answers: Answers, ask: Ask) -> None:
    answers[QUEUE] = {"spec": {"capability": {"nvidia.com/gpu": "16"}}, "status": {"state": "Open"}}
    assert ask("--gpus=16")[0] == 0


def test_a_role_that_is_missing_is_named_after_a_while(
    answers: Answers, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "ROLES_LAG", 0.05)
    answers[QUEUE] = refusal(403, 'User "system:serviceaccount:a:b" cannot get resource "queues"')
    code, line = ask()
    assert code == 64
    assert 'may not read it (User "system:serviceaccount:a:b" cannot get resource "queues"); grant get on' in line


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            {"status": {"state": "Unknown"}},
            "Queue training has state 'Unknown', expected Open; look at Volcano's controller",
        ),
        (refusal(503, "starting"), "the Kubernetes API answers 503 (starting)"),
    ],
)
def test_what_may_still_come_ends_with_75_at_the_deadline(answers: Answers, ask: Ask, answer: Any, says: str) -> None:
    asked = itertools.count(1)

    def again() -> Any:
        if next(asked) == 2:  # the first answer was heard: the deadline may come
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        return answer

    answers[QUEUE] = again
    assert ask("--deadline=60") == (75, f"entrypoint: preflight: queue: not done after 60 s: {says}")


def test_an_api_that_does_not_answer_ends_with_75(answers: Answers, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "9")
    code, line = ask("--deadline=8")
    assert code == 75
    assert "not done after 8 s: the Kubernetes API at https://127.0.0.1:9 can't be reached (" in line


def test_a_server_that_is_not_the_clusters_is_refused(answers: Answers, ask: Ask, tmp_path: Path) -> None:
    other, _ = certificate(tmp_path, "other")
    (tmp_path / "serviceaccount/ca.crt").write_bytes(other.read_bytes())
    code, line = ask()
    assert code == 64
    assert "its certificate is not signed by" in line


def test_a_pod_without_a_token_is_told_what_to_set(answers: Answers, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "serviceaccount/token").unlink()
    code, line = ask()
    assert code == 64
    assert "set automountServiceAccountToken: true" in line
    (tmp_path / "serviceaccount/ca.crt").unlink()
    assert "set automountServiceAccountToken: true" in ask()[1]


def test_outside_a_pod_there_is_no_queue(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert ask() == (
        64,
        "entrypoint: preflight: queue: environment: KUBERNETES_SERVICE_HOST is not set; only a pod can ask its cluster",
    )


# The scheduler's configuration


def test_a_scheduler_that_never_scales_from_zero_is_named_with_what_to_write(answers: Answers, ask: Ask) -> None:
    answers[QUEUE] = {"status": {"state": "Open"}}
    answers[CONFIG] = {"data": {"volcano-scheduler.conf": STOCK}}
    assert ask() == (
        64,
        "entrypoint: preflight: queue: ConfigMap volcano-system/volcano-scheduler-configmap: this Volcano never scales "
        "from zero nodes: the action enqueue asks overcommit, proportion, which refuse a gang that is larger than the "
        'cluster is now; write actions: "allocate, backfill", or enableJobEnqueued: false beside overcommit and '
        "proportion",
    )
    answers["/api/v1/namespaces/ours/configmaps/scheduler"] = {"data": {"volcano-scheduler.conf": STOCK}}
    assert "ConfigMap ours/scheduler: " in ask(scheduler="ours/scheduler")[1]


def test_a_scheduler_that_is_not_named_is_not_asked_for(answers: Answers, ask: Ask) -> None:
    answers[QUEUE] = {"status": {"state": "Open"}}
    answers[CONFIG] = {"data": {"volcano-scheduler.conf": STOCK}}
    code, line = ask(scheduler="")
    assert code == 0
    assert re.fullmatch(r"preflight: queue: ok, training is Open after \d+\.\d s", line)


def test_a_scheduler_that_deals_nodes_out_by_weight_is_warned_of(answers: Answers, ask: Ask) -> None:
    from_zero = STOCK.replace("enqueue, ", "")
    answers[QUEUE] = {"status": {"state": "Open"}}
    answers[CONFIG] = {"data": {"volcano-scheduler.conf": from_zero}}
    assert ask() == (
        0,
        "entrypoint: warning: ConfigMap volcano-system/volcano-scheduler-configmap: with the plugin proportion a run "
        "that waits for nodes can keep another, whose nodes are there and paid for, from starting; write capacity in "
        "its place where several run at once",
    )
    answers[CONFIG] = {"data": {"volcano-scheduler.conf": from_zero.replace("proportion", "capacity")}}
    code, line = ask()
    assert code == 0
    assert line.endswith("; its scheduler can start from zero nodes")


@pytest.mark.parametrize(
    ("old", "new", "voters"),
    [
        ("", "", ["overcommit", "proportion"]),
        ('"enqueue, ', '"', []),
        ("  - name: overcommit", "  - name: overcommit\n    enableJobEnqueued: false", ["proportion"]),
        ("  - name: proportion", "  - name: capacity", ["overcommit", "capacity"]),
        ("  - name: priority", "  - name: sla", []),  # asked in an earlier tier: lets a gang in after its waiting time
        ("  - name: drf", "  - name: sla", ["overcommit", "proportion"]),  # beside those who refuse it has no say
    ],
)
def test_who_keeps_a_gang_out_of_an_empty_cluster(old: str, new: str, voters: list[str]) -> None:
    config = read_config(STOCK.replace(old, new) if old else STOCK)
    assert config is not None
    assert voters_of(config) == voters


@pytest.mark.parametrize(
    ("old", "new"), [("tiers:", "tears:"), ("- plugins:\n  - name: priority", "- plugins\n  - name: priority")]
)
def test_what_the_scheduler_would_not_take_is_not_judged(old: str, new: str) -> None:
    assert read_config(STOCK.replace(old, new)) is None
