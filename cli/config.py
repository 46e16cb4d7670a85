"""Configurations: the YAML file that `--config` names in, flags as they would be typed out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import yaml

from utils import OneLineParser, RunError


def config_flags(parser: OneLineParser, argv: list[str]) -> list[str]:
    """The flags of the YAML file that `--config` names, to be read before those given by hand."""
    finder = OneLineParser(prog=parser.prog, add_help=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return []
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"--config {path}: {error.strerror}; give a YAML file of flags") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RunError(f"--config {path}: not a YAML file ({error})") from error
    if not isinstance(content, dict):
        raise RunError(f"--config {path}: must hold flags and values such as 'epochs: 120'")
    return typed_out(parser, content, f"--config {path}")


def typed_out(parser: OneLineParser, content: Mapping, source: str) -> list[str]:
    """Flags and their values, as YAML holds them, as they would be typed out.

    Args:
        source: what an error begins with.

    Raises:
        RunError: no such flag, or no value of it.
    """
    actions = {action.dest: action for action in parser._actions}
    actions |= {option.removeprefix("--"): action for action in parser._actions for option in action.option_strings}
    flags = []
    for name, value in content.items():
        if name in ("pretrained_note", "preprocessing_used", "unit_counts"):  # args.yaml of a run has them
            continue
        action = actions.get(name) if isinstance(name, str) else None
        if action is None or action.dest == "help" or (action.dest == "config" and value is not None):
            raise RunError(f"{source}: unknown flag {name!r}; see --help")
        if value is None:
            continue
        option = action.option_strings[0]
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, dict) or (action.nargs == 0 and not isinstance(value, bool)):
            raise RunError(f"{source}: {name}: {value!r} is not a value of {option}; see --help")
        if isinstance(action, argparse.BooleanOptionalAction):
            flags.append(action.option_strings[value == name.startswith("no-")])
        elif action.nargs == 0:
            # `no-export: true` and `export: false` mean the same
            if value == (action.const if name == action.dest else True):
                flags.append(option)
        elif value is True and action.nargs == "?":
            flags.append(option)
        elif not (value is False and action.nargs == "?"):
            flags.append(f"{option}={value}")
    return flags
