"""Composing: good runs, and more than a hundred bad ones, each refused in one line that names what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrypoint.conf import Dpo, Grpo, Run
from entrypoint.config import compose, fingerprint_keys, flatten, load, load_data, resolve
from entrypoint.config.checks import check
from entrypoint.config.keys import groups, keys
from entrypoint.config.read import read_run
from entrypoint.config.usage import markdown
from entrypoint.config.value import read_value
from entrypoint.errors import ConfigError
from entrypoint.launch.rank_process import LAUNCH_VARIABLE
from tests.bad_configurations import BAD, PATHS, Bad
from tests.process import ROOT, run_entrypoint, scrubbed

SNAPSHOTS = Path(__file__).parent / "snapshots"
GIVEN = ["data.path=/traces", "model.path=/models/base", "output.path=/out/run-1"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with traces, a base model's folder, a plain folder and a file; nothing in them is ever read."""
    for folder in ("traces", "base", "plain"):
        (tmp_path / folder).mkdir()
    (tmp_path / "traces/day.parquet").touch()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "file").touch()
    return tmp_path


def words(here: Path, *own: str) -> list[str]:
    """`own` and, where they say nothing of it (`-key`: it stays away), the three required keys."""
    places = {"data.path": "traces", "model.path": "base", "output.path": "out"}
    named = {word.lstrip("+-").partition("=")[0] for word in own}
    return [
        *(word for word in own if word not in {f"-{name}" for name in places}),
        *(f"{name}={here / place}" for name, place in places.items() if name not in named),
    ]


def run_file(here: Path, text: str | bytes) -> list[str]:
    """The words that read `text`, mounted as run.yaml."""
    folder = here / "mounted"
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["--config-dir", str(folder), "--config-name", "run"]


