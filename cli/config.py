"""Configurations: YAML files of flags, as `--config` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from settings.flags import FLAGS
from utils import OneLineParser, RunError


def config_flags(parser: OneLineParser, argv: list[str]) -> list[str]:
    """The flags of the `--config` file as words, to be parsed before those of the command line.

    Flags on the command line win over the same ones in the file, and over those that would contradict them: --exp_name
    over save_dir, a file of --pretrained over pretrained_tag.
    """
    finder = OneLineParser(prog=parser.prog, add_help=False)
    for action in parser._actions:
        if action.dest in ("config", "exp_name", "pretrained"):
            finder.add_argument(*action.option_strings, nargs=action.nargs, const=action.const)
    by_hand = finder.parse_known_args(argv)[0]
    path = by_hand.config
    if path is None:
        return []
    content = read_yaml(Path(path), f"--config {path}", "a YAML file of flags")
    if not isinstance(content, dict):
        raise RunError(f"--config {path}: must hold flags and values such as 'epochs: 120'")
    overruled = ["save_dir"] if by_hand.exp_name is not None else []
    overruled += ["pretrained_tag"] if isinstance(by_hand.pretrained, str) else []
    content = {name: value for name, value in content.items() if name not in overruled}
    return typed_out(content, f"--config {path}")


def read_yaml(path: Path, source: str, wanted: str) -> object:
    """The content of a YAML file.

    Args:
        source: how an error starts.
        wanted: the file to give instead, in an error.

    Raises:
        RunError: no such file, or no YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{source}: {error.strerror}; give {wanted}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise RunError(f"{source}: not a YAML file ({error})") from error


def typed_out(content: Mapping, source: str) -> list[str]:
    """Flags and values of a YAML file as words of a command line.

    Args:
        source: how an error starts.

    Raises:
        RunError: an unknown flag, or a value that it cannot have.
    """
    options = {flag.option.removeprefix("--"): flag for flag in FLAGS.values()}
    options |= {older.removeprefix("--"): flag for flag in FLAGS.values() for older in flag.also}
    options |= {f"no-{flag.name}": flag for flag in FLAGS.values() if flag.both}
    typed = []
    for name, value in content.items():
        if name in ("pretrained_note", "preprocessing_used", "unit_counts"):  # args.yaml of a run has them
            continue
        flag = FLAGS.get(name) or options.get(name) if isinstance(name, str) else None
        if flag is None or (flag.name == "config" and value is not None):
            raise RunError(f"{source}: unknown flag {name!r}; see --help all")
        if isinstance(value, bool) and name not in FLAGS and name.startswith("no-"):
            value = not value  # `no-export: true` and `export: false` mean the same
        try:
            typed += flag.typed(value)
        except ValueError as error:
            raise RunError(f"{source}: {name}: {error}; see --help all") from error
    return typed
