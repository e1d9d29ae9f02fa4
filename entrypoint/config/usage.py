"""What `--help` prints and docs/configuration.md holds: every key with its default and its meaning."""

from __future__ import annotations

import textwrap

from entrypoint.conf import METHODS
from entrypoint.config.keys import Key, groups, keys
from entrypoint.config.value import expected, show

USAGE = """\
Tunes a language model on labelled traces, by GRPO or DPO.

  python -m entrypoint method=dpo data.path=/traces model.path=/models/base output.path=/out/run-1
  python -m entrypoint --config-dir /etc/run --config-name run     one YAML file holds the run: /etc/run/run.yaml
  python -m entrypoint … --cfg job                                 print the composed run and stop
  python -m entrypoint.inspect data.path=/traces                   what is in the traces, which method they suit
  python -m entrypoint.schema                                      the run file's JSON Schema

Without WORLD_SIZE it starts LOCAL_WORLD_SIZE ranks (default: one a CUDA device, else 1).
Exit codes: 0 done; 64 the configuration, the data or the run can't be used; 75 stopped early, start again.
"""
INTRODUCTION = """\
# Configuration

Written by `python -m entrypoint.config.usage` from the dataclasses in `entrypoint/conf/`; a test compares.

A run is described by keys, on the command line (`train.batch_size=8`), in one mounted YAML file
(`--config-dir /etc/run --config-name run`), or in both, where the command line wins.

A run file is simply the keys; `method.name` selects the method. It is what `python -m entrypoint.schema` describes and
what `--cfg job` prints:

```yaml
method: {name: dpo, beta: 0.1}
data: {path: s3://lake/labeled-dataset/}
model: {path: /models/base}
output: {path: /checkpoints/run-042}
```

With a defaults list it is Hydra's, and can build on other files of its folder:
`defaults: [base, {override method: dpo}, _self_]`.

- An unknown key is refused, wherever it stands, with the nearest one; so are `hydra.*`, sweeps and `--multirun`.
- A number is written without quotes; an integer may be written 1e6. Text that looks like a number or like yes, no, on
  or off is put in quotes. Nothing is written `null`.
- On the command line a path may hold `=` (`data.path=s3://lake/date=2026-01-01/`); inside a list it is put in quotes.
- `${oc.env:NAME}` is the text of an environment variable, `${oc.decode:${oc.env:NAME}}` its number.
- No key takes a secret: S3 credentials come from the usual AWS chain, MLflow's from its own variables."""


def usage(method: str) -> str:
    """The text of `--help` for a run of `method`."""
    other = next(name for name in METHODS if name != method)
    lines = [USAGE, f"Keys with method={method} (method={other} --help shows the other's):"]
    known = keys(method)
    for group, about in groups(method).items():
        lines.append(f"\n{group}: {about.doc}")
        lines += [_line(key) for name, key in known.items() if name.rpartition(".")[0] == group]
    return "\n".join(lines)


def _line(key: Key) -> str:
    text = f"{key.doc} [{expected(key)}]"
    return (
        f"  {key.name}={_default(key)}\n{textwrap.fill(text, 110, initial_indent=' ' * 6, subsequent_indent=' ' * 6)}"
    )


def markdown() -> str:
    """docs/configuration.md."""
    lines = [INTRODUCTION]
    for group, about in groups("grpo").items():
        lines.append(f"\n## {group}\n\n{about.doc}\n\n| key | default | takes | |\n|---|---|---|---|")
        lines += _rows(group)
    return "\n".join(lines) + "\n"


def _rows(group: str) -> list[str]:
    found: dict[str, dict[str, Key]] = {}
    for method in METHODS:
        for name, key in keys(method).items():
            if name.rpartition(".")[0] == group:
                found.setdefault(name, {})[method] = key
    return [_row(name, versions) for name, versions in found.items()]


def _row(name: str, versions: dict[str, Key]) -> str:
    """One key; where the methods differ in it, or one has it not, each is named."""
    key, *_ = versions.values()
    takes = {method: expected(version) for method, version in versions.items()}
    defaults = {method: _default(version) for method, version in versions.items()}
    return f"| `{name}` | {_each(defaults)} | {_each(takes)} | {key.doc.replace('<', '&lt;')} |"


def _each(words: dict[str, str]) -> str:
    if len(words) == len(METHODS) and len(set(words.values())) == 1:
        return next(iter(words.values()))
    return "; ".join(f"{method.upper()}: {word}" for method, word in words.items())


def _default(key: Key) -> str:
    return "required" if key.required else show(key.default).strip("'")


if __name__ == "__main__":
    print(markdown(), end="")