def command(case: Bad, here: Path) -> list[str]:
    """The command line of a bad configuration."""
    own = [word.format(here=here) for word in case.words]
    if case.file is None:
        return words(here, *own)
    return own + run_file(here, case.file if isinstance(case.file, bytes) else case.file.format(here=here))


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_a_bad_configuration_is_refused_in_one_line(case: Bad, here: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(command(case, here))
    text = str(refusal.value)
    assert case.says.format(here=here) in text
    assert "\n" not in text
    assert "secret" not in text.replace("secret_key", "")
    assert len(text) < 500


def test_the_table_is_long_and_its_names_are_distinct() -> None:
    assert len(BAD) >= 100
    assert len({(case.name, case.words, case.file) for case in BAD}) == len(BAD)


@pytest.mark.parametrize(
    "own",
    [["+train.learnin_rate=1e-5"], ["method.vf_coeff=0.5"], ["train.batch_size=many"], ["data.path=/nowhere/at/all"]],
    ids=["key", "vf_coeff", "value", "place"],
)
def test_the_program_refuses_with_64_and_one_line(own: list[str], here: Path) -> None:
    done = run_entrypoint(*words(here, *own), cwd=here)
    assert done.returncode == 64
    assert done.stdout == ""
    assert done.stderr.startswith("entrypoint: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_refusal_imports_nothing_heavy(here: Path) -> None:
    program = (
        "import sys; from entrypoint.command import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'duckdb', 's3fs', 'numpy', 'trl'} & set(sys.modules);"
        "sys.exit(f'{code} {sorted(heavy)}')"
    )
    argv = words(here, "data.rejected_threshold=0.9")  # one of the last checks
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], env=scrubbed(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == "64 []"


def test_one_word_selects_the_method_and_its_numbers() -> None:
    """The user's table: 32 groups at 1e-5 for 1000 steps; 32 pairs at 5e-7 for 1 epoch."""
    grpo, dpo = compose(GIVEN), compose(["method=dpo", *GIVEN])
    assert isinstance(grpo.method, Grpo)
    assert (grpo.train.batch_size, grpo.train.learning_rate, grpo.train.max_steps) == (32, 1e-5, 1000)
    assert (grpo.method.kl_coeff, grpo.method.clip_range, grpo.method.loss_type) == (0.1, 0.2, "grpo")
    assert isinstance(dpo.method, Dpo)
    assert (dpo.train.batch_size, dpo.train.learning_rate, dpo.train.max_steps) == (32, 5e-7, None)
    assert (dpo.method.beta, dpo.train.max_length, dpo.train.num_epochs) == (0.1, 4096, 1.0)


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_the_composed_defaults_are_the_committed_ones(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = SNAPSHOTS / f"run-{method}.yaml"
    argv = [f"method={method}", *GIVEN, "--cfg", "job"]
    with pytest.raises(SystemExit) as end:
        compose(argv)
    assert end.value.code == 0
    assert capsys.readouterr().out == snapshot.read_text(), (
        f"the defaults have changed; if that is meant: python -m entrypoint {' '.join(argv)} > "
        f"{snapshot.relative_to(ROOT)}"
    )


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_what_cfg_prints_is_a_run_file(method: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = words(
        here, f"method={method}", "train.learning_rate=3e-6", "tracking.experiment='a: b'", "data.models=[m,n]"
    )
    with pytest.raises(SystemExit):
        compose([*argv, "--cfg", "job"])
    assert compose(run_file(here, capsys.readouterr().out)) == compose(argv)


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("defaults: [base, {{override method: dpo}}, _self_]\n" + PATHS + "train: {{seed: 7}}", []),
        (PATHS + "method: {{name: dpo}}\ntrain: {{seed: 7}}", []),
        (PATHS + "train: {{seed: 7}}", ["method=dpo"]),
        ("defaults: [base, _self_]\n" + PATHS + "train: {{seed: 3}}", ["method=dpo", "train.seed=7"]),
        ("defaults: [base, {{override method: dpo}}]\n" + PATHS + "train: {{seed: 7}}", []),
    ],
    ids=["defaults list", "plain", "plain and a word", "words win", "no _self_"],
)
def test_a_mounted_file_and_the_command_line_say_the_same(text: str, own: list[str], here: Path) -> None:
    composed = compose([*own, *run_file(here, text.format(here=here))])
    assert composed == compose(words(here, "method=dpo", "train.seed=7"))


def test_a_run_file_may_build_on_another(here: Path) -> None:
    (here / "mounted").mkdir()
    (here / "mounted/team.yaml").write_text("defaults: [base, _self_]\ntrain: {batch_size: 8}\n")
    run = compose(run_file(here, "defaults: [team, _self_]\n" + PATHS.format(here=here)))
    assert run.train.batch_size == 8
    (here / "mounted/team.yaml").write_text("defaults: [base, _self_]\ntrain: {batch_siz: 8}\n")
    with pytest.raises(ConfigError, match=r"train.batch_siz: no such key; did you mean train.batch_size\?"):
        compose(run_file(here, "defaults: [team, _self_]\n" + PATHS.format(here=here)))


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("data.path=s3://lake/date=2026-01-01/model=a/", "data.path", "s3://lake/date=2026-01-01/model=a/"),
        ("data.path=[a,'s3://b/date=2026-01-01/*.parquet']", "data.path", ["a", "s3://b/date=2026-01-01/*.parquet"]),
        ("data.path=/traces/**/*.parquet", "data.path", "/traces/**/*.parquet"),
        ("data.path=/traces/day-[0-9].parquet", "data.path", "/traces/day-[0-9].parquet"),
        ("+train.batch_size=1e+06", "train.batch_size", 1_000_000),
        ("train.learning_rate=1", "train.learning_rate", None),
        ("train.max_grad_norm=1", "train.max_grad_norm", 1.0),
        ("train.max_steps=null", "train.max_steps", None),
        ("train.learning_rate=1e-5", "train.learning_rate", 1e-5),
        ("checkpoint.save_every=10m", "checkpoint.save_every", "10m"),
        ("checkpoint.save_every=1e2", "checkpoint.save_every", 100),
        ("tracking.run_name='042'", "tracking.run_name", "042"),
        ("tracking.run_name=${train.lr_scheduler}-x", "tracking.run_name", "linear-x"),
        ("data={models: [a], format: chat}", "data.models", ["a"]),
    ],
)
def test_values_arrive_as_they_are_meant(word: str, key: str, value: object) -> None:
    given_too = [item for item in GIVEN if not word.startswith("data.path") or not item.startswith("data.path")]
    if value is None and key == "train.learning_rate":
        with pytest.raises(ConfigError, match="got 1"):
            compose([word, *given_too])
        return
    got = flatten(compose([word, *given_too]))[key]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("number", ["1e-5", "1.0e-5", "0.00001"])
def test_a_small_number_in_yaml_is_a_number(number: str, here: Path) -> None:
    """YAML 1.1 reads 1e-5, without a dot, as text; Hydra's loader does not, so the user need not know."""
    run = compose(run_file(here, PATHS.format(here=here) + f"train: {{learning_rate: {number}}}"))
    assert run.train.learning_rate == 1e-5


