"""A flag as a record, and what a table of them gives: parser, help, checks, and flags as words of a command."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from utils import OneLineParser, RunError

Flags = Mapping[str, object]  # values by name, as in args.yaml
Values = list | dict  # of a search: choices, or {low, high, log}
AUTO = "auto"  # of --resume


@dataclass(frozen=True)
class Check:
    """A condition on a flag's value, and what an error says must hold."""

    holds: Callable[[object], bool]
    words: str


def at_least(least: float, words: str = "") -> Check:
    return Check(lambda value: least <= value < math.inf, words or f"must be {least} or more")


POSITIVE = Check(lambda value: 0 < value < math.inf, "must be a number above 0")
SHARE = Check(lambda value: 0 <= value < 1, "must lie in [0, 1)")
CLOSED = Check(lambda value: 0 <= value <= 1, "must lie in [0, 1]")
OPEN = Check(lambda value: 0 < value < 1, "must lie in (0, 1)")
NOT_ZERO = Check(lambda value: 0 < value <= 1, "must lie in (0, 1]")
OFF_OR_MORE = at_least(0, "must be 0, for off, or more")


def square(text: str) -> int:
    """The side of "224" or "224x224", in pixels.

    Raises:
        argparse.ArgumentTypeError: a rectangle, or no number.
    """
    sides = set(text.lower().split("x"))
    try:
        (side,) = map(int, sides)
    except ValueError:
        why = f"invalid int value: {text!r}"
        if len(sides) == 2 and all(side.isdecimal() for side in sides):
            why = f"{text} is a rectangle; images and patches are squares here: give one side"
        raise argparse.ArgumentTypeError(why) from None
    return side


def always(flags: Flags) -> str:
    return ""


@dataclass(frozen=True)
class Flag:
    """One flag of the command.

    Attributes:
        name: of its value in args.yaml; the flag is --name, or --no-name for a switch that is on by default.
        help: meaning and unit.
        kind: type of the value; bool is a switch.
        const: the value where the flag is given without one.
        also: older spellings of the flag.
        both: a switch with both --name and --no-name.
        check: what a value must fulfil; a value that is not given is not checked.
        follows: the value where none is given, from the other flags; filled in in the order of the table.
        needs: (another flag, why): an error where this one is given without it.
        clash: (a condition on all flags, words with {name} for their values): an error where this one is set and the
            condition holds.
        idle: "" where the flag has an effect with the others, else a reason such as "without --vit_structured".
        computes: whether it changes the result, rather than where and how the run is made.
        resumes: whether a resumed run may change it.
        search: the choices or range of a search, or a function of the other flags; None: not searched by default.
        searchable: whether a search may draw it at all.
        common: whether plain --help shows it.
        words: how a report says it, with {} for the value.
    """

    name: str
    help: str
    default: object = None
    kind: type = str
    choices: tuple[str, ...] | None = None
    const: object = None
    metavar: str | None = None
    also: tuple[str, ...] = ()
    both: bool = False
    check: Check | None = None
    follows: Callable[[argparse.Namespace], object] | None = None
    needs: tuple[str, str] | None = None
    clash: tuple[Callable[[Flags], object], str] | None = None
    idle: Callable[[Flags], str] = always
    computes: bool = True
    resumes: bool = False
    search: Values | Callable[[Flags], Values] | None = None
    searchable: bool = True
    common: bool = False
    words: str = ""

    @property
    def switch(self) -> bool:
        return self.kind is bool

    @property
    def option(self) -> str:
        """What turns it on; a switch that is on by default has only what turns it off."""
        return f"--no-{self.name}" if self.switch and self.default and not self.both else f"--{self.name}"

    def shown(self, value: object) -> str:
        """How an error names the flag and its value."""
        return self.option if self.switch else f"{self.option} {value}"

    @property
    def told(self) -> str:
        """The help with the default."""
        plain = self.switch or self.default is None or self.default is False
        return self.help if plain else f"{self.help} (default: {self.default})"

    def add_to(self, group: argparse._ArgumentGroup, shown: bool = True) -> None:
        told = self.told.replace("%", "%%") if shown else argparse.SUPPRESS
        options = {"dest": self.name, "default": self.default, "help": told}
        if self.both:
            options["action"] = argparse.BooleanOptionalAction
        elif self.switch:
            options["action"] = "store_false" if self.default else "store_true"
        else:
            options |= {"type": self.kind, "choices": self.choices, "metavar": self.metavar}
            options |= {"nargs": "?", "const": self.const} if self.const is not None else {}
        group.add_argument(self.option, *self.also, **options)

    def typed(self, value: object) -> list[str]:
        """The flag with this value as it would be typed; nothing where leaving it out means the same.

        Raises:
            ValueError: it has no such value.
        """
        if value is None:
            return []
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, dict) or (self.switch and not isinstance(value, bool)):
            raise ValueError(f"{value!r} is not a value of {self.option}")
        if self.both:
            return [f"--{self.name}" if value else f"--no-{self.name}"]
        if self.switch:
            return [] if value == self.default else [self.option]
        if self.const is not None and isinstance(value, bool):
            return [self.option] if value else []
        return [f"{self.option}={value}"]

    def could_be(self, value: object) -> bool:
        """Whether a stored value is of a kind that the parser gives."""
        if value is None:
            return self.default is None
        if self.switch or isinstance(value, bool):
            return isinstance(value, bool) and (self.switch or self.const is not None)
        kinds = {float: (int, float), str: str}.get(self.kind, int)
        return isinstance(value, kinds) and (not self.choices or value in self.choices)


