"""The network of a state and what acts on its tensors in every step, built from the run's masks and kept units."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.averaging import Average
from engine.distill import Answering, is_taught
from engine.drop_path import StochasticDepth
from engine.optimizer import laid_out_like
from engine.processes import running_statistics
from engine.run import Run, enforce
from pruning.removal import remove_units, scatter_tensors, slice_tensors
from pruning.units import Kept, follower_masks


@dataclass(frozen=True)
class Network:
    """What trains between two cuts; tensors have the shapes of `model`.

    Attributes:
        model: `run.dense` itself, or the smaller network without the units that are cut already.
        kept: the units that a smaller `model` holds, empty for `run.dense`.
        forward: `model` as the step calls it, shared between processes and compiled; gives an `objective.Answer`.
        average: of the weights of `model`, with --ema_decay.
        drop_path: what drops branches of `model`, with --drop_path.
        statistics: of batch norms, which several processes average after each step.
        frozen: (mask, values) by name, dense: what reads removed units takes no part in training and keeps its values,
            in the dense network as in the small one.
        masked, masks: the parameters with pruned weights and their masks.
        doomed: masks of the weights that are to be cut, by parameter name.
    """

    model: nn.Module
    kept: Kept
    forward: nn.Module
    average: Average | None
    drop_path: StochasticDepth | None
    statistics: list[Tensor]
    frozen: dict[str, tuple[Tensor, Tensor]]
    masked: list[nn.Parameter]
    masks: list[Tensor]
    doomed: dict[str, Tensor]

    @property
    def selected(self) -> nn.Module:
        """What is validated and, when it is the best, kept: the average of the weights, or they themselves."""
        return self.average.model if self.average else self.model

    def dense_weights(self, run: Run, model: nn.Module) -> dict[str, Tensor]:
        """Clones of the weights of `model`, or of its average, in the shapes of `run.dense`."""
        weights = scatter_tensors(model.state_dict(), run.units, self.kept)  # without units to put back, only clones
        for name, (frozen, value) in self.frozen.items():
            weights[name] = torch.where(frozen, value, weights[name])
        return weights


def build_network(run: Run) -> Network:
    """For the masks and units enforced now; `run.dense` holds the weights, and pruned ones become zero."""
    args, progress = run.args, run.progress
    masks = run.parameter_masks(progress.masks, progress.kept)
    enforce(run.dense, masks)
    model, kept = _trained_model(run)
    average = _average(run, model, kept, masks) if args.ema_decay else None
    dense = run.dense.state_dict()
    followers = follower_masks(run.units, progress.kept, dense)
    drop_path = StochasticDepth(model, args.drop_path, args.seed, run.processes.share) if args.drop_path else None
    parameters = dict(model.named_parameters())

    def of_model(dense_masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sliced = slice_tensors(dense_masks, run.units, kept) if kept else dense_masks
        return {name: laid_out_like(parameters[name], mask) for name, mask in sliced.items()}

    own_masks = {name: mask for name, mask in of_model(masks).items() if not mask.all()}
    return Network(
        model=model,
        kept=kept,
        forward=_forward(run, model, kept),
        average=average,
        drop_path=drop_path,
        statistics=running_statistics(model) if run.processes.several else [],
        frozen={name: (mask == 0, dense[name].clone()) for name, mask in followers.items()},
        masked=[parameters[name] for name in own_masks],
        masks=list(own_masks.values()),
        doomed={name: mask for name, mask in of_model(_doomed_masks(run, masks)).items() if mask.any()},
    )


def _trained_model(run: Run) -> tuple[nn.Module, Kept]:
    """The network that trains, and the units that it holds when it is smaller than the dense one."""
    kept = run.progress.kept
    removed = any(len(kept[key]) < group.count for key, group in run.units.items())
    if not removed or not (run.args.compact_training or run.args.struct == "oneshot"):
        return run.dense, {}
    model = remove_units(copy.deepcopy(run.dense), run.units, kept)
    layout = run.family.memory_format(True, run.precision)
    return model if layout is None else model.to(memory_format=layout), kept


def _average(run: Run, model: nn.Module, kept: Kept, masks: Mapping[str, Tensor]) -> Average:
    """The average of the network's weights: at the start of a state, they; later what `run` has, under the masks."""
    so_far = None
    if run.progress.step:
        so_far = {name: value * masks.get(name, 1) for name, value in run.average.items()}
        if kept:
            so_far = slice_tensors(so_far, run.units, kept)
    return Average(model, run.args.ema_decay, so_far)


def _forward(run: Run, model: nn.Module, kept: Kept) -> nn.Module:
    args, like, pixels = run.args, next(model.parameters()), run.family.image_size(run.dense)
    features = is_taught(args, run.progress.state) and bool(args.kd_features)
    emptied = any(not ids for ids in kept.values())
    shared = run.processes.wrap(Answering(model, features), like.new_zeros(1, 3, pixels, pixels), emptied)
    if not args.compile or args.compile == "graph":
        return shared
    torch.compiler.reset()  # or the networks of many states pass the limit of recompilations
    mode = "default" if args.compile == "compiled-graph" else args.compile
    return torch.compile(shared, mode=mode, dynamic=False)


def _doomed_masks(run: Run, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """1 where a weight is still there and the target has none, by parameter name, in dense shapes."""
    target = run.parameter_masks(run.progress.target, run.progress.target_kept)
    return {name: masks.get(name, 1) * (1 - mask) for name, mask in target.items()}
