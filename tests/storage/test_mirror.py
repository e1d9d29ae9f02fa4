"""The mirror: all or nothing up there, never in the way of training, and whole when it comes back."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

import entrypoint.checkpoint.mirror
from entrypoint.checkpoint import Checkpoints
from entrypoint.checkpoint.manifest import DamagedError, File, Manifest
from entrypoint.checkpoint.mirror import Mirror
from entrypoint.errors import CheckpointError, StorageDownError
from entrypoint.world import World
from tests.e2e.runs import wait_until
from tests.servers.faults import HOLE, FaultProxy, at_random, every
from tests.servers.s3 import S3Server

FINGERPRINT = {"train.seed": 42, "model": "ab12"}
ENOUGH = 60  # seconds for what takes one


def checkpoint(folder: Path, step: int, size: int = 1000, best: float | None = None) -> Path:
    """A complete checkpoint of two files, their content made from the step."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    files = {}
    for name in ("__0_0.distcp", ".metadata"):
        content = hashlib.sha256(f"{name}{step}".encode()).digest() * (size // 32)
        (path / name).write_bytes(content)
        files[name] = File(len(content), hashlib.sha256(content).hexdigest())
    Manifest(step, FINGERPRINT, best, files).write(path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Place:
    """A mirror's prefix in a bucket, what was warned about, and the local folder."""

    def __init__(self, s3: S3Server, local: Path) -> None:
        self.s3, self.local, self.bucket, self.warnings = s3, local, s3.bucket(), list[str]()
        self.url, self.there = f"s3://{self.bucket}/run-042", s3.root / self.bucket / "run-042"

    def mirror(self, endpoint_url: str | None = None, *, keep: int = 2) -> Mirror:
        return Mirror(self.url, endpoint_url or self.s3.endpoint_url, keep=keep, warn=self.warnings.append)

    def complete(self) -> list[int]:
        return sorted(int(path.parent.name[5:]) for path in self.there.glob("step-*/manifest.json"))


@pytest.fixture
def place(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(entrypoint.checkpoint.mirror, "FIRST_PAUSE", 0.01)
    return Place(s3, tmp_path / "checkpoints")


def test_what_went_up_comes_down_the_same(place: Place, tmp_path: Path) -> None:
    mirror = place.mirror()
    assert mirror.newest(FINGERPRINT) is None
    for step in (100, 200, 300):
        mirror.submit(checkpoint(place.local, step))
        assert mirror.finish(ENOUGH)
    assert place.complete() == [200, 300]  # keep
    assert not (place.there / "step-00000100").exists() or not [*(place.there / "step-00000100").iterdir()]
    again = place.mirror()
    assert again.newest(FINGERPRINT) == 300
    (tmp_path / "other disk").mkdir()
    got = again.fetch(300, tmp_path / "other disk")
    assert contents(got) == contents(place.local / "step-00000300")
    assert [path.name for path in got.parent.iterdir()] == ["step-00000300"]
    assert place.warnings == []


def test_the_best_copy_stays(place: Place) -> None:
    mirror, stay = place.mirror(keep=1), []
    for step, best in ((100, 0.8), (200, 0.9), (300, None), (400, 0.9), (500, 0.1)):
        mirror.submit(checkpoint(place.local, step, best=best))
        assert mirror.finish(ENOUGH)
        stay.append(place.complete())
    assert stay == [[100], [200], [200, 300], [400], [400, 500]]


@pytest.mark.parametrize("seed", range(3))
def test_hundreds_of_faults_lose_nothing(seed: int, place: Place, faults: FaultProxy, tmp_path: Path) -> None:
    """Half of the requests fail, up and down; at no time is there an incomplete checkpoint with a manifest."""
    faults.plan = at_random(seed, 0.5)
    mirror = place.mirror(faults.endpoint_url)
    for step in range(100, 1300, 100):
        mirror.submit(checkpoint(place.local, step, size=1 << 20))
        assert mirror.finish(ENOUGH)
        assert step in place.complete()
        assert len(place.complete()) <= 2
    (tmp_path / "disk").mkdir()
    again = place.mirror(faults.endpoint_url)
    assert again.newest(FINGERPRINT) == 1200
    assert contents(again.fetch(1200, tmp_path / "disk")) == contents(place.local / "step-00001200")
    assert sum(faults.injected.values()) >= 50


def test_an_outage_is_told_once_and_the_newest_goes_up_after_it(
    place: Place, faults: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    mirror = place.mirror(faults.endpoint_url, keep=5)
    faults.plan = every(1, ["503"])
    for step in (100, 200, 300):
        begin = time.monotonic()
        mirror.submit(checkpoint(place.local, step))
        assert time.monotonic() - begin < 10  # training goes on
        assert not mirror.finish(0.3)
    # The copy that is under way now may be an older one's: it ends with its first request, which has two attempts.
    tried = faults.injected["503"]
    wait_until(lambda: faults.injected["503"] > tried + 4)
    faults.plan = None
    assert mirror.finish(ENOUGH)
    assert place.complete() == [300]
    assert [line.split(": ")[0] for line in place.warnings] == [
        "step-00000100 is not in the mirror yet, which is tried again",
        place.url.split(": ")[0],
    ]
    assert "can't be reached" in place.warnings[0]
    assert place.warnings[1].endswith("holds step-00000300; the mirror is up to date again")


def test_a_copy_is_up_there_though_older_ones_cannot_be_removed_now(
    place: Place, faults: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    mirror = place.mirror(faults.endpoint_url, keep=1)
    for step, plan in ((100, None), (200, removing_fails), (300, None)):
        faults.plan = plan
        mirror.submit(checkpoint(place.local, step))
        assert mirror.finish(ENOUGH)
        assert place.complete() == ([100, 200] if plan else [step])
    assert faults.injected["503"] >= 2
    (warning,) = place.warnings
    assert warning.startswith("older checkpoints stay in the mirror: ")


def removing_fails(number: int, method: str, path: str) -> str | None:
    return "503" if method == "DELETE" or path.endswith("?delete") else None


def test_submitting_and_finishing_are_bounded_while_the_line_is_dead(place: Place, faults: FaultProxy) -> None:
    faults.plan = every(1, [HOLE])
    mirror = place.mirror(faults.endpoint_url)
    begin = time.monotonic()
    mirror.submit(checkpoint(place.local, 100))
    assert not mirror.finish(0.5)
    assert time.monotonic() - begin < ENOUGH / 4  # ten attempts of a request would be longer


def test_a_local_folder_that_was_removed_meanwhile_gives_way(place: Place) -> None:
    mirror = place.mirror()
    shutil.rmtree(first := checkpoint(place.local, 100))
    mirror.submit(first)
    assert mirror.finish(ENOUGH)
    mirror.submit(checkpoint(place.local, 200))
    assert mirror.finish(ENOUGH)
    assert place.complete() == [200]
    assert place.warnings == []


def test_what_a_killed_run_left_is_no_checkpoint_and_goes_with_the_next(place: Place, s3: S3Server) -> None:
    """Half a checkpoint without a manifest, and an upload in parts that nobody finishes; others' uploads stay."""
    fs, begun = s3.fs(), {}
    mirror = place.mirror(keep=1)
    mirror.submit(checkpoint(place.local, 100))
    assert mirror.finish(ENOUGH)
    fs.pipe_file(f"{place.url}/step-00000200/__0_0.distcp", b"half")
    for key in ("run-042/step-00000200/.metadata", "run-042-b/step-00000200/.metadata"):
        begun[key] = fs.call_s3("create_multipart_upload", Bucket=place.bucket, Key=key)["UploadId"]
    again = place.mirror(keep=1)
    assert again.newest(FINGERPRINT) == 100
    again.submit(checkpoint(place.local, 300))
    assert again.finish(ENOUGH)
    assert place.complete() == [300]
    assert sorted(fs.find(place.url)) == [
        f"{place.bucket}/run-042/{name}"
        for name in (
            "owner.json",
            *(f"step-00000300/{file}" for file in (".metadata", "__0_0.distcp", "manifest.json")),
        )
    ]
    left = fs.call_s3("list_multipart_uploads", Bucket=place.bucket).get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["run-042-b/step-00000200/.metadata"]


def test_the_last_complete_one_goes_only_after_the_next_is_complete(place: Place, faults: FaultProxy) -> None:
    """The next one's manifest never gets through: the last one stays, whatever keep says."""
    mirror = place.mirror(faults.endpoint_url, keep=1)
    mirror.submit(checkpoint(place.local, 100))
    assert mirror.finish(ENOUGH)
    faults.plan = lambda n, method, path: "503" if method == "PUT" and "manifest" in path else None
    mirror.submit(checkpoint(place.local, 200))
    assert not mirror.finish(1)
    assert place.complete() == [100]
    faults.plan = None
    assert mirror.finish(ENOUGH)
    assert place.complete() == [200]


DAMAGE = {
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_damaged_copy_gives_way_to_the_next_older(damage: str, name: str, place: Place) -> None:
    mirror = place.mirror()
    for step in (100, 200):
        mirror.submit(checkpoint(place.local, step))
        assert mirror.finish(ENOUGH)
    DAMAGE[damage](place.there / "step-00000200" / name)
    shutil.rmtree(place.local)
    place.local.mkdir()
    again = place.mirror()
    if (newest := again.newest(FINGERPRINT)) == 200:
        with pytest.raises(DamagedError, match=name):
            again.fetch(200, place.local)
        newest = again.newest(FINGERPRINT)
    assert newest == 100
    assert contents(again.fetch(100, place.local)) == contents(checkpoint(place.local / "expected", 100))
    if (damage, name) != ("removed", "manifest.json"):  # without one it never was complete
        assert again.damaged() == [f"{place.url}/step-00000200"]
        assert "step-00000200: is damaged" in place.warnings[-1]


def test_a_download_that_is_killed_goes_on_with_what_is_missing(place: Place, faults: FaultProxy) -> None:
    mirror = place.mirror()
    mirror.submit(checkpoint(place.local, 100))
    assert mirror.finish(ENOUGH)
    whole = contents(place.local / "step-00000100")
    shutil.rmtree(place.local)
    place.local.mkdir()
    faults.plan = lambda n, method, path: "503" if method == "GET" and ".metadata" in path else None
    with pytest.raises(StorageDownError):
        place.mirror(faults.endpoint_url).fetch(100, place.local)
    assert not (place.local / "step-00000100").exists()
    asked: list[str] = []
    faults.plan = lambda n, method, path: asked.append(path)
    assert contents(place.mirror(faults.endpoint_url).fetch(100, place.local)) == whole
    assert not [path for path in asked if "distcp" in path]


def test_a_prefix_of_another_run_is_refused_by_the_keys_that_differ(place: Place) -> None:
    place.mirror().newest(FINGERPRINT)
    with pytest.raises(CheckpointError, match=r"another run's mirror, it differs in train.seed \(42 there, 7 here\)"):
        place.mirror().newest({**FINGERPRINT, "train.seed": 7})


def test_a_mirror_that_cannot_be_written_is_refused_and_an_unreachable_one_may_come_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with pytest.raises(StorageDownError, match="can't be reached"):
        place.mirror("http://127.0.0.1:9").newest(FINGERPRINT)
    with pytest.raises(CheckpointError, match="no such bucket"):
        Mirror("s3://no-such-bucket/run", place.s3.endpoint_url, keep=2, warn=print).newest(FINGERPRINT)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(CheckpointError, match="refused the credentials"):
        place.mirror().newest(FINGERPRINT)


@pytest.mark.parametrize("requests", [3, 5, 6, 8])
def test_a_process_killed_in_the_middle_leaves_all_or_nothing(requests: int, place: Place, faults: FaultProxy) -> None:
    """SIGKILL when the given number of requests were made; the next process copies what is missing."""
    first, second = checkpoint(place.local, 100), checkpoint(place.local, 200)
    mirror = place.mirror(keep=1)
    mirror.submit(first)
    assert mirror.finish(ENOUGH)
    faults.plan = lambda n, method, path: HOLE if n >= requests else None
    if not (child := os.fork()):
        doomed = place.mirror(faults.endpoint_url, keep=1)
        doomed.submit(second)
        doomed.finish(ENOUGH)
        os._exit(0)
    deadline = time.monotonic() + ENOUGH
    while faults.injected[HOLE] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert faults.injected[HOLE]
    assert place.complete()
    for step in place.complete():
        Manifest.read(place.there / f"step-{step:08d}").verify(place.there / f"step-{step:08d}")
    again = place.mirror(keep=1)
    again.submit(second)
    assert again.finish(ENOUGH)
    assert place.complete() == [200]


# With the local folder -----------------------------------------------------------------------------------------------


def found(place: Place, mirror: Mirror) -> Path | None:
    """What a start goes on from."""
    place.local.mkdir(exist_ok=True)
    world = World(rank=0, size=1, store=None)
    return Checkpoints(place.local, keep=2, fingerprint=FINGERPRINT, world=world, mirror=mirror).find("auto")


def filled(place: Place, *steps: int) -> None:
    """The mirror holds these steps, and the disk as well."""
    mirror = place.mirror()
    for step in steps:
        mirror.submit(checkpoint(place.local, step))
        assert mirror.finish(ENOUGH)


def flip(path: Path) -> None:
    DAMAGE["flipped"](path / ".metadata")


def test_a_start_with_an_empty_disk_takes_the_newest_whole_copy_and_never_step_0(place: Place) -> None:
    filled(place, 100, 200)
    flip(place.there / "step-00000200")
    shutil.rmtree(place.local)
    assert found(place, place.mirror()) == place.local / "step-00000100"
    shutil.rmtree(place.local)
    flip(place.there / "step-00000100")
    with pytest.raises(CheckpointError, match="no whole checkpoint, and 2 damaged ones are known"):
        found(place, place.mirror())


def test_a_damaged_local_one_is_replaced_by_its_copy(place: Place) -> None:
    filled(place, 100, 200)
    whole = contents(place.local / "step-00000200")
    flip(place.local / "step-00000200")
    assert found(place, place.mirror()) == place.local / "step-00000200"
    assert contents(place.local / "step-00000200") == whole
    assert (place.local / "step-00000200.damaged-1").is_dir()


def test_what_a_killed_run_had_not_copied_yet_is_copied_by_the_next_start(place: Place) -> None:
    filled(place, 100)
    newest = checkpoint(place.local, 200)
    mirror = place.mirror()
    assert found(place, mirror) == newest
    assert mirror.finish(ENOUGH)
    assert place.complete() == [100, 200]


def test_an_unreachable_mirror_holds_up_a_start_only_where_the_disk_is_empty(place: Place, faults: FaultProxy) -> None:
    filled(place, 100)
    faults.plan = every(1, ["503"])
    assert found(place, place.mirror(faults.endpoint_url)) == place.local / "step-00000100"
    shutil.rmtree(place.local)
    with pytest.raises(StorageDownError, match="can't be reached"):
        found(place, place.mirror(faults.endpoint_url))
