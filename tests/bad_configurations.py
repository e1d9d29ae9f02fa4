"""Configurations that must be refused, and what the refusal's one line must hold.

`{here}` is a folder with `traces/day.parquet`, a model's folder `base`, a plain folder `plain` and a file `file`.
Where a case gives no run file, `data.path`, `model.path` and `output.path` are given on the command line, unless its
own overrides give or drop (`-data.path`) them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bad:
    """A case: words of the command line or the text of `run.yaml`, and a part of the refusal."""

    name: str
    says: str
    words: tuple[str, ...] = ()
    file: str | bytes | None = None


def line(name: str, says: str, *words: str) -> Bad:
    """A case of the command line."""
    return Bad(name, says, words)


PATHS = "data: {{path: {here}/traces}}\nmodel: {{path: {here}/base}}\noutput: {{path: {here}/out}}\n"

KEYS = [
    line("misspelt", "train.learnin_rate: no such key; did you mean train.learning_rate?", "train.learnin_rate=1e-5"),
    line("behind +", "train.learnin_rate: no such key; did you mean train.learning_rate?", "+train.learnin_rate=1e-5"),
    line("behind ++", "train.bach_size: no such key; did you mean train.batch_size?", "++train.bach_size=8"),
    line("behind ~", "train.sed: no such key; did you mean train.seed?", "~train.sed"),
    line("removed", "'~train.seed': a key can't be removed", "~train.seed"),
    line("group", "methd: no such key; did you mean method?", "methd=dpo"),
    line("new group", "optimizer.lr: no such key; did you mean train.learning_rate?", "+optimizer.lr=1"),
    line("no group", "batch_size: no such key; did you mean train.batch_size?", "batch_size=8"),
    line("wrong group", "train.keep: no such key; did you mean checkpoint.keep?", "train.keep=3"),
    line("nested", "model.lora.rnk: no such key; did you mean model.lora.rank?", "model.lora.rnk=8"),
    line("below a key", "train.seed.x: no such key; did you mean train.seed?", "+train.seed.x=1"),
    line("in a dict", "data.pth: no such key; did you mean data.path?", "+data={{pth: x}}"),
    line("other name", "train.num_iterations: no such key; did you mean train.max_steps?", "train.num_iterations=9"),
    line("vf_coeff", "method.vf_coeff: GRPO has no value function; remove it", "method.vf_coeff=0.5"),
    line("vf_coeff behind +", "method.vf_coeff: GRPO has no value function; remove it", "+method.vf_coeff=0.5"),
    line("DPO's key", "method.beta: no such key of method=grpo; did you mean method.kl_coeff?", "method.beta=0.1"),
    line("GRPO's key", "method.clip_range: no such key of method=dpo", "method=dpo", "method.clip_range=0.2"),
    line("secret", "model.secret_key: no such key; credentials come from the usual AWS chain", "model.secret_key=x"),
    line("remote code", "model.trust_remote_code: no such key; code that comes", "model.trust_remote_code=true"),
    line("hydra", "hydra.run.dir: Hydra's own settings have no effect here", "hydra.run.dir=/x"),
    line("package", "'method@train=dpo': groups stay where they are", "method@train=dpo"),
]
WORDS = [
    line("method", "method: expected one of grpo, dpo, got 'ppo'", "method=ppo"),
    line("method twice", "method: is given twice", "method=dpo", "method=grpo"),
    line("key twice", "train.seed: is given twice on the command line, as 1 and 2", "train.seed=1", "train.seed=2"),
    line("train group", "train: its numbers follow the method; select that instead: method=dpo", "train=dpo"),
    line("group's value", "checkpoint: expected keys, such as checkpoint.path, got 'auto'", "checkpoint=auto"),
    line("group null", "checkpoint: holds nothing; give keys below it", "checkpoint=null"),
    line(
        "save 0",
        "checkpoint.save_every: expected an integer >= 1 or minutes, such as 10m, got 0",
        "checkpoint.save_every=0",
    ),
    line("save s", "or minutes, such as 10m, got '90s'", "checkpoint.save_every=90s"),
    line("save 0m", "or minutes, such as 10m, got '0m'", "checkpoint.save_every=0m"),
    line("grammar", "train.seed: 'train.seed=[1' can't be read", "train.seed=[1"),
    line("no value", "'train.seed': expected key=value", "train.seed"),
    line("no key", "'=3': expected key=value", "=3"),
    line("sweep", "train.seed: expected one value, got '1,2'; a list is written [a,b]", "train.seed=1,2"),
    line("choice sweep", "train.seed: expected one value", "train.seed=choice(1,2)"),
    line("multirun", "-m: one command is one run", "-m"),
    line("dashes", "'--train.seed=3': keys are written without dashes: train.seed=", "--train.seed=3"),
    line("option", "'--resume': no such option", "--resume"),
    line("interpolation", "train.seed: Interpolation key 'nope' not found", "train.seed=${{nope}}"),
    line("circle", "train.seed: Recursive interpolation", "train.seed=${{train.seed}}"),
    line("environment", "Environment variable 'SURELY_NOT_SET' not found", "train.seed=${{oc.env:SURELY_NOT_SET}}"),
    line("dir alone", "--config-dir: needs --config-name too", "--config-dir", "{here}"),
    line("name alone", "--config-name: needs --config-dir too", "--config-name", "run"),
    line("no dir", "--config-dir: no such folder: {here}/nowhere", "--config-dir={here}/nowhere", "--config-name=run"),
    line("no name", "--config-name: no rum.yaml in {here}; it has ", "--config-dir={here}", "--config-name=rum"),
]
VALUES = [
    line("text for int", "train.batch_size: expected an integer >= 1, got 'many'", "train.batch_size=many"),
    line("behind + too", "train.batch_size: expected an integer >= 1, got 'many'", "+train.batch_size=many"),
    line("too small", "train.batch_size: expected an integer >= 1, got 0", "train.batch_size=0"),
    line("half", "train.batch_size: expected an integer >= 1, got 1.5", "train.batch_size=1.5"),
    line(
        "huge",
        "train.batch_size: expected an integer >= 1, got 99999999999; the most is",
        "train.batch_size=99999999999",
    ),
    line("bool for int", "train.seed: expected an integer >= 0 and <= 4294967295, got true", "train.seed=true"),
    line("bool for float", "train.learning_rate: expected a number > 0 and < 1, got true", "train.learning_rate=true"),
    line("nan", "train.learning_rate: expected a number > 0 and < 1, got nan", "train.learning_rate=nan"),
    line("inf", "train.num_epochs: expected a number > 0, got inf", "train.num_epochs=inf"),
    line("exclusive bound", "train.learning_rate: expected a number > 0 and < 1, got 0", "train.learning_rate=0"),
    line("lost minus", "train.learning_rate: expected a number > 0 and < 1, got 100000.0", "train.learning_rate=1e5"),
    line(
        "quoted", "train.learning_rate: expected a number > 0 and < 1, got '1e-5'; remove", "train.learning_rate='1e-5'"
    ),
    line("choice", "got 'sigmod'; did you mean sigmoid?", "method=dpo", "method.loss_type=sigmod"),
    line("refused loss", "got 'aot'; it needs the whole batch at once", "method=dpo", "method.loss_type=aot"),
    line("refused option", "it needs the whole batch at once", "method.entropy_coef=0.1"),
    line("bool", "data.require_consent: expected true or false, got 'yes'", "data.require_consent=yes"),
    line("bool 2", "data.require_consent: expected true or false, got 2", "data.require_consent=2"),
    line(
        "number for text", "tracking.run_name: expected text or null, got 42; put it in quotes", "tracking.run_name=42"
    ),
    line("bool for text", "data.reward_column: expected text, got true; put it in quotes", "data.reward_column=true"),
    line("null", "data.reward_column: expected text, got null", "data.reward_column=null"),
    line("None", "checkpoint.path: expected text or null, got 'None'; write null", "checkpoint.path=None"),
    line("empty", "data.reward_column: expected text, got ''", "data.reward_column="),
    line(
        "line break",
        "tracking.experiment: expected text, got 'a\\nb'; remove the line break",
        "tracking.experiment=a\nb",
    ),
    line("no list", "data.models: expected a list of text, such as [a, b], got 'a'", "data.models=a"),
    line("missing data", "data.path: is required; give a file, folder, glob or s3://", "-data.path"),
    line("missing model", "model.path: is required; give the base model's folder", "-model.path"),
    line("missing output", "output.path: is required; give the folder", "-output.path"),
    line("null data", "data.path: is required", "data.path=null"),
    line("empty list", "data.path: expected a path or a list of paths, got []; give at least one", "data.path=[]"),
    line(
        "list of numbers", "data.path: expected a path or a list of paths, got 7; put it in quotes", "data.path=[a,7]"
    ),
]
PLACES = [
    line("secret, bad port", "data.endpoint_url: holds credentials", "data.endpoint_url=http://me:secret@minio:nine"),
    line(
        "secret twice", "is given twice", "data.endpoint_url=http://a:secret@b", "data.endpoint_url=http://c:secret@d"
    ),
    line("no traces", "data.path: no such file or folder: '{here}/none'", "data.path={here}/none"),
    line("no match", "data.path: no file matches '{here}/traces/*.csv'", "data.path={here}/traces/*.csv"),
    line("one of two", "data.path: no such file or folder: '{here}/none'", "data.path=[{here}/traces,{here}/none]"),
    line(
        "http traces", "data.path: expected a local path or s3://bucket/…, got 'https://x/y'", "data.path=https://x/y"
    ),
    line("no bucket", "data.path: expected s3://bucket/…, got 's3:///key'", "data.path=s3:///key"),
    line("one slash", "model.path: expected s3://bucket/…, got 's3:/lake/m'", "model.path=s3:/lake/m"),
    line("secret in path", "data.path: holds credentials; remove them", "data.path=s3://AKIA:secret@lake/x"),
    line("secret in URL", "data.endpoint_url: holds credentials", "data.endpoint_url=http://me:secret@minio:9000"),
    line(
        "endpoint",
        "data.endpoint_url: expected http(s)://host[:port], got 'minio:9000'",
        "data.endpoint_url=minio:9000",
    ),
    line("port", "data.endpoint_url: expected http(s)://host[:port]", "data.endpoint_url=http://minio:nine"),
    line(
        "bucket in URL", "data.endpoint_url: expected http(s)://host[:port] and", "data.endpoint_url=http://m:9000/lake"
    ),
    line("mlflow", "tracking.mlflow_uri: expected http(s)://host[:port], got 'file:/x'", "tracking.mlflow_uri=file:/x"),
    line("registered name", "tracking.registered_model: MLflow allows no /", "tracking.registered_model=team/model"),
    line(
        "hub name",
        "model.path: no such folder: 'org/model'; nothing is fetched from a model hub",
        "model.path=org/model",
    ),
    line("model file", "model.path: expected a folder in Hugging Face's layout", "model.path={here}/file"),
    line("no config.json", "model.path: no config.json in '{here}/plain'", "model.path={here}/plain"),
    line("home", "output.path: `~` is not expanded here", "output.path=~/out"),
    line(
        "output is a file", "output.path: expected a folder, but '{here}/file' is a file", "output.path={here}/file/out"
    ),
    line("output in traces", "output.path: {here}/traces/out is inside data.path", "output.path={here}/traces/out"),
    line("output is base", "output.path: {here}/base is inside model.path", "output.path={here}/base"),
    line("output by glob", "is inside data.path={here}/*", "data.path={here}/*", "output.path={here}/traces"),
    line("cache in traces", "data.cache_path: {here}/traces/c is inside", "data.cache_path={here}/traces/c"),
    line("checkpoints on S3", "checkpoint.path: expected a folder that all ranks see", "checkpoint.path=s3://lake/c"),
    line("mirror on disk", "checkpoint.mirror: expected s3://bucket/prefix", "checkpoint.mirror={here}/mirror"),
    line("mirror is a bucket", "checkpoint.mirror: expected s3://bucket/prefix", "checkpoint.mirror=s3://lake/"),
    line(
        "mirror in the output",
        "checkpoint.mirror: s3://lake/out/c and output.path=s3://lake/out lie in each other",
        *("checkpoint.mirror=s3://lake/out/c", "output.path=s3://lake/out", "checkpoint.path={here}/c"),
    ),
    line(
        "output in the mirror",
        "checkpoint.mirror: s3://lake/c and output.path=s3://lake/c/out lie in each other",
        *("checkpoint.mirror=s3://lake/c", "output.path=s3://lake/c/out", "checkpoint.path={here}/c"),
    ),
    line(
        "mirror in the traces",
        "checkpoint.mirror: s3://lake/t/c is inside data.path=s3://lake/t",
        *("checkpoint.mirror=s3://lake/t/c", "data.path=s3://lake/t"),
    ),
    line("no checkpoints", "checkpoint.path: is required where output.path is on S3", "output.path=s3://lake/out"),
    line("same folder", "checkpoint.path: is the same as output.path", "checkpoint.path={here}/out"),
    line("model cache on S3", "model.cache_path: expected a folder that each node has", "model.cache_path=s3://lake/c"),
]
BETWEEN = [
    line(
        "thresholds", "data.rejected_threshold: 0.8 is above data.chosen_threshold=0.7", "data.rejected_threshold=0.8"
    ),
    line("nothing above 1", "data.min_reward_threshold: no reward is above 1.0", "data.min_reward_threshold=1"),
    line("nothing below 0", "0.0 leaves no rejected response", "method=dpo", "data.rejected_threshold=0"),
    line("rows dropped", "0.5 leaves no rejected response", "method=dpo", "data.threshold_scope=row"),
    line("no day", "data.date_from: expected a day, YYYY-MM-DD, got '2026-13-01'", "data.date_from=2026-13-01"),
    line("short day", "data.date_to: expected a day, YYYY-MM-DD, got '1/2/2026'", "data.date_to=1/2/2026"),
    line("day order", "is after data.date_to=2026-01-01", "data.date_from=2026-01-02", "data.date_to=2026-01-01"),
    line("reward column", "data.reward_column: 'output' holds no reward", "data.reward_column=output"),
    line("half a pair", "data.token_ids_column: is required with data.logprobs_column", "data.logprobs_column=lp"),
    line("other half", "data.logprobs_column: is required with data.token_ids_column", "data.token_ids_column=ids"),
    line("same column", "is the same column", "data.logprobs_column=lp", "data.token_ids_column=lp"),
    line("behaviour", "data.behaviour_model: 'b' is not among", "data.models=[a]", "data.behaviour_model=b"),
    line("exo_pair", "loss_type=exo_pair needs more than 0", "method=dpo", "method.loss_type=exo_pair"),
    line("smoothing", "loss_type=sigmoid does not use it", "method=dpo", "method.label_smoothing=0.1"),
    line("clip", "method.clip_range: expected a number > 0 and < 1, got 5.0", "method.clip_range=5"),
    line(
        "warm-up",
        "train.warmup_ratio: lr_scheduler=constant has no",
        "train.warmup_ratio=0.1",
        "train.lr_scheduler=constant",
    ),
]
DPO_LIST = "defaults: [base, {{override method: dpo}}, _self_]\n"


def mounted(name: str, says: str, text: str | bytes, *words: str) -> Bad:
    """A case of the mounted run.yaml."""
    return Bad(name, says, words, text)


def under(defaults: str, rest: str = "") -> str:
    """A run file with a defaults list, the three required keys and `rest`."""
    return f"defaults: {defaults}\n{PATHS}{rest}"


FILES = [
    mounted("key", "train.lerning_rate: no such key; did you mean train.learning_rate?", "train: {{lerning_rate: 1}}"),
    mounted("key under list", "train.sed: no such key; did you mean train.seed?", under("[base]", "train: {{sed: 1}}")),
    mounted("group", "trian: no such key; did you mean train?", PATHS + "trian: {{seed: 1}}"),
    mounted("value", "train.batch_size: expected an integer >= 1, got 'x'", PATHS + "train: {{batch_size: x}}"),
    mounted("yes as text", "data.reward_column: expected text, got true", "data: {{path: x, reward_column: yes}}"),
    mounted("empty group", "train: holds nothing; give keys below it", PATHS + "train:\n"),
    mounted("key of a number", "1: no such key", PATHS + "1: 2\n"),
    mounted("empty file", "data.path: is required", ""),
    mounted("a list", "run.yaml: expected keys such as `data:`", "- a\n- b\n"),
    mounted("a word", "hello: no such key", "hello"),
    mounted("syntax", "run.yaml: line 1, column 16: expected ',' or ']', but got", "data: {{path: [a}}\n"),
    mounted("tab", "run.yaml: line 2, column 1: found character '\\t'", "train:\n\tseed: 1\n"),
    mounted("twice", "line 2, column 1: found duplicate key train", "train: {{seed: 1}}\ntrain: {{seed: 2}}\n"),
    mounted("latin-1", "run.yaml: is not UTF-8 text", "tracking: {experiment: é}".encode("latin-1")),
    mounted("two documents", "run.yaml: line 2, column 1: ", "a: 1\n---\nb: 2\n"),
    mounted("hydra", "run.yaml: hydra: Hydra's own settings", PATHS + "hydra: {{run: {{dir: x}}}}\n"),
    mounted("interpolation", "tracking.experiment: Interpolation key 'no'", "tracking: {{experiment: '${{no}}'}}"),
    mounted("method word", "method: write `method: {{name: dpo}}` in a file", PATHS + "method: dpo\n"),
    mounted("method name", "method.name: expected one of grpo, dpo, got 'ppo'", PATHS + "method: {{name: ppo}}\n"),
    mounted("word against file", "'grpo', but the command line", PATHS + "method: {{name: grpo}}\n", "method=dpo"),
    mounted("name against list", "'dpo', but the defaults list", under("[base]", "method: {{name: dpo}}\n")),
    mounted("no base", "`base` is not in the list", under("[_self_]")),
    mounted("no such base", "run.yaml: defaults: no file or group named bass", under("[bass, _self_]")),
    mounted("no such method", "no file or group named method/ppo; there are dpo, grpo", DPO_LIST.replace("dpo", "ppo")),
    mounted("not overridden", "run.yaml: Multiple values for method", under("[base, {{method: dpo}}, _self_]")),
    mounted("train overridden", "train follows the method", under("[base, {{override train: dpo}}, _self_]")),
    mounted("self first", "`_self_` before `base` undoes what this file says", under("[_self_, base]")),
    mounted("no list", "defaults: expected a list, got 'base'", under("base")),
    mounted("number in list", "run.yaml: ", under("[base, 3, _self_]")),
]

BAD = [*KEYS, *WORDS, *VALUES, *PLACES, *BETWEEN, *FILES]
