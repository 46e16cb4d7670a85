#!/usr/bin/env python
"""Torch-Pruning on the same ViT, with the flags and the files of our runs, for the rows of a study.

    python benchmarks/peer.py --pruner growing --dataset digits --arch vit_mini --init dense.safetensors \
        --like results/refill --pruning_times 3 --epochs 2 --save_dir results/peer

Weights, order of images, rates, epochs, choice of the epoch and evaluation are those of main_imp_fillback.py with the
same flags (`--prune_type finetune`). Torch-Pruning (`pip install torch-pruning`) chooses the units by group magnitude;
the width of the tokens is kept.

--heads narrow, the default, prunes neurons and dimensions of all heads, the same share of each layer, as is its
default. The ratio is searched, so that MACs reach those of the run of `--like` on a geometric schedule. (Its global
ranking does not prune layers that it would empty, and does not reach a tenth of the MACs.)
--heads whole prunes neurons and whole heads, as many of each layer in each state as the run of `--like`; not all of a
layer.

magnitude: cut before each state but the first. growing: `GrowingRegPruner` (Wang et al., "Neural Pruning via Growing
Regularization", ICLR 2021) regularises each state but the last, at whose end is cut. The paper raises the penalty to 1
over many thousand steps; here its increments are such that the least important units get there within a state.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from torch import nn

from cli.parse import parse_args
from dataset import load_dataset, make_batches
from engine.evaluation import accuracy
from engine.model import first_model
from engine.objective import cross_entropy
from engine.optimizer import Schedule, make_optimizer, milestones_of, set_rate
from engine.run_folder import write_run_facts
from families import family_of
from reporting.runs import RunFiles, load_run
from utils import OneLineParser, RunError, autocast, pick_device, pick_precision, seed_everything, write_csv

EVERY = 10  # steps between increments of the growing penalty, as in the paper for CIFAR
EVAL_BATCH = 256


def torch_pruning() -> ModuleType:
    """Torch-Pruning.

    Raises:
        RunError: it is not installed.
    """
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise RunError(f"Torch-Pruning is missing ({error}); pip install torch-pruning", 1) from error


def timm_twin(model: nn.Module) -> nn.Module:
    """timm's network of the same names, shapes and weights, which Torch-Pruning can follow."""
    family = family_of(model)
    geometry = family.describe(model, {key: [] for key in family.units(model)})["vit"]
    ratio = model.blocks[0].mlp.fc1.out_features / geometry["embed_dim"]
    twin = timm.models.VisionTransformer(**geometry, mlp_ratio=ratio)
    twin.load_state_dict(model.state_dict())
    return twin


def made(kind: Callable, model: nn.Module, ratio: float, **options) -> object:
    """A pruner of Torch-Pruning over neurons and dimensions of heads."""
    parameter = next(model.parameters())
    return kind(
        model,
        torch.randn(1, 3, *model.patch_embed.img_size, device=parameter.device),
        importance=torch_pruning().importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[model.head, model.patch_embed.proj],
        num_heads={block.attn.qkv: block.attn.num_heads for block in model.blocks},
        in_channel_groups={},  # the defaults are shared by all pruners of a process
        out_channel_groups={},
        **options,
    )


def cut(model: nn.Module, ratio: float, neurons: float | None = None) -> nn.Module:
    """A copy of which Torch-Pruning has removed `ratio` of every layer, or `neurons` of those of its MLPs."""
    small = copy.deepcopy(model)
    own = {} if neurons is None else {block.mlp.fc1: neurons for block in small.blocks}
    _remove(small, ratio, pruning_ratio_dict=own)
    return small