def test_paths_that_default_to_parts_of_others_are_filled_in(here: Path, tmp_path: Path) -> None:
    run = load(words(here))
    assert run.checkpoint.path == f"{here}/out/checkpoints"
    assert run.data.cache_path == f"{here}/out/checkpoints/prepared"
    assert run.model.cache_path
    assert os.path.basename(run.model.cache_path) == "models"
    assert run.tracking.run_name == "out"
    run = load(words(here, "output.path=s3://lake/runs/042/", f"checkpoint.path={tmp_path}/c"))
    assert (run.checkpoint.path, run.tracking.run_name) == (f"{tmp_path}/c", "042")
    assert run.data.cache_path == f"{tmp_path}/c/prepared"
    run = load(words(here, f"data.path=[file://{here}/traces]", f"output.path=file://{here}/a%20b"))
    assert (run.data.path, run.output.path) == ([f"{here}/traces"], f"{here}/a b")
    assert run.checkpoint.path == f"{here}/a b/checkpoints"


def test_a_program_that_only_reads_traces_needs_no_model(here: Path) -> None:
    run = load_data([f"data.path={here}/traces", "method=dpo"])
    assert (run.data.path, run.model.path, run.output.path) == (f"{here}/traces", "???", "???")
    for argv, says in ((["data.path=/none"], "no such file"), ([], "data.path: is required")):
        with pytest.raises(ConfigError, match=says):
            load_data(argv)


WARNINGS = [
    ("not used: no path is on s3://", ["data.endpoint_url=http://minio:9000"]),
    ("takes the contrast out of the groups", ["data.threshold_scope=row"]),
    ("leaves no held-out pair", ["data.rejected_threshold=0"]),
    ("it decides what is chosen", ["data.min_reward_threshold=0.8"]),
    ("DPO has no behaviour policy", ["method=dpo", "data.logprobs_column=a", "data.token_ids_column=b"]),
    ("did not consent", ["data.require_consent=false"]),
    ("nothing is held out", ["data.held_out_share=0"]),
    ("more prompts are held out", ["data.held_out_share=0.6"]),
    ("is the ratio's upper limit", ["method.loss_type=cispo"]),
    ("is not used by loss_type=sapo", ["method.loss_type=sapo", "method.clip_range=0.3"]),
    ("nothing but the clip", ["method.kl_coeff=0"]),
    ("is the sigmoid loss", ["method=dpo", "method.loss_type=robust"]),
    ("has no warm-up", ["train.lr_scheduler=constant_with_warmup"]),
    ("train.max_steps=1000 wins", ["train.num_epochs=3"]),
    ("the last step alone is logged", ["train.max_steps=5"]),
    ("killed without a signal starts from the beginning", ["train.max_steps=50"]),
    ("far above", ["train.learning_rate=0.01"]),
    ("more memory than the budget", ["train.micro_batch_tokens=64"]),
]


