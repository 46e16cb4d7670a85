"""The run: flags, device, data and a first model in; between states weights are cut, doomed and rewound here.

What lives as long as the run stands in `Run`; of that, what changes is `progress`, which a checkpoint holds together
with the weights. What lives as long as a state is `training.StateTraining`.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset import Batches, FolderBatches, FolderSplit, Split, Splits, make_batches
from engine import journal
from engine.allocation import Timed
from engine.checkpoint import (
    MASK_SETS,
    Background,
    RunState,
    Target,
    fitting,
    is_selected,
    promote_best,
    save_checkpoint,
)
from engine.distill import SELF, Teacher, is_taught, wants_teacher
from engine.evaluation import accuracies
from engine.finish import finish_line, finish_schedule, finish_split, finish_steps, scaled_schedule
from engine.folder import plain_args, write_flags
from engine.mixing import Mixing
from engine.model import has_two_heads, run_length, state_epochs, units_of_run
from engine.optimizer import Schedule, check_moments
from engine.processes import ALONE, Processes, running_statistics
from engine.repairing import repaired_at_start
from engine.starting import START, start_is_best
from engine.tracking import Tracker
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
    restore_random_states,
    save_tensors,
    sha256,
    weights_of,
)

log = logging.getLogger(__name__)

EVAL_BATCH = 256


class Run:
    """One run: its dense model, data, files and progress.

    `dense` has the original shapes and holds the weights between states, `average` their average where one is kept.
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
        self.share = replace(processes.share, paired=processes.several and mixes)  # of training batches
        self.train_data = self._training_batches(splits.train)
        self.mixing = None
        if mixes:
            alphas = args.mixup or 0.0, args.cutmix or 0.0
            self.mixing = Mixing(*alphas, args.label_smoothing, facts.classes, args.seed, self.share.paired)
        self.teacher, self.teacher_sha256 = None, ""  # of teacher.pt, when state 0 teaches
        if teacher is not None:
            self.be_taught_by(teacher)
        batch, share = EVAL_BATCH * processes.size, processes.share
        self.val_data = make_batches(splits.val, facts, batch, device, workers=workers, share=share)
        self.test_data = make_batches(splits.test, facts, batch, device, workers=workers, share=share)
        self.states, self.epochs, milestones = run_length(args)
        self.steps_per_epoch = self.train_data.steps_per_epoch
        self.total_steps = self.state_steps = self.steps_per_epoch * self.epochs
        self.rounds, self.finish_state, self.finish_total = self.states, None, 0
        if args.finish_epochs:
            per_epoch = finish_steps(args, len(splits.train.labels), len(splits.val.labels))
            self.rounds, self.finish_state = self.states + 1, self.states
            self.finish_total = per_epoch * args.finish_epochs
        self.schedule = Schedule(
            args.sched, args.lr, args.warmup, tuple(milestones), self.steps_per_epoch, self.total_steps, args.min_lr
        )
        self.usual = self.epochs, self.total_steps, self.schedule  # of the states behind state 0
        self.dense_steps = self.steps_per_epoch * state_epochs(args, 0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        self.average: dict[str, Tensor] = {}
        self.rewind_weights: dict[str, Tensor] = {}
        self.progress = RunState()
        self.optimizer: torch.optim.Optimizer | None = None  # of the state that trains
        self.signals, self.bar = StopSignals(processes.several), tqdm(disable=True)
        self.late = False  # the time for a checkpoint has come, as several processes agreed
        self.writer = Background()
        self.clock = self.last_checkpoint = time.perf_counter()  # up to which the state's seconds are counted
        self.tracker: Tracker | None = None

    def _training_batches(self, split: Split | FolderSplit) -> Batches | FolderBatches:
        args, batch = self.args, self.args.batch_size * self.args.accum_steps
        self.images_a_step = min(batch, len(split.labels))  # of all processes
        facts = replace(self.facts, flip=self.facts.flip and args.flip)
        return make_batches(split, facts, batch, self.device, args.seed, args.aug, args.workers, self.share)

    # -- start, go on, end

    def start(self) -> None:
        """A fresh run: initial weights on disk, nothing pruned."""
        self.processes.spread_(self.dense.state_dict().values())
        self.keep_for_rewind("init.pt")
        masks = full_masks(self.prunable())
        everything = {key: list(range(group.count)) for key, group in self.units.items()}
        self.progress = RunState(masks=masks, target=masks, elementwise=masks, kept=everything, target_kept=everything)
        self.start_tracking()
        self._say_what_counts()
        if self.states > 1 and isinstance(self.allocation, Timed):
            self.write(self.allocation.measure, self)

    def take_over(self, content: dict) -> None:
        """Go where a checkpoint stands, but for the training of a state, which `training.resume` adds.

        Raises:
            RunError: it is of another run, or damaged.
        """
        with fitting("progress"):
            self.progress = RunState.unpack(content["run"], self.device)
        self._enter_state()
        finish_before = content["args"].get("finish_epochs")
        if self.args.finish_epochs and finish_before and self.args.finish_epochs > finish_before:
            self._lengthen_finish(finish_before)
        elif self.finishing:
            self._enter_finish()
        with fitting("progress"):
            unvalidated = self.finish_state if self.args.finish_on_all else None
            journal.check_rows(self.progress, self.steps_per_epoch, unvalidated)
            self._check_progress()
        path = self.save_dir / content["rewind_file"]
        self.rewind_weights = load_tensors(path, "--resume")
        self.rewind_file, self.rewind_sha256 = content["rewind_file"], sha256(path)
        if self.rewind_sha256 != content["rewind_sha256"]:
            raise RunError(f"--resume: {path} is not the file that this run started from")
        with fitting("weights"):
            self.dense.load_state_dict(content["weights"])
        if self.finishing and not finish_before:  # the run had ended, and its last weights are those of the last step
            self._start_from_selected()
        with fitting("average"):
            self._take_average(content.get("average", {}))
        self.teacher_sha256 = content.get("teacher_sha256", "")
        with fitting("random"):
            restore_random_states(content["random"])

    def _check_progress(self) -> None:
        """Raises: ValueError, when steps, masks or units are not those of this model and these flags."""
        progress, shapes = self.progress, {name: weight.shape for name, weight in self.prunable().items()}
        if progress.state > self.rounds or progress.step > self.total_steps:
            raise ValueError(f"state {progress.state}, step {progress.step} lie behind the end")
        for name in MASK_SETS:
            if {layer: mask.shape for layer, mask in getattr(progress, name).items()} != shapes:
                raise ValueError(f"{name}: other layers or shapes than this model's")
        for name in ("kept", "target_kept"):
            kept = getattr(progress, name)
            if kept.keys() != self.units.keys() or any(
                len({*ids}) < len(ids) or any(unit >= self.units[key].count for unit in ids)
                for key, ids in kept.items()
            ):
                raise ValueError(f"{name}: other units than this model's")

    def _lengthen_finish(self, epochs: int) -> None:
        """Of a run that has begun its finish, or done it, in which it had fewer `epochs`: further ones follow."""
        progress = self.progress
        if progress.state >= self.finish_state:
            done = progress.state > self.finish_state
            progress.state = self.finish_state
            self._enter_finish()
            if done:
                progress.step, progress.begun = epochs * self.steps_per_epoch, True
                progress.states.pop()
            if progress.begun:
                self.args.notes.append(
                    f"--finish_epochs {self.args.finish_epochs}: the epochs to come have the learning rates of so long "
                    f"a finish, those that are done have those of {epochs} epochs"
                )

    def _start_from_selected(self) -> None:
        best = load_tensors(self.save_dir / "best.pt", "best.pt")
        row = self.progress.states[-1]
        if best["state"] != row["state"] or best["epoch"] != row["best_epoch"]:
            raise RunError(
                f"--finish_epochs {self.args.finish_epochs}: {self.save_dir / 'best.pt'} is not the model that state "
                f"{row['state']} selected; go on from the latest checkpoint"
            )
        self.dense.load_state_dict(best["weights"])

    def _take_average(self, average: dict[str, Tensor]) -> None:
        shapes = {name: value.shape for name, value in self.dense.state_dict().items()} if self.args.ema_decay else {}
        if {name: value.shape for name, value in average.items()} != shapes:
            raise ValueError("the average of the weights")
        self.average = {name: value.to(self.device) for name, value in average.items()}

    def go_on(self) -> None:
        """What a resumed run writes first: files as they were at the checkpoint."""
        self.write(self._find_best)
        self.write(write_flags, self.save_dir, self.args)  # more states, other devices
        self.write(journal.write, self.save_dir, self.progress)
        self.start_tracking()
        log.info(f"resumed at {self.title}, step {self.progress.step} of {self.total_steps}")
        self._say_what_counts()

    def _say_what_counts(self) -> None:
        if self.processes.several:
            images, size = self.args.batch_size, self.processes.size
            log.info(f"{size} processes: each shows {images // size} of the {images} images of a forward pass")
            if running_statistics(self.dense):
                log.info("  batch norm goes by the images of each process; its running statistics are averaged")
        if self.args.token_merge:
            log.info(merging_line(self.dense))
        if self.teacher:
            self._say_who_teaches()
        if self.args.ema_decay:
            log.info(
                f"ema: validated, selected, tested and exported is the average of the weights, decay "
                f"{self.args.ema_decay:g}; scores, rewinding and what goes on training use the weights themselves"
            )

    def start_tracking(self) -> None:
        args = self.args
        self.tracker = Tracker(
            args.wandb_mode if self.processes.first else "disabled", self.save_dir, self.progress.wandb_id,
            project=args.wandb_project, entity=args.wandb_entity, name=self.save_dir.resolve().name,
            config=plain_args(args),
        )  # fmt: skip
        self.progress.wandb_id = self.tracker.run_id

    def whole_run_bar(self) -> tqdm:
        """Steps of all states and of the finish with the time left, on a terminal."""
        total = self._steps_before(self.states) + self.finish_total
        done = min(total, self._steps_before(self.progress.state) + self.progress.step)
        quiet = not sys.stdout.isatty()
        self.bar = tqdm(
            total=total, initial=done, desc="run", unit=" steps", position=1, leave=False, disable=quiet
        )  # fmt: skip
        return self.bar

    def close(self) -> None:
        """Give back processes and threads, whatever happened; all that was written is on disk afterwards."""
        self.train_data.close()
        if self.tracker:
            self.tracker.finish()
        self.writer.wait()

    # -- between states

    def begin_state(self) -> None:
        progress, self.clock = self.progress, time.perf_counter()
        progress.begun, progress.step, progress.seconds, progress.start_norm = True, 0, 0.0, None
        progress.cut, progress.best = {}, {}
        if self.finishing:
            log.info(finish_line(self.args, len(self.train_data.labels), self.states - 1))
        else:
            self._enter_state()

    def _enter_state(self) -> None:
        """From now on epochs and rates are those of state 0, which may have its own, or of the states behind it."""
        self.epochs, self.total_steps, self.schedule = self.usual
        epochs = state_epochs(self.args, self.progress.state)
        if epochs != self.epochs:
            self.epochs, self.total_steps = epochs, epochs * self.steps_per_epoch
            self.schedule = scaled_schedule(self.args, epochs, self.args.lr, self.steps_per_epoch)

    def _steps_before(self, state: int) -> int:
        """Optimizer steps of the states before this one."""
        return state * self.state_steps + (self.dense_steps - self.state_steps if state else 0)

    def prunes(self) -> bool:
        """Whether something goes before, or in, the state that begins."""
        return 0 < self.progress.state < self.states and self.args.struct != "dense"

    def doom(self, target: Target) -> None:
        """RSST: what goes trains on until the cut, under the penalty; what refill returns comes back now."""
        progress = self.progress
        progress.target, progress.target_kept = target
        progress.masks = {name: torch.maximum(mask, progress.target[name]) for name, mask in progress.masks.items()}
        progress.kept = {key: sorted({*ids, *progress.target_kept[key]}) for key, ids in progress.kept.items()}

    def cut_at_once(self, target: Target) -> None:
        """Refill: what goes is zero from now on, and what stays is repaired. Measured before repair and rewind: trained
        weights without and with masks."""
        progress = self.progress
        repaired = repaired_at_start(self, target)
        progress.target, progress.target_kept = target
        progress.masks, progress.kept = target
        masks = self.parameter_masks(*target)
        enforce(self.dense, masks)
        after = self.selected_accuracy(masks)
        progress.cut = {"before": journal.accuracy_at_start(progress), "after": after}
        self.dense.load_state_dict(repaired, strict=False)

    def selected_accuracy(self, masks: dict[str, Tensor]) -> float:
        """Of the validation images, under masks by parameter name: by the average of the weights where one is kept."""
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
        stays = () if self.args.fc else (self.family.classifier,)
        start = {name: value for name, value in self.rewind_weights.items() if not name.startswith(stays)}
        self.dense.load_state_dict({**self.dense.state_dict(), **start})

    def be_taught_by(self, model: nn.Module) -> None:
        """From now on part of the loss is the distance from this network's answers; see `distill.Teacher`."""
        like, args = next(self.dense.parameters()), self.args
        as_they_are = args.aug == "none" and self.mixing is None
        options = as_they_are, bool(args.kd_features), self.processes
        self.teacher = Teacher(model, self.train_data, like, self.precision, *options)

    def _say_who_teaches(self) -> None:
        args = self.args
        how = "by its hard labels" if args.kd_hard else f"at temperature {args.kd_temperature:g}"
        features = f" and its features at weight {args.kd_features:g}" if args.kd_features else ""
        two = has_two_heads(self.dense) and args.kd_alpha
        heads = "; only the head of the distillation token sees its logits" if two else ""
        kept = f"; its logits{' and features' if features else ''} are kept" if self.teacher.tables else ""
        log.info(
            f"distillation: {args.teacher} teaches, with {args.kd_alpha:g} of the loss {how}{features}{heads}{kept}"
        )

    def find_teacher(self) -> None:
        """From state 1 on the selected model of state 0 teaches, with `--teacher self`."""
        if self.args.teacher != SELF or not is_taught(self.args, self.progress.state) or self.teacher:
            return
        model = copy.deepcopy(self.dense)
        self.write(self._load_teacher, model)
        self.processes.spread_(model.state_dict().values())
        self.be_taught_by(model)
        self._say_who_teaches()

    def _load_teacher(self, model: nn.Module) -> None:
        path = self.save_dir / "teacher.pt"
        model.load_state_dict(load_tensors(path, "--teacher self"))
        if sha256(path) != self.teacher_sha256:
            raise RunError(f"--teacher self: {path} is not the file that state 0 of this run wrote", code=1)

    @property
    def finishing(self) -> bool:
        """Whether the round that trains, or is next, is the finish, behind the last state."""
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

    def _enter_finish(self) -> None:
        """From now on epochs, rates and, with --finish_on_all, images are those of the finish."""
        args = self.args
        if args.finish_on_all:
            self.train_data.close()
            self.train_data = self._training_batches(finish_split(args, self.splits))
            if self.teacher:
                self.be_taught_by(self.teacher.model)  # about these images
        self.epochs, self.steps_per_epoch = args.finish_epochs, self.train_data.steps_per_epoch
        self.total_steps, self.schedule = self.finish_total, finish_schedule(args, self.steps_per_epoch)

    def end_state(self) -> None:
        """Test the selected model, write the state's line; `dense` keeps the weights of the last step.

        Only a finish goes on with the selected ones: they stand in the checkpoint that is written here, since
        best.pt may be of the finish already where a killed run goes on from it.
        """
        progress, finish_follows = self.progress, self.progress.state + 1 == self.finish_state
        last = weights_of(self.dense)
        for data in (self.train_data, self.val_data, self.test_data):
            for broken in self.processes.gathered(data.broken):
                data.note(broken.items())
        self.write(self._load_selected, finish_follows)
        self.processes.spread_(self.dense.state_dict().values())
        if progress.state == 0 and self.args.teacher == SELF and wants_teacher(self.args):
            self.write(self._keep_teacher)
        test = self.evaluate(self.dense, "test")
        if not finish_follows:
            self.dense.load_state_dict(last)
        self._count_seconds()
        row = journal.state_row(progress, self.family.cost(self.dense, progress.kept), self.units, test)
        progress.states.append(row)
        if not self.finishing:  # which changes no unit
            progress.units += journal.unit_rows(progress, self.units)
        self.write(journal.write_states, self.save_dir, progress)
        test_values = {f"test/{name}": value for name, value in test.items()}
        selected = {"val/best_accuracy": progress.best["accuracy"]} if "accuracy" in progress.best else {}
        self.track(test_values | selected, after=1)
        log.info(journal.state_line(row, self.title))
        if said := start_is_best(self):
            log.warning("%s", said)
        progress.state, progress.step, progress.begun = progress.state + 1, 0, False
        if finish_follows:
            self._enter_finish()
        if progress.state == self.rounds and self.states > 1 and isinstance(self.allocation, Timed):
            self.write(self.allocation.measure_result, self)
        self.checkpoint()

    def _load_selected(self, finish_follows: bool) -> None:
        self.writer.wait()
        progress, path = self.progress, self.save_dir / "best.pt"
        if not progress.best:  # lost, and no epoch followed; see `_find_best`
            log.warning("the weights of the last epoch are tested and kept as the best")
            if finish_follows:
                log.warning("the finish goes on from them, too")
            last = progress.history[-1] if self.total_steps else {"epoch": START}
            progress.best = {"epoch": last["epoch"]}
            if "val_accuracy" in last:
                progress.best["accuracy"] = last["val_accuracy"]
            weights = cpu_copy(self.average) if self.args.ema_decay else weights_of(self.dense)
            save_tensors(path, {"weights": weights, "state": progress.state, "kept": progress.kept, **progress.best})
        self.dense.load_state_dict(load_tensors(path, "best.pt")["weights"])

    def _find_best(self) -> None:
        """After a resume: the file of the model that the checkpoint's state has selected so far, or none.

        An older checkpoint may be left behind by the files of later epochs. Then the epochs to come select anew, so
        that tables and weights tell of one epoch.
        """
        progress, fresh = self.progress, self.save_dir / "best.new.pt"
        if fresh.is_file() and is_selected(load_tensors(fresh, "best.new.pt"), progress):
            promote_best(self.save_dir)
        fresh.unlink(missing_ok=True)  # of an epoch that is to be trained again
        if not (progress.begun and progress.best):
            return
        path = self.save_dir / "best.pt"
        if not (path.is_file() and is_selected(load_tensors(path, "best.pt"), progress)):
            log.warning(
                f"best.pt is of another epoch than epoch {progress.best['epoch'] + 1} of {self.title}, which the "
                "checkpoint names (resumed from an older one): the epochs to come select anew"
            )
            progress.best = {}

    def _keep_teacher(self) -> None:
        save_tensors(self.save_dir / "teacher.pt", weights_of(self.dense))
        self.teacher_sha256 = sha256(self.save_dir / "teacher.pt")

    # -- at any time

    def write(self, write: Callable, *arguments) -> None:
        """Of several processes the first one alone writes files, and reads those that change."""
        if self.processes.first:
            write(*arguments)

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
        # tested is what the run hands over, in its weights' own precision; validation goes by --amp
        return accuracies(model, data, self.precision if part == "val" else None, self.processes)

    def track(self, values: dict[str, float], after: int = 0) -> None:
        """Send numbers of the step done, on an axis that rises strictly over the states; each state's end is a step."""
        state = self.progress.state
        self.tracker.log(values, self._steps_before(state) + state + self.progress.step + after)

    def keep_for_rewind(self, name: str) -> None:
        """The weights of now are those that later states start from."""
        self.rewind_weights, self.rewind_file = weights_of(self.dense), name
        self.write(save_tensors, self.save_dir / name, self.rewind_weights)
        self.rewind_sha256 = sha256(self.save_dir / name) if self.processes.first else ""

    def agree(self) -> None:
        """After each step of several processes: what they do about signals and time, all after the same step."""
        if self.processes.several:
            late = self.processes.first and self._is_late()
            self.signals.agreed, self.late = self.processes.vote(self.signals.heard, late)

    def checkpoint_due(self) -> bool:
        every = self.args.checkpoint_every
        if every is None:
            return False
        if every.endswith("m"):
            return bool(self.late) if self.processes.several else self._is_late()
        return self.progress.step % int(every) == 0

    def _is_late(self) -> bool:
        every = self.args.checkpoint_every or ""
        return every.endswith("m") and time.perf_counter() - self.last_checkpoint >= 60 * int(every[:-1])

    def checkpoint(self) -> None:
        """Take a copy of everything that the run needs to go on; a thread writes it."""
        self._count_seconds()
        self.last_checkpoint = self.clock
        self.write(self._copy_and_write)

    def _count_seconds(self) -> None:
        """Of the state so far: choosing, rewinding, training, validating and testing; what a killed run lost is not
        counted."""
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.clock = now

    def _copy_and_write(self) -> None:
        self.writer.wait()  # no more than one copy at a time
        moments = self.optimizer.state_dict()["state"] if self.optimizer else {}
        try:
            if self.optimizer:
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
        self.writer.submit(_write_checkpoint, self.save_dir, self.progress.snapshot(), content)


def _write_checkpoint(save_dir: Path, progress: RunState, content: dict) -> None:
    save_checkpoint(save_dir, {"run": progress.pack(), **content})
    promote_best(save_dir)


@torch.no_grad()
def enforce(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Masked weights become zero, in place; `masks` by parameter name."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)