def cut_to_counts(model: nn.Module, left: Mapping[str, int]) -> nn.Module:
    """A copy in which Torch-Pruning has left so many whole heads and neurons of each layer, by units key."""
    small = copy.deepcopy(model)
    # it takes ceil(ratio * heads) heads and leaves floor((1 - ratio) * width) neurons: half a unit is on the safe side
    gone = {key: (group.count - left[key] - 0.5) / group.count for key, group in family_of(small).units(small).items()}
    _remove(
        small,
        0.5,  # of dimensions, which are kept; it only prunes heads of layers that lose some
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio_dict={small.get_submodule(key).qkv: gone[key] for key in gone if key.endswith("attn")},
        pruning_ratio_dict={small.get_submodule(key).fc1: gone[key] for key in gone if key.endswith("mlp")},
    )
    return small


def _remove(small: nn.Module, ratio: float, **options) -> None:
    pruner = made(torch_pruning().pruner.BasePruner, small, ratio, **options)
    pruner.step()
    for block in small.blocks:
        attn = block.attn
        attn.num_heads = pruner.num_heads[attn.qkv]
        attn.attn_dim = attn.qkv.out_features // 3
        attn.head_dim = attn.attn_dim // attn.num_heads


def cut_to(model: nn.Module, macs: float) -> nn.Module:
    """A copy with `macs` per image at most, as near as it gets: one ratio for all, but fewer neurons where they fit.

    Raises:
        RunError: Torch-Pruning leaves more of every layer.
    """

    def smallest(build: Callable[[float], nn.Module], high: float) -> tuple[float, nn.Module | None]:
        low, found = 0.0, None
        for _ in range(9):
            ratio = (low + high) / 2
            small = build(ratio)
            if family_of(small).cost(small, {})["macs"] <= macs:
                high, found = ratio, small
            else:
                low = ratio
        return high, found

    ratio, small = smallest(lambda ratio: cut(model, ratio), 1.0)
    if small is None:
        raise RunError(f"--like: Torch-Pruning leaves more than {macs / 1e6:.2f} M MACs whatever the ratio", 1)
    _, nearer = smallest(lambda neurons: cut(model, ratio, neurons), ratio)
    return nearer or small


def counts_of_states(run: RunFiles, states: int) -> dict[int, dict[str, int]]:
    """How many units of each layer a run had in each of its states.

    Raises:
        RunError: it has not that many states, or emptied a layer, which Torch-Pruning cannot.
    """
    counts: dict[int, dict[str, int]] = {}
    for row in run.units:
        counts.setdefault(row["state"], {})[row["layer"]] = int(row["kept"])
    if set(range(states)) - counts.keys():
        raise RunError(f"--like {run.folder}: it does not say what it kept in each of {states} states")
    empty = [name for left in counts.values() for name, count in left.items() if not count]
    if empty:
        raise RunError(f"--like {run.folder}: nothing is left of {empty[0]}, and Torch-Pruning cannot empty a layer")
    return counts


