"""The grid of a study: a YAML file in, ordinary runs with their full commands out, in the order they should be made.

    speed: 5.6                          # GMACs (forward) that one process trains a second, until runs tell
    processes: 2                        # at once; as many as there are cores when left out
    base: {dataset: digits, epochs: 2}  # flags of every run
    cells:
      - name: start
        each: {seed: [0, 1]}
        flags: {struct: dense}
      - name: both
        stage: 1                        # stages run in order, and each seed by seed; default 0, then the cell's before
        each:                           # every combination is a run
          method:                     # a mapping: the name, and the flags it stands for
            refill: {struct: refill}
            rsst: {struct: rsst}
          density: [0.5, 0.1]           # a list: values for templates
          seed: [0, 1]
        flags: {rate: '{gone}', init: '{out}/start_s{seed}/model/model.safetensors'}

Its runs are start_s0, both_refill_0.5_s0 and so on. In flags `{out}` is the folder of all runs, `{seed}` and every
other name of `each` stands for its value, `{gone}` for 1 - density and `{rate}` for the share of the weights left that
goes at each of S - 1 prunings, so that the density is reached, fillback included: with the fillback f and
m = (1 - rate)^(S - 1), density = m + f (1 - m). A path into the folder of another run makes a run wait for that one. A
flag that is null is left out. `program` names another program than main_imp_fillback.py, which takes the same flags.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from cli.parse import parse_args
from dataset import split_sizes
from engine.model import make_model, run_epochs
from families import family_of
from settings.flags import build_parser
from utils import RunError

MAIN = "main_imp_fillback.py"
CELL_KEYS = {"name", "stage", "each", "flags", "program"}


@dataclass(frozen=True, eq=False)
class Planned:
    """One run of a study.

    Attributes:
        kind: the same for runs that differ only in values of lists.
        needs: names of the runs whose files it reads.
        words: flags as they were typed, which follow all others and win.
        cost: its forward MACs in all, as long as nothing is cut.
    """

    name: str
    cell: str
    kind: str
    stage: int
    axes: Mapping[str, object]
    flags: Mapping[str, object]
    program: str
    folder: Path
    needs: tuple[str, ...]
    cost: float = 0.0
    words: tuple[str, ...] = ()

    @property
    def variant(self) -> str:
        """What the run has in common with those of other seeds."""
        return "_".join([self.cell, *(str(value) for name, value in self.axes.items() if name != "seed")])

    @property
    def argv(self) -> list[str]:
        """Program, flags and folder, as they follow `python`."""
        return [self.program, *_typed(self.flags), *self.words, "--save_dir", str(self.folder)]

    @property
    def command(self) -> str:
        return shlex.join(["python", *self.argv])


def read_study(
    path: Path,
    out: Path,
    more: Mapping | None = None,
    seeds: Sequence[int] | None = None,
    words: Sequence[str] = (),
) -> tuple[dict, list[Planned]]:
    """The settings of a study, with `more` flags for every run, and its runs in the order of stages, seeds and cells.

    `seeds` replace those of the file. `words` are further flags as they are typed, with {seed} for the run's seed; they
    win over all others.

    Raises:
        RunError: the file is no study, or a run of it could not be made; names the cell.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; give the YAML file of a study") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not a YAML file ({error})") from error
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list) or not cells or not all(isinstance(cell, dict) for cell in cells):
        raise RunError(f"{path}: needs `cells`, a list of mappings with name, each and flags")
    content["base"] = {**(content.get("base") or {}), **(more or {})}
    stage, runs = 0, []
    for cell in cells:
        odd = cell.keys() - CELL_KEYS
        if odd or not isinstance(cell.get("name"), str):
            raise RunError(f"{path}: a cell has {', '.join(sorted(odd)) or 'no name'}; known: {', '.join(CELL_KEYS)}")
        stage = cell.get("stage", stage)
        runs += _runs_of(cell, stage, content["base"], out, seeds, words)
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    unknown = sorted({f"{run.name} needs {need}" for run in runs for need in run.needs if need not in names})
    if twice or unknown:
        raise RunError(f"{path}: {', '.join(twice + unknown)}: " + ("named twice" if twice else "no run has that name"))
    order = sorted(range(len(runs)), key=lambda index: (runs[index].stage, runs[index].axes.get("seed", 0), index))
    return content, [runs[index] for index in order]


