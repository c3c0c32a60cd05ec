"""The options of a run from a YAML file, which gives defaults, and the command line, which overrides them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

import yaml

from hf_csm.config import RunConfig
from hf_csm.errors import UserError


GUIDE_KEYS: dict[str, tuple[Any, Any]] = {
    "lora.enable": (bool, True),
    "lora.scaling": (Optional[float], None),  # noqa: UP045
    "optimizer.name": (Literal["adamw"], "adamw"),
}
"""Type and default of the fine-tuning guide's keys that leave no choice: accepted and checked, but no options."""


def parse_run_config(argv: list[str] | None = None, prog: str | None = None) -> RunConfig:
    """Read a run's options from the command line and the YAML file it names with `--config`.

    Raises:
        UserError: an option or key that does not exist (with the nearest one that does), or a value of a wrong type.
    """
    from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, exit_on_error=False, description="Train a LoRA adapter on Moshi.")
    parser.add_argument("--config", action="config", help="YAML file with defaults for the options below.")
    parser.add_class_arguments(RunConfig, None)
    for name, (kind, default) in GUIDE_KEYS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=SUPPRESS)
    argv = [_with_underscores(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    for position, argument in enumerate(argv):
        name, _, value = argument.removeprefix("--").removesuffix("+").partition("=")
        if name == "config" and argument.startswith("--"):
            _check_yaml(Path(value or next(iter(argv[position + 1 :]), "")))
        elif argument.startswith("--") and name != "help" and not name.endswith(".help"):
            _check_key(name, "the command line")
    try:
        parsed = parser.parse_args(argv)
        guide = {name: parsed.pop(name) for name in GUIDE_KEYS}
        options = vars(parser.instantiate(parsed))
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split()), "Run with --help to see options, types, defaults.") from error
    del options["config"]
    config = RunConfig(**options)
    _check_guide_keys(guide, config)
    return config


def dump_run_config(config: RunConfig) -> str:
    """Return the whole configuration as YAML that `parse_run_config` reads back."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)  # tuples become lists


def _check_guide_keys(guide: dict[str, Any], config: RunConfig) -> None:
    if not guide["lora.enable"]:
        raise UserError("lora.enable is false.", "Set it to true: training the whole base model is not supported.")
    scaling, implied = guide["lora.scaling"], config.lora.alpha / config.lora.rank
    if scaling is not None and not abs(scaling - implied) <= 1e-6:  # also true for NaN
        raise UserError(
            f"lora.scaling is {scaling:g}, but lora.alpha / lora.rank is {implied:g}.",
            "Leave lora.scaling out, or make the three agree.",
        )


def _with_underscores(argument: str) -> str:
    """`--resume-from-checkpoint=a-b` names the option `--resume_from_checkpoint`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _valid_keys(cls: type = RunConfig, prefix: str = "") -> dict[str, bool]:
    """Map every dotted key to whether it holds further keys."""
    keys: dict[str, bool] = {}
    types = get_type_hints(cls)
    for option in dataclasses.fields(cls):
        name, hint = prefix + option.name, types[option.name]
        choices: tuple[type, ...] = get_args(hint) if get_origin(hint) is Union else (hint,)
        kinds = [choice for choice in choices if dataclasses.is_dataclass(choice)]
        keys |= {name: bool(kinds), **(_valid_keys(kinds[0], name + ".") if kinds else {})}
    return keys


def _check_key(name: str, where: str) -> None:
    keys = [key for key in _valid_keys() if not name.startswith(f"{key}.")]
    if name in keys or name in GUIDE_KEYS:
        return
    # A wrong group or last word: try the whole name first, then the last word anywhere.
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.75) or [
        key for key in keys if key.rpartition(".")[2] == name.rpartition(".")[2]
    ]
    remedy = f"Did you mean {near[0]}?" if near else "Run with --help to see every option."
    raise UserError(f"{where} has {name}, which is not an option.", remedy)


def _check_yaml(path: Path) -> None:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration {str(path)!r} cannot be read: {error}.", "Check --config.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}", "Correct that line.") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no options.", "Write `key: value` lines; see recipes/configs/.")
    keys = _valid_keys()

    def walk(node: dict, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            _check_key(name, str(path))
            if keys.get(name) and not (value is None and name == "dataset.replay"):
                if not isinstance(value, dict):
                    raise UserError(f"{path} has {name}: {value!r}.", f"Put options under {name}, or leave it out.")
                walk(value, name + ".")

    walk(tree, "")
