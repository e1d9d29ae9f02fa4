"""What `--help` prints: the program in a few lines, then every key with its default and its meaning."""

from __future__ import annotations

import textwrap

from entrypoint.conf import METHODS
from entrypoint.conf.keys import Key, groups, keys
from entrypoint.conf.value import expected, show

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


def usage(method: str) -> str:
    """The text of `--help` for a run of `method`."""
    other = next(name for name in METHODS if name != method)
    lines = [USAGE, f"Keys with method={method} (method={other} --help shows the other's):"]
    known = keys(method)
    for group in groups(method):
        lines.append(f"\n{group}")
        lines += [_line(key) for name, key in known.items() if name.rpartition(".")[0] == group]
    return "\n".join(lines)


def _line(key: Key) -> str:
    default = "required" if key.required else show(key.default).strip("'")
    text = f"{key.doc} [{expected(key)}]"
    first = f"  {key.name}={default}"
    return f"{first}\n{textwrap.fill(text, 110, initial_indent=' ' * 6, subsequent_indent=' ' * 6)}"