@pytest.mark.parametrize(("says", "own"), WARNINGS, ids=[says for says, _ in WARNINGS])
def test_what_is_seldom_meant_is_warned_about(
    says: str, own: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(words(here, *own))
    lines = capsys.readouterr().err.splitlines()
    assert any(says in line for line in lines)
    assert all(line.startswith("entrypoint: warning: ") for line in lines)


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"NODE_RANK": "1"}, {"RANK": "0", LAUNCH_VARIABLE: "x"}])
def test_a_warning_is_given_once_a_run(
    environment: dict[str, str], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    load(words(here, "train.max_steps=5"))
    assert capsys.readouterr().err == ""


def test_the_defaults_warn_about_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(words(here))
    load(words(here, "method=dpo"))
    assert capsys.readouterr().err == ""


def test_traces_are_looked_for_on_the_first_node_only(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    assert load(words(here, "data.path=/only/there")).data.path == "/only/there"


@pytest.mark.parametrize(
    ("data", "output", "inside"),
    [
        ("traces/*.parquet", "traces/out", False),
        ("traces/*", "traces/out", True),
        ("traces/**/*.parquet", "traces/a/b/out", True),
        ("traces", "traces-out", False),
        ("traces/", "link/out", True),
    ],
)
def test_an_output_among_the_traces_is_seen(data: str, output: str, inside: bool, here: Path) -> None:
    (here / "link").symlink_to(here / "traces")
    argv = words(here, f"data.path={here}/{data}", f"output.path={here}/{output}")
    if inside:
        with pytest.raises(ConfigError, match=r"is inside data\.path"):
            load(argv)
    else:
        load(argv)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["method=dpo", "-h"], ["--version"]):
        with pytest.raises(SystemExit) as end:
            load(argv)
        assert end.value.code == 0
    printed = capsys.readouterr().out
    for method in ("grpo", "dpo"):
        for key in keys(method).values():
            assert f"  {key.name}=" in printed


def test_the_documentation_is_the_generated_one() -> None:
    page = ROOT / "docs/configuration.md"
    assert page.read_text() == markdown(), f"python -m entrypoint.config.usage > {page.relative_to(ROOT)}"


def test_what_makes_a_run_this_run() -> None:
    """Everything but where things go, what is written down and what fits into memory."""
    run = compose(GIVEN)
    free = set(flatten(run)) - set(fingerprint_keys(run))
    assert free == {
        "checkpoint.path", "checkpoint.save_every", "checkpoint.keep", "checkpoint.resume",
        "checkpoint.mirror", "checkpoint.grace_seconds", "checkpoint.hold_seconds", "checkpoint.max_crashes",
        "output.path", "output.iteration",
        "tracking.mlflow_uri", "tracking.experiment", "tracking.run_name", "tracking.registered_model",
        "data.cache_path", "data.endpoint_url", "model.cache_path",
        "train.collective_timeout", "train.eval_pairs", "train.eval_steps", "train.gradient_checkpointing",
        "train.logging_steps", "train.micro_batch_tokens", "train.share_prompts", "train.sharding",
    }  # fmt: skip
    assert fingerprint_keys(run)["method.kl_coeff"] == 0.1
    assert fingerprint_keys(run)["model.lora.rank"] == 16


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_every_key_says_what_it_does_and_has_a_default_that_it_accepts(method: str) -> None:
    for key in keys(method).values():
        assert len(key.doc) > 10
        assert key.doc.endswith(".")
        assert key.required or read_value(key, key.default) == key.default


NAMES = sorted({*keys("grpo"), *keys("dpo"), *groups("grpo")})
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


@st.composite
def mutated_names(draw: st.DrawFn) -> str:
    """A key, or one with a character cut out, put in or exchanged."""
    name = draw(st.sampled_from(NAMES))
    at = draw(st.integers(0, len(name)))
    return (
        name[:at]
        + draw(st.sampled_from(["", "x", ".", "_", "é", "[0]", "${", " "]))
        + name[at + draw(st.integers(0, 2)) :]
    )


def run_or_refusal(read: Callable[[list[str]], Run], argv: list[str]) -> None:
    """Anything but a run or a one-line refusal is an error of ours."""
    refusal = ""
    try:
        assert isinstance(read(argv), Run)
    except ConfigError as error:
        refusal = str(error)
    assert len(refusal.splitlines()) <= 1
    assert len(refusal) < 900


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["", "+", "++", "~"]),
    mutated_names(),
    st.one_of(TEXT, SCALARS.map(repr), st.sampled_from(["${x}", "[", "{a:", "'", "a,b"])),
)
def test_any_word_is_a_run_or_a_refusal(sign: str, name: str, value: str) -> None:  # fmt: skip
    run_or_refusal(compose, [f"{sign}{name}={value}", *(item for item in GIVEN if not item.startswith(f"{name}="))])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["defaults", *groups("grpo")]) | mutated_names(), TREES, max_size=4))
def test_any_yaml_is_a_run_or_a_refusal(here: Path, tree: dict[str, object]) -> None:
    run_or_refusal(compose, run_file(here, yaml.safe_dump(tree, allow_unicode=True)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.text(st.sampled_from("{}[]:,-'\"$#&*!|>%@ \n\tab1.~"), max_size=30).map(str.encode))
def test_any_bytes_are_a_run_or_a_refusal(here: Path, content: bytes) -> None:
    run_or_refusal(compose, run_file(here, content))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(keys("dpo"))), SCALARS | st.lists(SCALARS, max_size=2))
def test_any_value_of_a_key_is_a_run_or_a_refusal(here: Path, name: str, value: object) -> None:
    """With the checks between keys, which open no connection whatever the value is."""
    places = {"data": {"path": f"{here}/traces"}, "model": {"path": f"{here}/base"}, "output": {"path": f"{here}/out"}}
    tree: dict[str, Mapping[str, object]] = {"method": {"name": "dpo"}, **places}
    group, *middle, leaf = name.split(".")
    tree[group] = {**tree.get(group, {}), **({middle[0]: {leaf: value}} if middle else {leaf: value})}

    def checked(_: list[str]) -> Run:
        run = resolve(read_run(tree, "dpo"))
        check(run)
        return run

    run_or_refusal(checked, [])


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job", "data.path=d", "model.path=m", "output.path=o"]])
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]) -> None:
    """As `… --help | head -1`: the pipe is closed before anything is printed."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "entrypoint", *words], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
