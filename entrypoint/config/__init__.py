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
from entrypoint.conf import Run
from entrypoint.config.checks import check, check_data
from entrypoint.config.command_line import CommandLine, parse
from entrypoint.config.keys import fingerprint_keys, flatten, run_key
from entrypoint.config.places import on_first_rank
from entrypoint.config.read import read_run, refuse_unknown
from entrypoint.config.run_file import compose_run, resolved
from entrypoint.config.usage import usage
from entrypoint.config.value import spell
from entrypoint.errors import ConfigError
from entrypoint.launch.rank_process import LAUNCH_VARIABLE
from entrypoint.storage import is_s3, local_path

__all__ = ["compose", "fingerprint_keys", "flatten", "load", "load_data", "resolve", "run_key"]

REQUIRED = ("data.path", "model.path", "output.path")


def load(argv: list[str], *, look: bool = True) -> Run:
    """The run that `argv` describes: composed, typed, its default paths filled in and checked.

    Warnings go to stderr, of one rank only. `--help`, `--version` and `--cfg job` print and raise SystemExit(0).

    Args:
        look: whether folders of this machine are looked at; a pod that has not the trainer's volumes does without.

    Raises:
        ConfigError: what is wrong, in one line.
    """
    run = resolve(compose(argv))
    _warn(check(run, look=look))
    return run


def load_data(argv: list[str]) -> Run:
    """As `load`, for a program that only reads the traces: model.path and output.path may stay "???".

    Raises:
        ConfigError: what is wrong with the keys, or with the `data` group, in one line.
    """
    run = _plain(compose(argv, may_lack=("model.path", "output.path")))
    warnings: list[str] = []
    check_data(run.data, run.method.name, warnings.append)
    _warn(warnings)
    return run


def _warn(warnings: list[str]) -> None:
    if on_first_rank(os.environ) and LAUNCH_VARIABLE not in os.environ:  # the launcher has said it before its ranks
        for warning in warnings:
            print(f"entrypoint: warning: {warning}", file=sys.stderr, flush=True)


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
        print(__version__, flush=True)
        raise SystemExit(0)
    if line.show == "help":
        print(usage(line.method or "grpo"), flush=True)
        raise SystemExit(0)
    tree, method = compose_run(line.config_dir, line.config_name, line.method)
    _apply(tree, line, method)
    run = read_run(resolved(tree), method, may_lack=REQUIRED if line.show == "cfg" else may_lack)
    if line.show == "cfg":
        print(yaml.safe_dump(asdict(run), sort_keys=False, allow_unicode=True), end="", flush=True)
        raise SystemExit(0)
    return run


def _apply(tree: DictConfig, line: CommandLine, method: str) -> None:
    """Lay the command line's values over the composed tree."""
    for name, value in line.values.items():
        refuse_unknown(name, value, method)
        try:
            OmegaConf.update(tree, name, value, merge=True, force_add=True)
        except Exception as error:  # OmegaConf reads the text of an interpolation when it is set
            reason = spell(" ".join(str(error).splitlines()[:1]))
            raise ConfigError(f"{name}: can't be set: {reason}") from None


def resolve(run: Run) -> Run:
    """`run` with file:// addresses as plain paths, and with the paths and the name that default to parts of others."""
    run = _plain(run)
    output = run.output.path
    # No default on S3: checkpoints need a folder that all ranks see, and `check` asks for it.
    checkpoints = run.checkpoint.path or (None if is_s3(output) else os.path.join(output, "checkpoints"))
    prepared = run.data.cache_path or (os.path.join(checkpoints, "prepared") if checkpoints else None)
    models = run.model.cache_path or os.path.join(tempfile.gettempdir(), "models")
    last = output.rstrip("/") if is_s3(output) else os.path.abspath(output)
    return replace(
        run,
        data=replace(run.data, cache_path=prepared),
        model=replace(run.model, cache_path=models),
        checkpoint=replace(run.checkpoint, path=checkpoints),
        tracking=replace(run.tracking, run_name=run.tracking.run_name or last.rpartition("/")[2] or "run"),
    )


def _plain(run: Run) -> Run:
    def plain(address: str) -> str:
        return str(local_path(address)) if address.startswith("file://") else address

    def maybe(address: str | None) -> str | None:
        return plain(address) if address else None

    traces = run.data.path
    return replace(
        run,
        data=replace(
            run.data,
            path=plain(traces) if isinstance(traces, str) else [plain(address) for address in traces],
            cache_path=maybe(run.data.cache_path),
        ),
        model=replace(run.model, path=plain(run.model.path), cache_path=maybe(run.model.cache_path)),
        checkpoint=replace(run.checkpoint, path=maybe(run.checkpoint.path)),
        output=replace(run.output, path=plain(run.output.path)),
    )
