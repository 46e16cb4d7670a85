"""The search space: flags with their choices and ranges.

A list is a choice; `{low: 0.1, high: 1, log: true}` is a range, of whole numbers where both ends are. Flags on the
command line are fixed; a flag that has no effect with the others of a trial is not drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.config import read_yaml, typed_out
from settings.effect import TARGETS
from settings.flag import Flags, Values
from settings.flags import FLAGS, build_parser, idle_flags
from utils import RunError


class Space:
    """The flags that a search draws; `values` has their lists and ranges by name.

    Args:
        args: the complete flags of the command; `given` are those on the command line.
        has_units: whether the runs remove whole units rather than single weights.

    Raises:
        RunError: no flag is left to search, or the file of `--search_space` is wrong.
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
            return False  # another flag, or a file, sets it
        return name not in idle_flags({**self.flags, **drawn})

    def draw(self, trial) -> dict[str, object]:
        """The flags of one Optuna trial; floats have four digits, so that files show the exact values."""
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
        """The ratios and targets of a trial that keeps the most."""
        ratios = {name: _ends(self.values[name])[0] for name in ("rate", "mlp_prune_ratio") if name in self.values}
        return ratios | {name: _ends(self.values[name])[1] for name in TARGETS if name in self.values}


def _ends(values: Values) -> tuple:
    """The smallest and the largest value."""
    numbers = values if isinstance(values, list) else (values["low"], values["high"])
    numbers = [value for value in numbers if value is not None]
    return min(numbers), max(numbers)


def in_words(values: Values) -> str:
    if isinstance(values, list):
        return " | ".join(map(str, values))
    return f"{values['low']:g} to {values['high']:g}{', logarithmic' if values.get('log') else ''}"


def read_space(path: Path) -> dict[str, Values]:
    """The ranges and choices of a file of `--search_space`, by flag.

    Raises:
        RunError: no such file, no YAML, an unknown flag, or a value that a flag cannot have.
    """
    who = f"--search_space {path}"
    content = read_yaml(path, who, "a YAML file of ranges and choices")
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
            build_parser().parse_args(typed_out({name: value}, who))  # exits where the flag cannot have the value
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
