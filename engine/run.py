"""The run: flags, device, data and a first model in; between states weights are pruned, doomed and rewound here.

What lives as long as the run stands in `Run`; of that, what changes is `progress`, which a checkpoint holds together
with the weights. A state is trained by `training.StateTraining`; `recorder.Recorder` writes checkpoints and tracks;
`resume` puts a checkpoint back into a run.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset import Batches, FolderBatches, FolderSplit, Split, Splits, make_batches
from engine import journal
from engine.allocation import Timed
from engine.averaging import averaging_line
from engine.checkpoint import RunState, Target
from engine.distill import SELF, Teacher, is_taught, teacher_line, wants_teacher
from engine.evaluation import accuracies
from engine.mixing import Mixing
from engine.model import has_two_heads, run_length, units_of_run
from engine.optimizer import check_moments
from engine.processes import ALONE, Processes, processes_lines
from engine.recorder import Recorder
from engine.rounds import finish_line, finish_round, finish_split, finish_steps, state_round
from engine.run_folder import plain_args
from families import family_of
from models.merging import merging_line
from pruning.masks import Masks, full_masks
from pruning.units import unit_masks
from utils import (
    RunError,
    StopSignals,
    cpu_copy,
    load_tensors,
    pick_precision,
    random_states,
    save_tensors,
    sha256,
    weights_of,
)

log = logging.getLogger(__name__)

EVAL_BATCH = 256


class Run:
    """One run: its dense model, data and progress.

    Attributes:
        dense: the model in its original shapes, which holds the weights between states.
        average: the average of its weights where one is kept, by name; between states and at every `sync_dense`.
        round: what trains now, or next: the same for all states, another for the finish.
        rounds: how many there are, the finish included; it counts as state `finish_state`.
        share: this process's share of the training batches.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        splits: Splits,
        dense: nn.Module,
        save_dir: Path,
        teacher: nn.Module | None = None,
        processes: Processes = ALONE,
    ):
        self.args, self.device, self.save_dir, self.splits = args, device, save_dir, splits
        self.processes = processes
        self.precision = pick_precision(args.amp, device)
        self.family = family_of(dense)
        self.dense = dense.to(device)
        layout = self.family.memory_format(False, self.precision)
        if layout is not None:
            self.dense.to(memory_format=layout)
        self.units, self.allocation = units_of_run(args, dense)
        self.facts, facts, workers = splits.facts, splits.facts, args.workers
        mixes = bool(args.mixup or args.cutmix)
        self.share = replace(processes.share, paired=processes.several and mixes)
        self.mixing = None
        if mixes:
            alphas = args.mixup or 0.0, args.cutmix or 0.0
            self.mixing = Mixing(*alphas, args.label_smoothing, facts.classes, args.seed, self.share.paired)
        self.round = state_round(args, self._training_batches(splits.train))
        self.teacher: Teacher | None = None
        self.teacher_sha256 = ""  # of teacher.pt, with --teacher self
        if teacher is not None:
            self.set_teacher(teacher)
        batch, share = EVAL_BATCH * processes.size, processes.share
        self.val_data = make_batches(splits.val, facts, batch, device, workers=workers, share=share)
        self.test_data = make_batches(splits.test, facts, batch, device, workers=workers, share=share)
        self.states, *_ = run_length(args)
        self.state_steps = self.round.total_steps
        self.finish_state = self.states if args.finish_epochs else None
        self.rounds = self.states + (self.finish_state is not None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        self.average: dict[str, Tensor] = {}
        self.rewind_weights: dict[str, Tensor] = {}
        self.rewind_file = self.rewind_sha256 = ""
        self.progress = RunState()
        self.optimizer: torch.optim.Optimizer | None = None  # of the state that trains
        self.recorder = Recorder(args, save_dir, processes)
        self.signals, self.bar = StopSignals(processes.several), tqdm(disable=True)

    def _training_batches(self, split: Split | FolderSplit) -> Batches | FolderBatches:
        args, batch = self.args, self.args.batch_size * self.args.accum_steps
        facts = replace(self.facts, flip=self.facts.flip and args.flip)
        return make_batches(split, facts, batch, self.device, args.seed, args.aug, args.workers, self.share)

    # -- start and end

    def start(self) -> None:
        """A fresh run: initial weights on disk, nothing pruned."""
        self.processes.broadcast_(self.dense.state_dict().values())
        self.keep_for_rewind("init.pt")
        masks = full_masks(self.prunable())
        everything = {key: list(range(group.count)) for key, group in self.units.items()}
        self.progress = RunState(masks=masks, target=masks, elementwise=masks, kept=everything, target_kept=everything)
        self.recorder.start_tracking(self.progress)
        self.log_settings()
        if self.states > 1 and isinstance(self.allocation, Timed):
            self.processes.on_first(self.allocation.measure, self)

    def log_settings(self) -> None:
        """Processes, token merging, teacher and averaging, into the log."""
        for line in processes_lines(self.processes, self.args.batch_size, self.dense):
            log.info(line)
        if self.args.token_merge:
            log.info(merging_line(self.dense))
        if self.teacher:
            log.info(teacher_line(self.args, self.teacher, has_two_heads(self.dense)))
        if self.args.ema_decay:
            log.info(averaging_line(self.args.ema_decay))

    def whole_run_bar(self) -> tqdm:
        """Steps of all states and of the finish with the time left, on a terminal."""
        total = self.states * self.state_steps
        if self.args.finish_epochs:
            images = len(self.splits.train.labels), len(self.splits.val.labels)
            total += self.args.finish_epochs * finish_steps(self.args, *images)
        done = min(total, self.progress.state * self.state_steps + self.progress.step)
        quiet = not sys.stdout.isatty()
        self.bar = tqdm(
            total=total, initial=done, desc="run", unit=" steps", position=1, leave=False, disable=quiet
        )  # fmt: skip
        return self.bar

    def close(self) -> None:
        """Give back processes and threads, whatever happened; all that was written is on disk afterwards."""
        self.round.data.close()
        self.recorder.close()

    # -- between states

    def begin_state(self) -> None:
        progress = self.progress
        self.recorder.timer.restart("state")
        progress.begun, progress.step, progress.seconds, progress.start_norm = True, 0, 0.0, None
        progress.cut, progress.best = {}, {}
        if self.finishing:
            log.info(finish_line(self.args, len(self.round.data.labels), self.states - 1))

    def prunes(self) -> bool:
        """Whether something is pruned before, or in, the state that begins."""
        return 0 < self.progress.state < self.states and self.args.struct != "dense"

    def doom(self, target: Target) -> None:
        """RSST: doomed weights train on until the cut, under the penalty; what refill returns comes back now."""
        progress = self.progress
        progress.target, progress.target_kept = target
        progress.masks = {name: torch.maximum(mask, progress.target[name]) for name, mask in progress.masks.items()}
        progress.kept = {key: sorted({*ids, *progress.target_kept[key]}) for key, ids in progress.kept.items()}

    def cut_at_once(self, target: Target) -> None:
        """Refill: pruned weights are zero from now on. Accuracy before and after is that of the trained weights, before
        they are rewound."""
        progress = self.progress
        progress.target, progress.target_kept = target
        progress.masks, progress.kept = target
        masks = self.parameter_masks(*target)
        enforce(self.dense, masks)
        after = self._selected_accuracy(masks)
        progress.cut = {"before": progress.history[-1]["val_accuracy"], "after": after}

    def _selected_accuracy(self, masks: dict[str, Tensor]) -> float:
        """Validation accuracy under masks by parameter name, of the average of the weights where one is kept."""
        if not self.average:
            return self.evaluate(self.dense, "val")["accuracy"]
        last = weights_of(self.dense)
        self.dense.load_state_dict(self.average)
        enforce(self.dense, masks)
        found = self.evaluate(self.dense, "val")["accuracy"]
        self.dense.load_state_dict(last)
        return found

    def rewind(self) -> None:
        """Put `dense` where the next state starts; see --prune_type."""
        if self.args.prune_type == "finetune":
            if self.args.struct == "refill" and not self.units:
                # refilled weights start at zero
                enforce(self.dense, {f"{name}.weight": mask for name, mask in self.progress.elementwise.items()})
            return
        trained = () if self.args.fc else (self.family.classifier,)
        start = {name: value for name, value in self.rewind_weights.items() if not name.startswith(trained)}
        self.dense.load_state_dict({**self.dense.state_dict(), **start})

    def set_teacher(self, model: nn.Module) -> None:
        """From now on part of the loss is the distance from this network's outputs; see `distill.Teacher`."""
        like, args = next(self.dense.parameters()), self.args
        unchanged = args.aug == "none" and self.mixing is None
        options = unchanged, bool(args.kd_features), self.processes
        self.teacher = Teacher(model, self.round.data, like, self.precision, *options)

    def load_own_teacher(self) -> None:
        """With `--teacher self`, from state 1 on: the selected model of state 0 teaches."""
        if self.args.teacher != SELF or not is_taught(self.args, self.progress.state) or self.teacher:
            return
        model = copy.deepcopy(self.dense)
        self.processes.on_first(self._load_teacher, model)
        self.processes.broadcast_(model.state_dict().values())
        self.set_teacher(model)
        log.info(teacher_line(self.args, self.teacher, has_two_heads(self.dense)))

    def _load_teacher(self, model: nn.Module) -> None:
        path = self.save_dir / "teacher.pt"
        model.load_state_dict(load_tensors(path, "--teacher self"))
        if sha256(path) != self.teacher_sha256:
            raise RunError(f"--teacher self: {path} is not the file that state 0 of this run wrote", code=1)

    @property
    def finishing(self) -> bool:
        """Whether the round that trains, or is next, is the finish, after the last state."""
        return self.progress.state == self.finish_state

    @property
    def title(self) -> str:
        """Of the round that trains, for the log."""
        state = self.progress.state
        if self.finish_state is None or state < self.finish_state:
            return f"state {state}"
        return "finish" if self.finishing else "end"

    @property
    def trains_on_all(self) -> bool:
        """Whether validation images train now, so that they cannot tell how good a model is."""
        return self.finishing and self.args.finish_on_all

    def enter_finish(self) -> None:
        """From now on the round is the finish."""
        data = self.round.data
        if self.args.finish_on_all:
            data.close()
            data = self._training_batches(finish_split(self.args, self.splits))
        self.round = finish_round(self.args, data)
        if self.args.finish_on_all and self.teacher:
            self.set_teacher(self.teacher.model)  # its outputs for these images

    def end_state(self) -> None:
        """Test the selected model, write the state's line; `dense` keeps the weights of the last step.

        Only a finish starts from the selected ones: they stand in the checkpoint that is written here, since
        best.pt may be of the finish already when a killed run is resumed from it.
        """
        progress, finish_follows = self.progress, self.progress.state + 1 == self.finish_state
        last = weights_of(self.dense)
        for data in (self.round.data, self.val_data, self.test_data):
            for broken in self.processes.gathered(data.broken):
                data.note(broken.items())
        self.processes.on_first(self._load_selected, finish_follows)
        self.processes.broadcast_(self.dense.state_dict().values())
        if progress.state == 0 and self.args.teacher == SELF and wants_teacher(self.args):
            self.processes.on_first(self._keep_teacher)
        test = self.evaluate(self.dense, "test")
        if not finish_follows:
            self.dense.load_state_dict(last)
        progress.seconds += self.recorder.timer.restart("state")
        row = journal.state_row(progress, self.family.cost(self.dense, progress.kept), self.units, test)
        progress.states.append(row)
        if not self.finishing:  # which changes no unit
            progress.units += journal.unit_rows(progress, self.units)
        self.processes.on_first(journal.write_states, self.save_dir, progress)
        test_values = {f"test/{name}": value for name, value in test.items()}
        selected = {"val/best_accuracy": progress.best["accuracy"]} if "accuracy" in progress.best else {}
        self.track(test_values | selected, after=1)
        log.info(journal.state_line(row, self.title))
        progress.state, progress.step, progress.begun = progress.state + 1, 0, False
        if finish_follows:
            self.enter_finish()
        if progress.state == self.rounds and self.states > 1 and isinstance(self.allocation, Timed):
            self.processes.on_first(self.allocation.measure_result, self)
        self.checkpoint()

    def selected_model(self) -> dict:
        """What best.pt holds of the model of now, whose epoch and accuracy `progress.best` tells."""
        progress = self.progress
        weights = cpu_copy(self.average) if self.args.ema_decay else weights_of(self.dense)
        return {"weights": weights, "state": progress.state, "kept": progress.kept, **progress.best}

    def _load_selected(self, finish_follows: bool) -> None:
        self.recorder.writer.wait()
        progress, path = self.progress, self.save_dir / "best.pt"
        if not progress.best:  # lost, and no epoch followed; see `resume.find_best`
            log.warning("the weights of the last epoch are tested and kept as the best")
            if finish_follows:
                log.warning("the finish goes on from them, too")
            last = progress.history[-1]
            found = {"accuracy": last["val_accuracy"]} if "val_accuracy" in last else {}
            progress.best = {"epoch": last["epoch"], **found}
            save_tensors(path, self.selected_model())
        self.dense.load_state_dict(load_tensors(path, "best.pt")["weights"])

    def _keep_teacher(self) -> None:
        save_tensors(self.save_dir / "teacher.pt", weights_of(self.dense))
        self.teacher_sha256 = sha256(self.save_dir / "teacher.pt")

    # -- at any time

    @property
    def dtype(self) -> torch.dtype:
        return next(self.dense.parameters()).dtype

    def prunable(self) -> dict[str, Tensor]:
        """The prunable weights of `dense` by layer name, detached."""
        layers = self.family.prunable_layers(self.dense, self.args.prune_patch_embed)
        return {name: module.weight.detach() for name, module in layers.items()}

    def parameter_masks(self, masks: Masks, kept: dict) -> dict[str, Tensor]:
        """Masks by parameter name, in dense shapes, with all that belongs to removed units; whole ones are left out."""
        found = {f"{name}.weight": mask for name, mask in masks.items()}
        others = {name: p for name, p in self.dense.named_parameters() if name not in found}
        found |= unit_masks(self.units, kept, others)
        return {name: mask.detach() for name, mask in found.items() if not mask.all()}

    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        """Shares classified right of the images that validate ("val") or test ("test"); see `evaluation.accuracies`."""
        data = self.val_data if part == "val" else self.test_data
        # the test is of the model as it is exported, in its weights' own precision; validation uses --amp
        return accuracies(model, data, self.precision if part == "val" else None, self.processes)

    def track(self, values: dict[str, float], after: int = 0) -> None:
        """Send numbers of the step done, on an axis that rises strictly over the states; each state's end is a step."""
        step = self.progress.state * (self.state_steps + 1) + self.progress.step + after
        self.recorder.tracker.log(values, step)

    def keep_for_rewind(self, name: str) -> None:
        """The weights of now are those that later states start from."""
        self.rewind_weights, self.rewind_file = weights_of(self.dense), name
        self.processes.on_first(save_tensors, self.save_dir / name, self.rewind_weights)
        self.rewind_sha256 = sha256(self.save_dir / name) if self.processes.first else ""

    def checkpoint(self) -> None:
        """Take a copy of everything that a resumed run needs; a thread writes it.

        `progress.seconds` counts choosing, rewinding, training, validating and testing of the state so far; what a
        killed run lost is not counted.
        """
        self.progress.seconds += self.recorder.timer.restart("state")
        self.recorder.timer.restart("checkpoint")
        self.processes.on_first(self._copy_and_write)

    def _copy_and_write(self) -> None:
        self.recorder.writer.wait()  # no more than one copy at a time
        moments = self.optimizer.state_dict()["state"]
        try:
            check_moments(self.optimizer, self.args, moments)
            self.progress.check_types()
        except (TypeError, ValueError) as error:
            raise RunError(
                f"no run could go on from the checkpoint of now ({error}); the one before stays", 1
            ) from error
        content = {
            "weights": weights_of(self.dense),
            "moments": cpu_copy(moments),
            "average": cpu_copy(self.average),
            "scaler": self.scaler.state_dict(),
            "rewind_file": self.rewind_file,
            "rewind_sha256": self.rewind_sha256,
            "teacher_sha256": self.teacher_sha256,
            "random": random_states(),
            "args": plain_args(self.args),
            "data": self.splits.identity,
        }
        self.recorder.write_checkpoint(self.progress, content)


@torch.no_grad()
def enforce(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Masked weights become zero, in place; `masks` by parameter name."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)