class _Help(argparse.Action):
    """--help shows the common flags, --help all every one."""

    def __init__(self, option_strings: list[str], dest: str, table: Mapping[str, Iterable[Flag]]):
        super().__init__(option_strings, dest, nargs="?", choices=["all"], help="show this; all: show every flag")
        self.table, self.default = table, argparse.SUPPRESS

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser_of(self.table, shows_all=values == "all").format_help())
        parser.exit()


def parser_of(table: Mapping[str, Iterable[Flag]], shows_all: bool = True) -> OneLineParser:
    """A parser of all flags; its help shows the common ones, or all."""
    more = None if shows_all else "These are the flags that decide most runs; --help all shows every flag."
    about = "Prune a Vision Transformer iteratively: train, prune, rewind, retrain."
    parser = OneLineParser(description=about, epilog=more, add_help=False)
    parser.formatter_class = argparse.HelpFormatter
    if not shows_all:
        parser.usage = "%(prog)s [flags]"
    parser.add_argument("-h", "--help", action=_Help, table=table)
    for title, flags in table.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            flag.add_to(group, shows_all or flag.common)
    return parser


def markdown(table: Mapping[str, Iterable[Flag]]) -> str:
    """All flags as tables, a group each, for docs/flags.md."""
    parts = [
        "# Flags",
        "Generated by `python -m settings.flags > docs/flags.md`. `python main_imp_fillback.py --help` shows the "
        "common flags, `--help all` shows every flag. In a `--config` file, write flags without dashes; flags "
        "on the command line win over the file.",
    ]
    for title, flags in table.items():
        rows = ["| flag | meaning |", "|---|---|"]
        for flag in flags:
            names = ", ".join(f"`{option}`" for option in (flag.option, *flag.also))
            choices = f" One of {', '.join(f'`{choice}`' for choice in flag.choices)}." if flag.choices else ""
            told = f"{flag.told[0].upper()}{flag.told[1:]}.{choices}".replace("|", "\\|").replace("<", "\\<")
            rows.append(f"| {names} | {told} |")
        parts += [f"## {title[0].upper()}{title[1:]}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def require(fine: bool, option: str, value: object, way_out: str) -> None:
    if not fine:
        raise RunError(f"{option} {value}: {way_out}")


def check_values(flags: Iterable[Flag], args: argparse.Namespace) -> None:
    """Refuse values that no run can have, and flags that belong to another one that is not given; fill in what follows.

    Raises:
        RunError: naming flag, value and way out.
    """
    flags = tuple(flags)
    for flag in flags:
        value = getattr(args, flag.name)
        if flag.needs and value not in (None, False) and getattr(args, flag.needs[0]) is None:
            raise RunError(f"{flag.shown(value)}: belongs to --{flag.needs[0]}, {flag.needs[1]}")
        _check_value(flag, value)
    for flag in flags:
        if flag.follows and getattr(args, flag.name) is None:
            setattr(args, flag.name, flag.follows(args))
            _check_value(flag, getattr(args, flag.name))


def check_clashes(flags: Iterable[Flag], args: argparse.Namespace) -> None:
    """Refuse values, complete ones, that cannot work together.

    Raises:
        RunError: naming flag, value and way out.
    """
    for flag in flags:
        value = getattr(args, flag.name)
        if flag.clash and value and flag.clash[0](vars(args)):
            raise RunError(f"{flag.shown(value)}: {flag.clash[1].format_map(vars(args))}")


def _check_value(flag: Flag, value: object) -> None:
    if flag.check and value is not None:
        require(flag.check.holds(value), flag.option, value, flag.check.words)


def matches(pattern: str, words: str) -> Check:
    return Check(lambda value: bool(re.fullmatch(pattern, value)), words)
