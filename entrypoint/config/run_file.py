"""Composing with Hydra: the mounted run file, where there is one, over the groups' defaults.

A run file with a defaults list is Hydra's: `defaults: [base, {override method: dpo}, _self_]`. One without is simply
the keys, as the JSON Schema describes them, and `method.name` selects the method.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict

from entrypoint.conf import METHODS, register
from entrypoint.config.value import SHOWN, show, spell
from entrypoint.errors import ConfigError

EXAMPLE = "defaults: [base, {override method: dpo}, _self_]"
PLAIN = "plain_run_file"  # name in Hydra's store of a run file that has no defaults list


def compose_run(config_dir: str | None, config_name: str | None, method: str | None) -> tuple[DictConfig, str]:
    """The composed tree, interpolations not resolved, and the name of its method.

    Args:
        config_dir, config_name: folder and name of the run file; both None: the defaults alone.
        method: what the command line selects; None leaves it to the file.

    Raises:
        ConfigError: a file that is not there or can't be read, or a defaults list that does not make a run.
    """
    register()
    name = "base"
    path: Path | None = None
    if config_dir and config_name:
        path = _find(config_dir, config_name)
        content = _load(path)
        name = path.stem
        if "defaults" in content:
            _check_defaults(path, content["defaults"])
        else:
            method = method or _method_of(path, content)
            name = PLAIN
            defaults = ["base", {"override method": method}, "_self_"]
            ConfigStore.instance().store(name=PLAIN, node={"defaults": defaults, **content})
    tree, chosen = _compose(path, name, method)
    written = OmegaConf.select(tree, "method.name", default=chosen) if isinstance(tree.method, DictConfig) else chosen
    if written != chosen:
        selected = "the command line" if name == PLAIN else f"the defaults list ({EXAMPLE})"
        raise _bad(path, f"method.name is {show(written)}, but {selected} selects {chosen}")
    return tree, chosen


def _bad(path: Path | None, problem: str) -> ConfigError:
    return ConfigError(f"{spell(str(path))}: {problem}" if path else problem)


def _find(config_dir: str, config_name: str) -> Path:
    folder = Path(config_dir).absolute()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir: no such folder: {spell(config_dir)}")
    path = folder / f"{config_name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(item.name for item in folder.glob("*.y*ml"))) or "no YAML file"
        raise ConfigError(f"--config-name: no {spell(path.name)} in {spell(config_dir)}; it has {spell(there)}")
    if (folder / "base.yaml").exists():
        raise _bad(folder / "base.yaml", "this name is taken by the run's own defaults; rename the file")
    return path


def _load(path: Path) -> dict[Any, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # PyYAML and OmegaConf have no common base for what a bad file makes them raise
        raise _bad(path, f"{_explain(error)}") from None
    if not isinstance(content, dict):
        raise _bad(path, "expected keys such as `data:` and `model:`, got a list")
    if "hydra" in content:
        raise _bad(path, "hydra: Hydra's own settings have no effect here; remove it")
    return content


def _check_defaults(path: Path, defaults: Any) -> None:
    if not isinstance(defaults, list):
        raise _bad(path, f"defaults: expected a list, got {show(defaults)}; write {EXAMPLE} or leave it out")
    if "_self_" in defaults and "base" in defaults and defaults.index("_self_") < defaults.index("base"):
        raise _bad(path, f"defaults: `_self_` before `base` undoes what this file says; write {EXAMPLE}")


def _method_of(path: Path, content: dict[Any, Any]) -> str:
    group = content.get("method", {})
    name = group.get("name", "grpo") if isinstance(group, dict) else "grpo"
    if not isinstance(name, str) or name not in METHODS:
        raise _bad(path, f"method.name: expected one of {', '.join(METHODS)}, got {show(name)}")
    return name


def _compose(path: Path | None, name: str, method: str | None) -> tuple[DictConfig, str]:
    GlobalHydra.instance().clear()
    overrides = [f"method={method}"] if method else []
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of a list without `_self_`, which then means what it should
            initialize_config_dir(str(path.parent), version_base="1.3")
            if path
            else initialize(config_path=None, version_base="1.3"),
        ):
            tree = compose(name, overrides=overrides, return_hydra_config=True)
        choices = dict(tree.hydra.runtime.choices)
        with open_dict(tree):
            del tree["hydra"]
    except Exception as error:  # Hydra raises bare AssertionError, TypeError and ValueError for odd defaults lists
        raise _bad(path, _explain(error)) from None
    chosen = choices.get("method")
    if chosen is None or "train" not in choices:
        raise _bad(path, f"defaults: `base` is not in the list; write {EXAMPLE} or leave the list out")
    if choices["train"] != chosen:
        raise _bad(path, f"defaults: train follows the method; remove `train: {choices['train']}`")
    if chosen not in METHODS:
        raise _bad(path, f"method: expected one of {', '.join(METHODS)}, got {show(chosen)}")
    return tree, chosen


def resolved(tree: DictConfig) -> Any:
    """`tree` as plain dicts, interpolations such as ${oc.env:NAME} replaced by what they name.

    Raises:
        ConfigError: an interpolation that leads nowhere.
    """
    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=False)
    except Exception as error:  # a resolver may raise anything, RecursionError included
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {_explain(error)}" if key else _explain(error)) from None


def _explain(error: BaseException) -> str:
    """One line of what Hydra, OmegaConf or PyYAML say about the user's text."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        options = f"; there are {', '.join(error.options)}" if error.options else ""
        return f"defaults: no file or group named {spell(error.missing_cfg_file)}{options}"
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8 text"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {spell(str(error.problem))}"
    if isinstance(error, RecursionError):
        return "is nested too deeply, or refers to itself"
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(("full_key:", "object_type=", "See https"))]
    return spell(" ".join(" ".join(telling).split())[: 2 * SHOWN]) or type(error).__name__