class Peer:
    """A run by Torch-Pruning: the data and flags of an ordinary one, states of training with cuts between them."""

    def __init__(self, args: argparse.Namespace, pruner: str, heads: str, like: Path):
        self.args, self.pruner = args, pruner
        found = load_run(like)
        if not found.states:
            raise RunError(f"--like {like}: this run has no finished state")
        self.share = found.states[-1]["macs"] / found.states[0]["macs"]
        self.counts = counts_of_states(found, args.pruning_times) if heads == "whole" else None
        self.device = pick_device(args.device, args.gpu)
        self.precision = pick_precision(args.amp, self.device)
        seed_everything(args.seed)
        own = first_model(args)
        splits = load_dataset(
            args.dataset, args.data, family_of(own).image_size(own), args.val_fraction, args.train_limit
        )
        facts, workers = splits.facts, args.workers
        self.train = make_batches(
            splits.train, facts, args.batch_size, self.device, args.seed, args.aug, workers=workers
        )
        self.val = make_batches(splits.val, facts, EVAL_BATCH, self.device, workers=workers)
        self.test = make_batches(splits.test, facts, EVAL_BATCH, self.device, workers=workers)
        self.model = timm_twin(own).to(self.device)
        self.dense_macs = self.cost()["macs"]
        self.dense_prunable = self.prunable()

    def cost(self) -> dict[str, int]:
        return family_of(self.model).cost(self.model, {})

    def prunable(self) -> int:
        return sum(layer.weight.numel() for layer in family_of(self.model).prunable_layers(self.model).values())

    def cut(self, state: int) -> nn.Module:
        if self.counts:
            return cut_to_counts(self.model, self.counts[state])
        return cut_to(self.model, self.dense_macs * self.share ** (state / (self.args.pruning_times - 1)))

    def run(self) -> list[dict]:
        """All states; a row of states.csv for each."""
        rows, states = [], self.args.pruning_times
        for state in range(states):
            started, before, after = time.perf_counter(), "", ""
            if state:
                before = accuracy(self.model, self.val, self.precision)
                self.model = self.cut(state)
                after = accuracy(self.model, self.val, self.precision)
            best = self.train_state(state, regularised=self.pruner == "growing" and state < states - 1)
            last = copy.deepcopy(self.model)
            self.model.load_state_dict(best["weights"])
            test = accuracy(self.model, self.test, self.precision)
            self.model = last
            row = {"state": state, "density": self.prunable() / self.dense_prunable, **self.cost()}
            row |= {"accuracy_before_cut": before, "accuracy_after_cut": after, "accuracy_trained": best["trained"]}
            row |= {"best_epoch": best["epoch"], "best_accuracy": best["accuracy"], "test_accuracy": test}
            rows.append({**row, "seconds": time.perf_counter() - started})
            print(f"state {state}: {row}", flush=True)
        return rows

    def train_state(self, state: int, regularised: bool) -> dict:
        """Train for a state's epochs; the epoch that is best on validation, its weights, and the last accuracy."""
        args, model, per_epoch = self.args, self.model, self.train.steps_per_epoch
        total = per_epoch * args.epochs
        warmup, *at = (epoch * per_epoch for epoch in (args.warmup, *milestones_of(args)))
        schedule = Schedule(args.sched, args.lr, warmup, tuple(at), total, args.min_lr)
        optimizer = make_optimizer(args, model, torch.zeros((), device=self.device))
        pruner = None
        if regularised:
            growth = 1.0 / max(1, total // EVERY)
            pruner = made(torch_pruning().pruner.GrowingRegPruner, model, 0.5, reg=0.0, delta_reg=growth)
        best: dict = {"accuracy": -1.0}
        for epoch in range(args.epochs):
            model.train()
            for step in range(per_epoch):
                done = epoch * per_epoch + step
                images, targets = self.train.batch(state, epoch, step)
                set_rate(optimizer, schedule.rate(done))
                with autocast(self.device, self.precision):
                    loss = cross_entropy(model(images), targets, args.label_smoothing)
                loss.backward()
                if args.clip_grad:
                    nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                if pruner:
                    pruner.regularize(model)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if pruner and (done + 1) % EVERY == 0:
                    pruner.update_reg()
            found = accuracy(model, self.val, self.precision)
            if found > best["accuracy"]:
                best = {"accuracy": found, "epoch": epoch, "weights": copy.deepcopy(model.state_dict())}
        return {**best, "trained": found}


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--pruner", choices=["magnitude", "growing"], default="magnitude")
    parser.add_argument("--heads", choices=["narrow", "whole"], default="narrow")
    parser.add_argument("--like", required=True, metavar="DIR", help="the run whose MACs, or units, are the target")
    own, rest = parser.parse_known_args(argv)
    args = parse_args(rest)
    if not args.save_dir:
        parser.error("--save_dir is needed")
    folder = Path(args.save_dir)
    try:
        torch_pruning()
        folder.mkdir(parents=True, exist_ok=True)
        peer = Peer(args, own.pruner, own.heads, Path(own.like))
        write_run_facts(folder, args, peer.device, {"test": len(peer.test)})
        write_csv(folder / "states.csv", peer.run())
    except RunError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
