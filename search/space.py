"""What is searched: a command's flags in, the flags that it leaves alone with their ranges and choices out.

A list is a choice; `{low: 0.1, high: 1, log: true}` is a range, of whole numbers where both ends are. A flag that is
given by hand is fixed, and one that has no effect beside the others of a trial is not drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from cli.config import typed_out
from settings.effect import TARGETS
from settings.flag import Flags, Values
from settings.flags import FLAGS, build_parser, idle_flags
from utils import RunError


class Space:
    """The flags that a search draws; `values` has their lists and ranges by name.

    Args:
        args: the command's flags, complete; `given` among them holds those given by hand.
        has_units: whether the runs remove units, heads or filters, rather than single weights.

    Raises:
        RunError: nothing is left to search, or the file of `--search_space` is none.
    """

    def __init__(self, args: argparse.Namespace, has_units: bool):
        self.flags = {**vars(args), "has_units": has_units}
        drawn = {name: flag.search for name, flag in FLAGS.items() if flag.search}
        wanted = {name: values(self.flags) if callable(values) else values for name, values in drawn.items()}
        if args.search_space:
            own = read_space(Path(args.search_space))
            wanted = {name: own[name] for name in [*wanted, *own] if name in own}  # in the order of drawing
        prunes = args.struct != "dense" and args.pruning_times > 1
        free = {
            name: values for name, values in wanted.items() if name not in args.given and (prunes or args.search_space)
        }
        structs = free.get("struct", [args.struct])
        self.values: dict[str, Values] = {
            name: values for name, values in free.items() if any(self._matters(name, {"struct": s}) for s in structs)
        }
        if not self.values:
            raise RunError(f"--search {args.search}: no flag with an effect is left to search; give fewer by hand")

    def _matters(self, name: str, drawn: Flags) -> bool:
        if name == "ratio_allocation" and ("sorting_mode" in self.flags["given"] or self.flags["unit_counts"]):
            return False  # said by another flag, or by a file
        return name not in idle_flags({**self.flags, **drawn})

    def draw(self, trial) -> dict[str, object]:
        """The flags of one of Optuna's trials; floats have four digits, so that files show what was run."""
        drawn: dict[str, object] = {}
        for name, values in self.values.items():
            if not self._matters(name, drawn):
                continue
            if isinstance(values, list):
                drawn[name] = trial.suggest_categorical(name, values)
            elif isinstance(values["low"], int) and isinstance(values["high"], int):
                drawn[name] = trial.suggest_int(name, **values)
            else:
                value = float(f"{trial.suggest_float(name, **values):.4g}")
                drawn[name] = min(max(value, values["low"]), values["high"])
        return drawn

    def largest(self) -> dict[str, object]:
        """The drawn ratios and targets of a trial that keeps as much as any."""
        ratios = {name: _ends(self.values[name])[0] for name in ("rate", "mlp_prune_ratio") if name in self.values}
        return ratios | {name: _ends(self.values[name])[1] for name in TARGETS if name in self.values}


def _ends(values: Values) -> tuple:
    """The smallest and the largest value."""
    if isinstance(values, list):
        numbers = [value for value in values if value is not None]
        return min(numbers), max(numbers)
    return values["low"], values["high"]


def in_words(values: Values) -> str:
    if isinstance(values, list):
        return " | ".join(map(str, values))
    return f"{values['low']:g} to {values['high']:g}{', logarithmic' if values.get('log') else ''}"


def read_space(path: Path) -> dict[str, Values]:
    """The ranges and choices of a file of `--search_space`, by flag.

    Raises:
        RunError: no such file, no YAML, an unknown flag, or a value that is none of it.
    """
    who = f"--search_space {path}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{who}: {error.strerror}; give a YAML file of ranges and choices") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RunError(f"{who}: not a YAML file ({error})") from error
    if not isinstance(content, dict) or not content:
        raise RunError(f"{who}: must hold flags and their values such as 'rate: {{low: 0.1, high: 0.6}}'")
    for name, values in content.items():
        if name not in FLAGS or not FLAGS[name].searchable:
            raise RunError(f"{who}: {name}: no flag that trials can differ in; search another")
        if not (_is_choice(values) or _is_range(values)):
            raise RunError(
                f"{who}: {name}: {values!r} is neither a list of values nor {{low: 0.1, high: 1, log: true}} with low "
                "below high, and above 0 where log is true"
            )
        for value in values if isinstance(values, list) else (values["low"], values["high"]):
            build_parser().parse_args(typed_out({name: value}, who))  # leaves where it is no value of the flag
    return content


def _is_choice(values) -> bool:
    kinds = str | int | float | bool | None
    return isinstance(values, list) and bool(values) and all(isinstance(value, kinds) for value in values)


def _is_range(values) -> bool:
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= {"low", "high", "log"}:
        return False
    low, high, log = values["low"], values["high"], values.get("log", False)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (low, high))
    return numbers and isinstance(log, bool) and low < high and (low > 0 or not log)
