"""The gang's watcher against a server that answers as the API server does, and keeps a Job as Volcano does."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from entrypoint import kubernetes
from entrypoint.errors import ConfigError, RunError
from entrypoint.gang import watcher
from entrypoint.gang.__main__ import end, main, parse
from entrypoint.gang.job import VolcanoJob
from entrypoint.gang.watcher import Limits, Watcher, duration
from entrypoint.kubernetes import in_cluster
from tests.servers.kubernetes import Reply, kubernetes_api, refusal

JOB = "/apis/batch.volcano.sh/v1alpha1/namespaces/train/jobs/run"
COMMANDS = "/apis/bus.volcano.sh/v1alpha1/namespaces/train/commands"
EVENTS = "/api/v1/namespaces/train/events"
RECORD = "/api/v1/namespaces/train/configmaps/run-gang"
BEGIN = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()
LIMITS = Limits(wait=1800, rest=900, retries=2)
OWNER = {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "name": "run", "uid": "1", "controller": True}


class World:
    """One Volcano Job by Volcano's rules, and a clock that only the watcher's sleep moves; times are in seconds."""

    def __init__(self) -> None:
        self.time = 0.0
        self.plan: list[tuple[float, Callable[[], None]]] = []
        self.phases: list[tuple[str, float]] = [("Pending", 0.0)]
        self.version = 0
        self.there = True
        self.last = ""  # the Job is deleted a minute after an event of this reason
        self.commands: list[tuple[float, str]] = []
        self.sent: list[dict[str, Any]] = []
        self.events: list[tuple[str, str]] = []
        self.data: dict[str, str] = {}
        self.broken: dict[tuple[str, str], Callable[[], Reply]] = {}  # (method, path) to the answer in its place

    def at(self, time: float, *what: Callable[[], None]) -> None:
        """Have it happen at a time."""
        self.plan += [(time, each) for each in what]

    def phase(self, name: str, *, kill: bool = False) -> Callable[[], None]:
        """The Job comes into a phase, or what is in one changes otherwise; `kill`: its pods are ended."""

        def change() -> None:
            self.version += kill
            self.phases.append((name, self.time))

        return change

    def execute(self, action: str) -> None:
        """What Volcano's controller makes of a Command."""
        now = self.phases[-1][0]
        if now in ("Aborting", "Aborted") and action == "AbortJob":
            self.version += 1
        elif action == "AbortJob" and now != "Restarting":
            self.phase("Aborting", kill=True)()
            self.at(self.time + 3, self.phase("Aborted", kill=True))
            self.at(self.time + 4, lambda: setattr(self, "version", self.version + 1))
        elif action == "ResumeJob" and now == "Aborted":
            self.phase("Restarting", kill=True)()
            self.at(self.time + 3, self.phase("Pending"))

    def sleep(self, seconds: float) -> None:
        """The watcher's sleep; whoever sleeps for a day has missed the end."""
        end = self.time + seconds
        assert end < 86400
        while due := [plan for plan in self.plan if plan[0] <= end]:
            first = min(due, key=lambda plan: plan[0])
            self.plan.remove(first)
            self.time = max(self.time, first[0])
            first[1]()
        self.time = end

    def handle(self, method: str, path: str, sent: dict[str, Any]) -> Reply:
        if (method, path) in self.broken:
            return self.broken[method, path]()
        if (method, path) == ("GET", JOB):
            return (200, self.job()) if self.there else refusal(404, "not found")
        if (method, path) == ("POST", COMMANDS):
            self.commands.append((self.time, sent["action"]))
            self.sent.append(sent)
            self.execute(sent["action"])
            return 201, sent
        if (method, path) == ("POST", EVENTS):
            self.events.append((sent["reason"], sent["message"]))
            if sent["reason"] == self.last:
                self.at(self.time + 60, lambda: setattr(self, "there", False))
            return 201, sent
        if path == RECORD:
            self.data |= sent.get("data", {})
            return 200, {"metadata": {}, "data": self.data}
        return 404, None

    def job(self) -> dict[str, Any]:
        """The Job's object."""

        def stamp(time: float) -> str:
            return datetime.fromtimestamp(BEGIN + time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

        conditions = [{"status": name, "lastTransitionTime": stamp(time)} for name, time in self.phases]
        state = {"phase": self.phases[-1][0], "lastTransitionTime": conditions[-1]["lastTransitionTime"]}
        status = {"state": state, "conditions": conditions, "version": self.version, "pending": 3}
        metadata = {"uid": "1", "creationTimestamp": stamp(0)}
        return {"metadata": metadata, "spec": {"minAvailable": 3}, "status": status}

    @property
    def record(self) -> dict[str, Any]:
        """What the watcher remembers."""
        found: dict[str, Any] = json.loads(self.data["record"])
        return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A gang that waits, and the API server of its cluster."""
    made = World()
    monkeypatch.setattr(kubernetes, "ACCOUNT", tmp_path / "account")
    with kubernetes_api(tmp_path / "account", made.handle) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield made


def watch(world: World, limits: Limits = LIMITS) -> int:
    job = VolcanoJob(in_cluster(), "train", "run", "run-gang")
    return Watcher(job, limits, clock=lambda: BEGIN + world.time, sleep=world.sleep).run()


def watch_until_given_up(world: World, retries: int) -> list[str]:
    """The Commands that were sent until then; the Job is deleted soon afterwards."""
    world.last = "GangGivenUp"
    assert watch(world, Limits(wait=1800, rest=900, retries=retries)) == 0
    assert world.events[-1][0] == "GangGivenUp"
    assert world.phases[-1][0] == "Aborted"
    return [action for _, action in world.commands]


def lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().out.splitlines()


def test_a_gang_that_starts_in_time_is_left_alone(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.at(1795, world.phase("Running"))
    world.at(9000, world.phase("Completed"))
    assert watch(world) == 0
    assert (world.commands, world.events, world.data) == ([], [], {})
    assert lines(capfd) == [
        "gang: waits for all pods to run since 2026-11-25T12:00:00Z, at most 30m; pods: 3 pending, of 3",
        "gang: all pods run",
        "gang: the run has ended, its Job is Completed: nothing is left to watch",
    ]


def test_a_gang_that_does_not_start_is_aborted_and_resumed(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Aborted at 1800 s, at rest from 1803 s on, resumed at the first look after 2703 s; then it starts."""
    world.at(2800, world.phase("Running"))
    world.at(3000, world.phase("Completed"))
    assert watch(world) == 0
    assert world.commands == [(1800, "AbortJob"), (2705, "ResumeJob")]
    command = world.sent[0]
    assert command["target"] == OWNER
    assert command["metadata"] == {"name": "run-gang-abort", "namespace": "train", "ownerReferences": [OWNER]}
    (event,) = world.events
    assert event == (
        "GangTimeout",
        "not all pods ran within 30m (pods: 3 pending, of 3): aborted, its nodes may go; tried again in 15m, 1 of 2",
    )
    assert world.record == {"job": "1", "rounds": 0, "aborted": "", "version": None}  # it has started: nothing counts
    assert lines(capfd)[1:3] == [f"gang: {event[1]}", "gang: resumed after 15m2s, 1 of 2"]


def test_after_the_last_try_it_stays_aborted(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Somebody resumes it at 9000 s: it is watched again, and its tries are counted anew."""
    before: list[str] = []
    world.at(9000, lambda: before.extend(action for _, action in world.commands), lambda: world.execute("ResumeJob"))
    world.at(10820, lambda: setattr(world, "there", False))
    assert watch(world) == 0
    assert before == ["AbortJob", "ResumeJob", "AbortJob", "ResumeJob", "AbortJob"]
    assert world.commands[5:] == [(10805, "AbortJob")]
    assert [reason for reason, _ in world.events] == ["GangTimeout"] * 3 + ["GangGivenUp", "GangTimeout"]
    said, timeout = lines(capfd), "gang: not all pods ran within 30m (pods: 3 pending, of 3): aborted, its nodes may go"
    assert said[-5:-3] == [
        f"{timeout}; it was the last try",
        "gang: given up after 3 tries without a start: it stays aborted, and is watched again once somebody resumes it",
    ]
    assert said[-2] == f"{timeout}; tried again in 15m, 1 of 2"


def test_a_restarted_gang_waits_anew(world: World) -> None:
    """Back in Pending at 5003 s; what changes there, pods being made and marked, is not another wait."""
    world.at(100, world.phase("Running"))
    world.at(5000, world.phase("Restarting", kill=True))
    world.at(5003, world.phase("Pending"))
    world.at(5010, world.phase("Pending"), world.phase("Pending"))
    world.at(6900, world.phase("Failed"))
    assert watch(world) == 0
    assert world.commands == [(6805, "AbortJob")]


@pytest.mark.parametrize("before", ["Pending", "Running"])
def test_what_others_have_aborted_is_never_resumed_but_watched_again(
    world: World, before: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A suspend of a gang that waits, or exit code 64; somebody resumes it at 6000 s."""
    world.at(100, world.phase(before))
    world.at(200, world.phase("Aborting", kill=True), world.phase("Aborted"))
    world.at(6000, lambda: world.execute("ResumeJob"))
    world.at(7810, lambda: setattr(world, "there", False))
    assert watch(world) == 0
    assert world.commands == [(7805, "AbortJob")]
    assert lines(capfd)[-4].startswith("gang: aborted by exit code 64 or by somebody, or given up: it stays")


def test_a_suspend_while_it_rests_keeps_it_aborted(world: World) -> None:
    world.at(2000, lambda: world.execute("AbortJob"))
    world.at(6000, lambda: setattr(world, "there", False))
    assert watch(world) == 0
    assert world.commands == [(1800, "AbortJob")]
    assert [reason for reason, _ in world.events] == ["GangTimeout", "GangStaysAborted"]


def test_exit_code_64_after_a_round_is_not_the_watchers_abort(world: World) -> None:
    world.at(2800, world.phase("Running"))
    world.at(2801, world.phase("Aborting", kill=True), world.phase("Aborted"))
    world.at(6000, lambda: setattr(world, "there", False))
    assert watch(world) == 0
    assert world.commands == [(1800, "AbortJob"), (2705, "ResumeJob")]


@pytest.mark.parametrize("ends", [1802, 1815, 2000, 2706])
def test_a_pod_that_ends_is_followed_by_one_that_goes_on(world: World, ends: float) -> None:
    """Killed while the Job is aborting, at rest, or just resumed: the next one counts on and resumes once."""

    def kill() -> None:
        raise InterruptedError

    world.at(ends, kill)
    with pytest.raises(InterruptedError):
        watch(world, Limits(wait=1800, rest=900, retries=1))
    world.time += 30
    world.sleep(0)
    assert watch_until_given_up(world, retries=1) == ["AbortJob", "ResumeJob", "AbortJob"]
    assert world.commands[1][0] <= 2740


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_pod_that_ends_while_it_sends_the_abort_has_said_before_that_it_is_its_own(
    world: World, carried_out: bool
) -> None:
    """Told to go with the Command on its way: the next one resumes what was aborted, or aborts it itself."""

    def told() -> Reply:
        del world.broken["POST", COMMANDS]
        reply = world.handle("POST", COMMANDS, {"action": "AbortJob"}) if carried_out else refusal(503, "no")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # last: the test goes on at once
        return reply

    world.broken["POST", COMMANDS] = told
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(SystemExit):
            watch(world)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(world.commands) == carried_out
    assert watch_until_given_up(world, retries=1) == ["AbortJob", "ResumeJob", "AbortJob"]
    assert [reason for reason, _ in world.events] == ["GangTimeout"] * (1 if carried_out else 2) + ["GangGivenUp"]


def test_a_gang_that_starts_in_the_moment_of_the_abort_is_resumed(world: World) -> None:
    """Volcano comes to the Command two seconds later, when all pods run."""

    def late() -> Reply:
        del world.broken["POST", COMMANDS]
        world.commands.append((world.time, "AbortJob"))
        world.at(1801, world.phase("Running"))
        world.at(1803, lambda: world.execute("AbortJob"))
        return 201, {"metadata": {}}

    world.broken["POST", COMMANDS] = late
    world.at(2800, world.phase("Running"))
    world.at(3000, world.phase("Completed"))
    assert watch(world) == 0
    assert world.commands == [(1800, "AbortJob"), (2710, "ResumeJob")]
    assert world.record["rounds"] == 0


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_command_whose_answer_is_lost_counts_and_is_sent_again_where_nothing_follows(
    world: World, carried_out: bool
) -> None:
    def lost() -> Reply:
        del world.broken["POST", COMMANDS]
        if carried_out:
            world.execute("AbortJob")
        return refusal(504, "timeout")

    world.broken["POST", COMMANDS] = lost
    watch_until_given_up(world, retries=0)
    assert world.commands == ([] if carried_out else [(1860, "AbortJob")])
    assert [reason for reason, _ in world.events] == ["GangTimeout", "GangGivenUp"]


def test_a_silent_api_server_is_no_reason_to_abort(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Silent from 1000 s to 4000 s; the gang had started meanwhile."""
    world.at(1000, lambda: world.broken.__setitem__(("GET", JOB), lambda: refusal(503, "starting")))
    world.at(1500, world.phase("Running"))
    world.at(4000, world.broken.clear)
    world.at(5000, world.phase("Completed"))
    assert watch(world) == 0
    assert world.commands == []
    said = capfd.readouterr()
    assert said.err == (
        "entrypoint: warning: gang: get the Volcano Job run: the Kubernetes API answers 503 (starting); "
        "nothing is decided meanwhile\n"
    )
    assert "gang: the API server is of use again after 50m" in said.out


def test_an_hour_of_silence_is_another_pods(world: World) -> None:
    world.broken["GET", JOB] = lambda: (200, {"not": "a Job"})
    with pytest.raises(RunError, match="answers 200 without one, for 1h") as caught:
        watch(world)
    assert (caught.value.exit_code, world.time) == (76, 3600)


@pytest.mark.parametrize("broken", [("GET", JOB), ("GET", RECORD), ("POST", COMMANDS)])
def test_a_right_that_is_missing_is_named_after_a_while(world: World, broken: tuple[str, str]) -> None:
    world.broken[broken] = lambda: refusal(403, "forbidden")
    with pytest.raises(ConfigError, match=r"the pod's account may not .* \(forbidden\), for 10m; bind the Role"):
        watch(world)
    assert world.commands == []


def test_an_abort_that_was_denied_is_not_the_watchers(world: World) -> None:
    """Somebody else aborts the Job meanwhile."""
    world.broken["POST", COMMANDS] = lambda: refusal(403, "forbidden")
    world.at(1900, world.phase("Aborting", kill=True), world.phase("Aborted"))
    world.at(1950, world.broken.clear)
    world.at(6000, lambda: setattr(world, "there", False))
    assert watch(world) == 0
    assert (world.commands, world.events) == ([], [])


def test_neither_event_nor_record_holds_a_gang_up(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """The record is saved once that is possible; until then it is known to this pod."""
    world.broken = dict.fromkeys((("POST", EVENTS), ("PATCH", RECORD)), lambda: refusal(403, "forbidden"))
    world.at(2000, world.broken.clear, lambda: world.data.clear())
    assert watch_until_given_up(world, retries=1) == ["AbortJob", "ResumeJob", "AbortJob"]
    assert capfd.readouterr().err.splitlines() == [
        "entrypoint: warning: gang: the pod's account may not patch the ConfigMap run-gang (forbidden): would be "
        "forgotten if this pod ended now",
        "entrypoint: warning: gang: no event GangTimeout: the pod's account may not create an Event (forbidden)",
    ]


def test_a_job_may_come_a_minute_late(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.there = False
    assert watch(world) == 0
    assert world.time == 60
    assert lines(capfd) == ["gang: there is no Job (any more): nothing is left to watch"]


def test_a_record_of_another_job_counts_for_nothing(world: World) -> None:
    world.data = {"record": json.dumps({"job": "0", "rounds": 3, "aborted": "", "version": None})}
    watch_until_given_up(world, retries=0)
    assert world.commands == [(1800, "AbortJob")]


# The command line

OPTIONS = ["--job=train/run", "--record=run-gang", "--wait-timeout", "1h30m", "--retry-after=90s", "--retries=10"]


def test_the_options_are_read() -> None:
    assert parse(OPTIONS) == (("train", "run"), "run-gang", Limits(wait=5400, rest=90, retries=10))
    assert [duration(seconds) for seconds in (5400, 90, 0.2, 7200)] == ["1h30m", "1m30s", "0s", "2h"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (OPTIONS[1:], "--job: got nothing; give it"),
        ([*OPTIONS, "--retries=3"], "once, got --retries=3"),
        ([*OPTIONS, "now"], "once, got now"),
        (["--job=run", *OPTIONS[1:]], "--job: expected NAMESPACE/NAME, got run"),
        ([*OPTIONS[:-1], "--retries=-1"], "--retries: expected a whole number >= 0, got -1"),
        ([*OPTIONS[:-2], "--retry-after=15", "--retries=1"], "--retry-after: expected a time such as 90s"),
    ],
)
def test_a_wrong_option_is_refused(words: list[str], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 64
    assert says in capfd.readouterr().err


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks in quick succession, and this process's own handling of SIGTERM afterwards."""
    monkeypatch.setattr(watcher, "POLL", 0.01)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("quickly")
def test_the_program_ends_with_the_run(world: World) -> None:
    world.phases.append(("Completed", 1.0))
    assert main(OPTIONS) == 0


@pytest.mark.usefixtures("quickly")
def test_a_pod_that_is_told_to_go_has_not_succeeded(world: World) -> None:
    """Its Job would take a 0 for the end, and make no other pod."""
    world.phases.append(("Running", 1.0))

    def told() -> Reply:
        os.kill(os.getpid(), signal.SIGTERM)
        return 200, world.job()

    world.broken["GET", JOB] = told
    with pytest.raises(SystemExit) as caught:
        main(OPTIONS)
    assert caught.value.code == 143