def _runs_of(
    cell: Mapping, stage: int, base: Mapping, out: Path, seeds: Sequence[int] | None, words: Sequence[str]
) -> list[Planned]:
    axes, runs = cell.get("each") or {}, []
    if seeds and "seed" in axes:
        axes = {**axes, "seed": seeds}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        flags = {**base, **(cell.get("flags") or {})}
        for name, value in chosen.items():
            if isinstance(axes[name], dict):
                flags |= axes[name][value] or {}
        if "seed" in chosen:
            flags["seed"] = chosen["seed"]
        flags = {name: value for name, value in flags.items() if value is not None}
        values = {**chosen, **_shares(chosen, flags), "out": out}
        try:
            flags = {n: v.format(**values) if isinstance(v, str) else v for n, v in flags.items()}
        except (KeyError, IndexError, ValueError) as error:
            raise RunError(
                f"cell {cell['name']}: no value for {error} in its flags; known: {', '.join(values)}"
            ) from error
        parts = [f"s{value}" if name == "seed" else str(value) for name, value in chosen.items()]
        name, program = "_".join([cell["name"], *parts]), cell.get("program", MAIN)
        kind = "_".join([cell["name"], *(value for name, value in chosen.items() if isinstance(axes[name], dict))])
        needs = tuple(dict.fromkeys(_runs_in(flags, out)))
        own = tuple(word.replace("{seed}", str(flags.get("seed", ""))) for word in words)
        runs.append(Planned(name, cell["name"], kind, stage, chosen, flags, program, out / name, needs, words=own))
    return runs


def _shares(chosen: Mapping, flags: Mapping) -> dict[str, float]:
    """What `{gone}` and `{rate}` stand for."""
    if "density" not in chosen:
        return {}
    density, states = float(chosen["density"]), int(flags.get("pruning_times", 20))
    back = float(flags.get("fillback_rate", 0))
    if not back < density <= 1:
        raise RunError(f"density {density:g}: must lie above --fillback_rate {back:g}, and not above 1")
    masked = (density - back) / (1 - back)
    return {"gone": round(1 - density, 6), "rate": round(1 - masked ** (1 / max(1, states - 1)), 6)}


def _runs_in(flags: Mapping, out: Path) -> list[str]:
    """Names of the runs whose folders the flags point into."""
    paths = [Path(value) for value in flags.values() if isinstance(value, str)]
    return [path.relative_to(out).parts[0] for path in paths if path.is_relative_to(out) and path != out]


def _typed(flags: Mapping) -> list[str]:
    """Flags as they are typed out; a switch is true or false."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False:
            words += [f"--{name}", str(value)]
    return words


def check(run: Planned, base: Mapping) -> argparse.Namespace:
    """The flags of a run as its command will understand them; paths into runs that are still to be made are left out.

    Raises:
        RunError: what the command would say, with the run's name.
    """
    pending = {name for name, value in run.flags.items() if _runs_in({name: value}, run.folder.parent)}
    flags = {name: value for name, value in run.flags.items() if name not in pending}
    if run.program != MAIN:  # it may have more flags
        flags = {name: value for name, value in flags.items() if name in vars(build_parser().parse_args([]))}
    if "arch" in pending and "arch" in base:
        flags["arch"] = base["arch"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_args([*_typed(flags), *run.words])
    except SystemExit as leaving:
        raise RunError(f"{run.name}: {said.getvalue().strip() or leaving.code}") from leaving


def cost(args: argparse.Namespace) -> float:
    """Forward MACs of a run as long as nothing is cut: epochs x training images x those of its dense network."""
    images, _ = split_sizes(args.dataset, args.val_fraction, args.train_limit, args.data)
    return (
        run_epochs(args)
        * images
        * _macs(args.arch, args.dataset, args.data, args.img_size, args.patch_size, args.stem, args.layer_scale)
    )


@functools.cache
def _macs(arch, dataset, data, img_size, patch_size, stem, layer_scale) -> int:
    names = ("arch", "dataset", "data", "img_size", "patch_size", "stem", "layer_scale")
    values = (arch, dataset, data, img_size, patch_size, stem, layer_scale)
    args = parse_args([])
    for name, value in zip(names, values, strict=True):
        setattr(args, name, value)
    with torch.device("meta"):
        model = make_model(args, weights=False)
    return family_of(model).cost(model, {})["macs"]


def checked(runs: Sequence[Planned], settings: Mapping) -> list[Planned]:
    """The same runs with their costs. One of each kind is parsed: others get their own errors from their commands.

    Raises:
        RunError: as `check`.
    """
    costs: dict[str, float] = {}
    for run in runs:
        if run.kind not in costs:
            costs[run.kind] = cost(check(run, settings["base"]))
    return [replace(run, cost=costs[run.kind]) for run in runs]
