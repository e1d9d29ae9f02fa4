"""What can't be used is refused by the program as a whole: code 64, and one line that says why."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import traces
from tests.e2e.runs import TINY_RUN, TWO_RANKS, Ended, Start, run_all
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Place:
    """Where the refused runs find what they can't use."""

    folder: Path
    base: Path
    s3: S3Server

    @property
    def good(self) -> dict[str, str]:
        """Traces and a model that can be used."""
        return {"data.path": str(self.folder / "lake"), "model.path": str(self.base)}

    def traces(self, name: str, rows: list[traces.Row]) -> str:
        return str(traces.write(self.folder / name / "part.parquet", rows).parent)

    def model(self, name: str, spoil: Callable[[Path], None]) -> str:
        """A copy of the base model in which something is wrong."""
        folder = Path(shutil.copytree(self.base, self.folder / name))
        spoil(folder)
        return str(folder)


def on_s3(place: Place, endpoint: str | None = None) -> dict[str, str]:
    return {"data.path": f"s3://{place.s3.bucket()}/lake/", "data.endpoint_url": endpoint or place.s3.endpoint_url}


def unconsented(place: Place) -> dict[str, str]:
    return {"data.path": place.traces("unconsented", [one | {"user_consent": False} for one in traces.learnable(4)])}


def torn(place: Place) -> dict[str, str]:
    path = traces.write(place.folder / "torn" / "half.parquet", traces.learnable())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return {"data.path": str(path.parent)}


def no_template(place: Place) -> dict[str, str]:
    return {"model.path": place.model("no template", lambda folder: (folder / "chat_template.jinja").unlink())}


def pickled(place: Place) -> dict[str, str]:
    def pickle(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    return {"model.path": place.model("pickled", pickle)}


def torn_weights(place: Place) -> dict[str, str]:
    def tear(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    return {"model.path": place.model("torn weights", tear)}


@dataclass(frozen=True)
class Refusal:
    """A run that can't be: keys over the good ones, and a part of the one line."""

    says: str
    keys: Callable[[Place], dict[str, str]]
    env: Callable[[Place], Mapping[str, str]] = lambda place: {}


REFUSALS = {
    "a misspelt key": Refusal(
        "train.learnin_rate: no such key; did you mean train.learning_rate?", lambda _: {"+train.learnin_rate": "1e-5"}
    ),
    "a value function": Refusal(
        "method.vf_coeff: GRPO has no value function; remove it", lambda _: {"method.vf_coeff": "0.1"}
    ),
    "no model": Refusal("model.path: no such folder: ", lambda place: {"model.path": str(place.folder / "nothing")}),
    "pickled weights": Refusal("only pickle weights (pytorch_model.bin); convert them to safetensors", pickled),
    "torn weights": Refusal("model.safetensors: torn: ", torn_weights),
    "no chat template": Refusal("the base model's tokenizer has no chat template", no_template),
    "torn traces": Refusal("half.parquet: torn or not Parquet", torn),
    "no consent": Refusal("no group left to train on: of 16 rows 16 were dropped as 'no consent'", unconsented),
    "no consent, on two processes": Refusal("of 16 rows 16 were dropped", unconsented, lambda _: TWO_RANKS),
    "no credentials": Refusal("no AWS credentials found", on_s3),
    "wrong credentials": Refusal(
        "permission denied to these AWS credentials",
        on_s3,
        lambda place: place.s3.env | {"AWS_SECRET_ACCESS_KEY": "wrong"},
    ),
    "no traces in the bucket": Refusal("lake/: not found ", on_s3, lambda place: place.s3.env),
}
DIVERGES = ("method=grpo", "train.max_steps=20", "checkpoint.save_every=1", "method.max_kl=1e-3")


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, tiny: Path, s3: S3Server) -> dict[str, Ended]:
    place = Place(tmp_path_factory.mktemp("refused"), tiny, s3)
    traces.write_hive(place.folder / "lake", traces.learnable())
    starts = {}
    for number, (name, refusal) in enumerate(REFUSALS.items()):
        keys = place.good | {"train.max_steps": "1"} | refusal.keys(place)
        words = tuple(f"{key}={value}" for key, value in keys.items())
        starts[name] = Start(place.folder / f"run-{number}", words, refusal.env(place))
    words = tuple(f"{key}={value}" for key, value in place.good.items())
    starts["divergence"] = Start(place.folder / "divergence", (*words, *DIVERGES, *TINY_RUN), TWO_RANKS)
    return run_all(starts)


@pytest.mark.parametrize("name", REFUSALS)
def test_is_refused_in_one_line(name: str, refused: dict[str, Ended]) -> None:
    run = refused[name]
    assert run.code == 64, run.err
    assert run.last_word.startswith("entrypoint: ")
    assert REFUSALS[name].says in run.last_word
    said = [line for line in run.err.splitlines() if "entrypoint: " in line and "entrypoint: warning: " not in line]
    assert said == [run.last_word]
    assert "Traceback" not in run.err + run.out
    assert not (run.output / "run.json").exists()


@pytest.mark.parametrize("name", ["no consent", "no consent, on two processes"])
def test_where_no_group_is_left_the_table_says_why(name: str, refused: dict[str, Ended]) -> None:
    lines = [" ".join(line.split()) for line in refused[name].out.splitlines()]
    assert lines.count("dropped: no consent 16 100.0 %") == 1
    assert lines.count("rows 16 100.0 %") == 1


def test_a_run_that_diverges_stops_for_good_and_publishes_nothing(refused: dict[str, Ended]) -> None:
    run = refused["divergence"]
    assert run.code == 64, run.err
    said = [line for line in run.err.splitlines() if "method.max_kl" in line]
    assert len(said) == 1
    assert said == [run.last_word]
    step = max(run.curve("loss")) + 1  # the one that was not logged any more
    assert run.last_word.startswith(f"entrypoint: step {step}: kl is ")
    assert ", above method.max_kl = 0.001: " in run.last_word
    assert "lower train.learning_rate" in run.last_word
    assert "Traceback" not in run.err + run.out
    assert not [*run.output.glob("*.json")]
    assert not [*run.output.glob("*.safetensors")]
