"""From the command line to a checked `Run`, without importing torch: a refusal answers in under two seconds."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Collection
from dataclasses import asdict, replace

import yaml
from omegaconf import DictConfig, OmegaConf

from entrypoint import __version__
from entrypoint.checks import check
from entrypoint.conf import Run
from entrypoint.conf.command_line import CommandLine, parse
from entrypoint.conf.keys import fingerprint_keys, flatten
from entrypoint.conf.read import read_run, refuse_unknown
from entrypoint.conf.run_file import compose_run, resolved
from entrypoint.conf.usage import usage
from entrypoint.errors import ConfigError
from entrypoint.storage import is_s3, local_path

__all__ = ["compose", "fingerprint_keys", "flatten", "load", "resolve"]

REQUIRED = ("data.path", "model.path", "output.path")


def load(argv: list[str]) -> Run:
    """The run that `argv` describes: composed, typed, its default paths filled in and checked.

    Warnings go to stderr, of one rank only. `--help`, `--version` and `--cfg job` print and raise SystemExit(0).

    Raises:
        ConfigError: what is wrong, in one line.
    """
    run = resolve(compose(argv))
    warnings = check(run)
    if os.environ.get("RANK", "0") == "0":
        for warning in warnings:
            print(f"entrypoint: warning: {warning}", file=sys.stderr, flush=True)
    return run


def compose(argv: list[str], *, may_lack: Collection[str] = ()) -> Run:
    """The run that `argv` describes, every key and value checked on its own.

    Args:
        argv: Hydra's overrides and the options of `--help`, without the program's name.
        may_lack: required keys that stay "???" where they are not given.

    Raises:
        ConfigError: the first thing that is wrong, in one line.
        SystemExit: after `--help`, `--version` or `--cfg job`.
    """
    line = parse(argv)
    if line.show == "version":
        print(__version__)
        raise SystemExit(0)
    if line.show == "help":
        print(usage(line.method or "grpo"))
        raise SystemExit(0)
    tree, method = compose_run(line.config_dir, line.config_name, line.method)
    _apply(tree, line, method)
    run = read_run(resolved(tree), method, may_lack=REQUIRED if line.show == "cfg" else may_lack)
    if line.show == "cfg":
        print(yaml.safe_dump(asdict(run), sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    return run


def _apply(tree: DictConfig, line: CommandLine, method: str) -> None:
    """Lay the command line's values over the composed tree."""
    for name, value in line.values.items():
        refuse_unknown(name, value, method)
        try:
            OmegaConf.update(tree, name, value, merge=True, force_add=True)
        except Exception as error:  # OmegaConf reads the text of an interpolation when it is set
            reason = " ".join(str(error).splitlines()[:1])
            raise ConfigError(f"{name}: can't be set: {reason}") from None


def resolve(run: Run) -> Run:
    """`run` with the paths and the name that default to parts of others."""
    output = run.output.path
    # No default on S3: checkpoints need a folder that all ranks see, and `check` asks for it.
    checkpoints = run.checkpoint.path or (None if is_s3(output) else os.path.join(output, "checkpoints"))
    prepared = run.data.cache_path or (os.path.join(checkpoints, "prepared") if checkpoints else None)
    models = run.model.cache_path or os.path.join(tempfile.gettempdir(), "models")
    last = output.rstrip("/") if is_s3(output) else str(local_path(output).absolute())
    return replace(
        run,
        data=replace(run.data, cache_path=prepared),
        model=replace(run.model, cache_path=models),
        checkpoint=replace(run.checkpoint, path=checkpoints),
        tracking=replace(run.tracking, run_name=run.tracking.run_name or last.rpartition("/")[2] or "run"),
    )
