"""One state's training: the masks and units of `run.progress` and the weights of `run.dense` in, trained weights out.

What lives as long as a state stands here: the network that trains, its optimizer, masks and penalty, and the step.
"""

from __future__ import annotations

import copy
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm

import rsst
from engine import journal
from engine.averaging import Average
from engine.capture import CapturedStep
from engine.checkpoint import check_kinds, fitting, has_checkpoint
from engine.depth import StochasticDepth
from engine.distill import Answering, is_taught
from engine.objective import Objective, count_right
from engine.optimizer import (
    laid_out_like,
    load_moments,
    make_optimizer,
    moments_by_name,
    put_moments,
    set_rate,
)
from engine.processes import running_statistics
from engine.repairing import repair_in_state
from engine.run import Run, enforce
from pruning.masks import density
from pruning.removal import remove_units, scatter_tensors, slice_tensors
from pruning.units import follower_masks
from settings.flags import GRAPHS
from utils import RunError, autocast, cpu_copy, save_tensors, weights_of

log = logging.getLogger(__name__)


def resume(run: Run, content: dict) -> StateTraining | None:
    """Take over where a checkpoint stands; nothing is written before it proves sound.

    Returns:
        the training of the state that it broke off; None between two states.

    Raises:
        RunError: the checkpoint is of another run, or damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what does not belong there is refused, not commented
        with fitting("entries"):
            check_kinds(content)
        run.take_over(content)
        if not run.progress.begun or not run.total_steps:
            return None
        training = StateTraining(run)
        with fitting("optimizer"):
            load_moments(training.optimizer, training.model, run.args, content["moments"])
        if content["scaler"]:  # empty unless the run trained in fp16 so far
            with fitting("scaler"):
                run.scaler.load_state_dict(content["scaler"])
        return training


class StateTraining:
    """The training of the state that `run.progress` is in; `run.dense` gets the weights back at every `sync_dense`.

    `model` is what trains: `run.dense` itself, or the smaller network without the units that are cut already.
    """

    def __init__(self, run: Run):
        self.run, self.args, self.progress = run, run.args, run.progress
        device = run.device
        # read and written by every step, hence on the device and never replaced: a captured step knows their addresses
        self.sums = torch.zeros(2, dtype=torch.float64 if device.type != "mps" else None, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # all losses so far
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=device)  # steps of this epoch while that held
        self.bar: tqdm | None = None
        self.captured: CapturedStep | None = None
        self.residuals = rsst.Trace()
        self.build()
        run.last_checkpoint = time.perf_counter()

    # -- the network that trains and what acts on it

    def build(self) -> None:
        """Model, penalty and optimizer for the masks and units enforced now; `run.dense` holds the weights."""
        run, progress = self.run, self.progress
        masks = run.parameter_masks(progress.masks, progress.kept)
        target = run.parameter_masks(progress.target, progress.target_kept)
        enforce(run.dense, masks)
        doomed = {name: masks.get(name, 1) * (1 - mask) for name, mask in target.items()}
        self.model, self.model_kept = self._network()
        self.average = self._start_average(masks) if self.args.ema_decay else None
        if self.model_kept:
            masks, doomed = (slice_tensors(tensors, run.units, progress.kept) for tensors in (masks, doomed))
        parameters = dict(self.model.named_parameters())
        # what follows removed units takes no part in training and keeps its values, in full size as in small
        whole = run.dense.state_dict()
        followers = follower_masks(run.units, progress.kept, whole)
        self.frozen = {name: (mask == 0, whole[name].clone()) for name, mask in followers.items()}
        drops = self.args.drop_path
        self.depth = StochasticDepth(self.model, drops, self.args.seed, run.processes.share) if drops else None
        self.close()  # what went round the network before goes first
        self.wrapped = self._shared()
        self.forward = self._compiled()
        self.statistics = running_statistics(self.model) if run.processes.several else []
        self.objective = Objective(
            self.args.label_smoothing, self.args.kd_alpha or 0.0, self.args.kd_temperature, self.args.kd_hard,
            self.args.kd_features or 0.0,
        )  # fmt: skip
        self.captured = CapturedStep(self.device_step) if self.args.compile in GRAPHS else None
        masks = {name: laid_out_like(parameters[name], mask) for name, mask in masks.items() if not mask.all()}
        self.masked, self.masks = [parameters[name] for name in masks], list(masks.values())
        rate = torch.zeros((), dtype=run.dtype, device=run.device)
        self.optimizer = run.optimizer = make_optimizer(self.args, self.model, rate)
        doomed = {name: laid_out_like(parameters[name], mask) for name, mask in doomed.items()}
        self.penalty = rsst.Penalty(parameters, doomed, progress.start_norm)
        if self.penalty:
            self._plan_penalty()

    def close(self) -> None:
        """Let go of the captured step and of what is compiled. The step refers to this object: without this, its graph,
        the graph's memory and the network would live on until Python's garbage collector finds the cycle."""
        self.wrapped = self.forward = self.captured = None

    def _network(self) -> tuple[nn.Module, dict[str, list[int]]]:
        """The network that trains, and the units that it holds when it is smaller than the dense one."""
        run, kept = self.run, self.progress.kept
        removed = any(len(kept[key]) < group.count for key, group in run.units.items())
        if not removed or not (self.args.compact_training or self.args.struct == "oneshot"):
            return run.dense, {}
        model = remove_units(copy.deepcopy(run.dense), run.units, kept)
        layout = run.family.memory_format(True, run.precision)
        return model if layout is None else model.to(memory_format=layout), kept

    def _start_average(self, masks: dict[str, Tensor]) -> Average:
        """The average of the network's weights: of a state that starts, they; later what `run` has, under the masks."""
        run, so_far = self.run, None
        if self.progress.step:
            so_far = {name: value * masks.get(name, 1) for name, value in run.average.items()}
            if self.model_kept:
                so_far = slice_tensors(so_far, run.units, self.model_kept)
        return Average(self.model, self.args.ema_decay, so_far)

    @property
    def selected(self) -> nn.Module:
        """What is validated and, when it is the best, kept: the average of the weights, or they themselves."""
        return self.average.model if self.average else self.model

    def _shared(self) -> nn.Module:
        """The network as all processes train it together, whose forward pass gives an `Answer`."""
        run, like = self.run, next(self.model.parameters())
        taught, pixels = is_taught(self.args, self.progress.state), run.family.image_size(run.dense)
        network = Answering(self.model, features=taught and bool(self.args.kd_features))
        emptied = any(not ids for ids in self.model_kept.values())
        return run.processes.wrap(network, like.new_zeros(1, 3, pixels, pixels), emptied)

    def _compiled(self) -> nn.Module:
        mode, network = self.args.compile, self.wrapped
        if not mode or mode == "graph":
            return network
        torch.compiler.reset()  # or the networks of many states pass the limit of recompilations
        return torch.compile(network, mode="default" if mode == "compiled-graph" else mode, dynamic=False)

    def _plan_penalty(self) -> None:
        args, run = self.args, self.run
        self.progress.start_norm = self.penalty.start_norm
        self.cut_after = rsst.cut_step(run.total_steps, run.steps_per_epoch, args.reg_finish)
        sawtooth = args.reg_form == "gradient" and args.reg_clock != "state"
        period = run.steps_per_epoch if sawtooth else self.cut_after
        self.ramp = rsst.Ramp(args.RST_schedule, args.reg_granularity_prune, self.cut_after, period, args.exponents)
        self.doses = self._predict_dose()

    def _predict_dose(self) -> list[float]:
        """Dose after each step of this state, logged before it trains; empty when it cannot be known."""
        args, ramp = self.args, self.ramp
        if args.reg_form == "decay":
            doses = [ramp.dose(step) for step in range(ramp.steps + 1)]
            log.info(f"rsst: doomed weights shrink by exp(-{doses[-1]:.3g}) in {ramp.steps} steps, then they are cut")
            return doses
        if args.opt == "adamw":
            log.info("rsst: adamw normalises the penalty's gradient, so its dose is unknown; watch the residual")
            return []
        rates = [self.run.schedule.rate(step) for step in range(ramp.steps)]
        doses = rsst.predicted_dose(ramp, rates, args.momentum)
        lethal = next((step for step, dose in enumerate(doses) if dose >= rsst.LETHAL_DOSE), None)
        when = f"it passes {rsst.LETHAL_DOSE:g} at step {lethal} of {ramp.steps}" if lethal else "too little"
        log.info(f"rsst: predicted dose {doses[-1]:.3g} over this state, {when}")
        if lethal is None:
            log.warning(
                f"rsst: a dose below {rsst.LETHAL_DOSE:g} leaves much of the doomed weights; "
                "raise --reg_granularity_prune, --lr or --epochs, or use --reg_form decay"
            )
        return doses

    # -- a step

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.run.total_steps

    @property
    def at_cut(self) -> bool:
        """Whether the step just done is the last one of the penalty."""
        return bool(self.penalty) and self.progress.step == self.cut_after

    @property
    def at_epoch_end(self) -> bool:
        return self.progress.step % self.run.steps_per_epoch == 0

    def step(self) -> None:
        """One optimizer step: the rate and the penalty's strength of now, then all that the device does."""
        run, progress = self.run, self.progress
        epoch, batch = divmod(progress.step, run.steps_per_epoch)
        if self.bar is None:
            self._start_epoch(epoch, batch)
        images, targets = run.train_data.batch(progress.state, epoch, batch)
        images = images.to(run.dtype)
        if run.mixing:
            images, targets = run.mixing(images, targets, progress.state, epoch, batch)
        if self.depth:
            self.depth.draw(images, progress.state, epoch, batch, run.images_a_step)
        rate = run.schedule.rate(progress.step)
        set_rate(self.optimizer, rate)
        self.strength = 0.0  # lambda
        if self.penalty:
            self.strength = self.ramp.value(progress.step + 1)
            decays = self.args.reg_form == "decay"
            self.penalty.set_(self.ramp.exponent_at(progress.step + 1) if decays else self.strength)
        taught = ()
        if run.teacher:
            taught = run.teacher.lesson(images, self.args.accum_steps, progress.state, epoch, batch)
        self.update(images, targets, *taught)
        run.processes.mean_each_(self.statistics)
        progress.step += 1
        if self.average:
            self.average.update(progress.step)
        if self.penalty and self.ramp.is_recorded(progress.step):
            self.residuals.add(progress.step, self.strength, self.penalty.measure())
        self.bar.update()
        run.bar.update()
        run.agree()
        if (batch + 1) % self.args.print_freq == 0:
            self._log_batch(epoch, batch, rate)

    def _start_epoch(self, epoch: int, batch: int) -> None:
        run = self.run
        run.find_teacher()
        self.model.train()
        self.sums.copy_(torch.tensor(self.progress.sums if batch else [0.0, 0.0], dtype=self.sums.dtype))
        self.finite_steps.zero_()
        self.epoch_started, self.first_batch, self.first_step = time.perf_counter(), batch, self.progress.step
        title, quiet = f"{run.title} epoch {epoch + 1}/{run.epochs}", not sys.stdout.isatty()
        self.bar = tqdm(
            total=run.steps_per_epoch, initial=batch, desc=title, unit=" steps", leave=False, disable=quiet
        )  # fmt: skip

    def update(self, *tensors: Tensor) -> None:
        """`device_step`, as a CUDA graph where one was asked for."""
        (self.captured or self.device_step)(*tensors)

    def device_step(self, images: Tensor, targets: Tensor, *taught: Tensor) -> None:
        """All that the device does for one optimizer step; see `capture.CapturedStep` for what may stand here.

        Of several processes each shows its share of the images, and gradients are averaged in the last backward pass.

        Args:
            images: [B, 3, H, W], B = batch_size * accum_steps / processes.
            targets: labels [B], or the shares of all classes [B, classes] when images are mixed.
            taught: a teacher's logits [B, classes], when there is one, and its features [B, N, D], when they count.
        """
        args, optimizer, scaler = self.args, self.optimizer, self.run.scaler
        whole = self.run.images_a_step / self.run.processes.size
        start = 0
        for part, truth, *lesson in self._passes(images, targets, *taught):
            if self.depth:
                self.depth.show(start, start := start + len(part))
            with autocast(self.run.device, self.run.precision):
                answer = self.forward(part)
                loss = self.objective(answer, truth, *lesson)
            loss = loss * (len(truth) / whole)
            scaler.scale(loss).backward()
            self._count(loss.detach(), count_right(answer.logits.detach(), truth) / whole)
        self.finite_steps += self.finite
        scaler.unscale_(optimizer)
        self.mask_gradients()  # before clipping: dead weights have no say in the norm
        if self.penalty and args.block_loss_grad:
            self.penalty.block_gradients_()
        if args.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_grad)
        if self.penalty and args.reg_form == "gradient":
            self.penalty.add_to_gradients_()
        scaler.step(optimizer)
        scaler.update()
        self.mask_weights()
        if self.penalty and args.reg_form == "decay":
            self.penalty.shrink_(self.ramp.parts)
        optimizer.zero_grad(set_to_none=True)  # here: gradients that outlive a graph would hold its memory

    def _passes(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The parts of a step's images, targets and more for each forward pass; in the last one's backward pass the
        processes average their gradients."""
        *others, last = zip(*(tensor.chunk(self.args.accum_steps) for tensor in tensors), strict=True)
        with self.wrapped.no_sync() if self.run.processes.several else nullcontext():
            yield from others
        yield last

    def _count(self, loss: Tensor, accuracy: Tensor) -> None:
        """Add to the epoch's sums on the device; nothing here waits for it."""
        self.sums += torch.stack((loss, accuracy.to(loss.dtype)))
        self.finite &= loss.isfinite()

    def mask_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self.masked]
        if gradients:
            torch._foreach_mul_(gradients, self.masks)

    @torch.no_grad()
    def mask_weights(self) -> None:
        if self.masked:
            torch._foreach_mul_(self.masked, self.masks)

    # -- what comes between steps

    def cut(self) -> None:
        """RSST: the doomed weights become zero for good; optimizer state goes with them."""
        run, progress = self.run, self.progress
        before, residual = run.evaluate(self.selected, "val")["accuracy"], self.penalty.residual()
        self.sync_dense()
        moments = moments_by_name(self.optimizer, self.model, run.units, self.model_kept)
        unrepaired = repair_in_state(run)
        progress.masks, progress.kept = progress.target, progress.target_kept
        self.build()
        masks = run.parameter_masks(progress.masks, progress.kept)
        put_moments(self.optimizer, self.model, run.units, self.model_kept, moments, masks)
        accuracy = run.evaluate(self.selected, "val")["accuracy"]
        after = accuracy if unrepaired is None else unrepaired
        progress.cut = {"before": before, "after": after, "residual": residual}
        repaired = ""
        if unrepaired is not None:
            progress.cut["repaired"], repaired = accuracy, f", {100 * accuracy:.2f}% with repair"
        log.info(
            f"cut at step {progress.step}: accuracy {100 * before:.2f}% before, {100 * after:.2f}% after{repaired}; "
            f"residual {residual:.2g}; the state before ended with {100 * journal.accuracy_at_start(progress):.2f}%"
        )
        if residual > 0.1:
            log.warning("residual above 0.1: the cut weights were not small; raise --reg_granularity_prune")
        self.model.train()

    def end_epoch(self) -> None:
        """Validate, write the epoch's line, keep the best, checkpoint."""
        run, progress = self.run, self.progress
        epoch = progress.step // run.steps_per_epoch - 1
        self.bar.close()
        self.bar = None
        self.check_finite()
        seconds = time.perf_counter() - self.epoch_started
        val = {} if run.trains_on_all else run.evaluate(self.selected, "val")
        fading = self._fading()
        cost = run.family.cost(run.dense, progress.kept)
        row = self._epoch_row(epoch, val, cost, fading, seconds)
        progress.history.append(row)
        progress.sums = []
        self._record_residuals()
        log.info(journal.epoch_line(row, run.title, run.epochs, self._fading_note(fading)))
        run.track(journal.epoch_values(row, cost, fading))
        self.sync_dense()
        self.check_weights()
        # before the cut the model is not yet what the state ends with; with nothing to select by the last one counts
        best = val["accuracy"] > progress.best.get("accuracy", -1.0) if val else self.finished
        if best and not self.penalty:
            progress.best = {"epoch": epoch, **{name: share for name, share in val.items() if name == "accuracy"}}
            weights = cpu_copy(run.average) if self.average else weights_of(run.dense)
            best = {"weights": weights, "state": progress.state, "kept": progress.kept, **progress.best}
            run.write(run.writer.submit, save_tensors, run.save_dir / "best.new.pt", best)
        if self.args.prune_type == "rewind_lt" and progress.state == 0 and epoch + 1 == self.args.rewind_epoch:
            run.keep_for_rewind("rewind.pt")
        run.write(journal.write, run.save_dir, progress)
        run.checkpoint()

    def break_off(self) -> None:
        """A checkpoint within an epoch."""
        self.check_finite()
        self.progress.sums = self._mean_sums().tolist()
        self._record_residuals()
        self.sync_dense()
        self.run.checkpoint()

    def sync_dense(self) -> None:
        """Carry the weights of the network that trains back into `run.dense`, their average into `run.average`."""
        run = self.run
        if self.average:
            run.average = self._dense_shaped(self.average.model)
        if self.model is not run.dense or self.frozen:
            run.dense.load_state_dict(self._dense_shaped(self.model))

    def _dense_shaped(self, model: nn.Module) -> dict[str, Tensor]:
        """Clones of a network's weights in the shapes of `run.dense`."""
        # without units to put back, what scatters only clones
        weights = scatter_tensors(model.state_dict(), self.run.units, self.model_kept)
        for name, (frozen, value) in self.frozen.items():
            weights[name] = torch.where(frozen, value, weights[name])
        return weights

    def _mean_sums(self) -> Tensor:
        """Loss and accuracy over all images so far, times the steps."""
        return self.run.processes.mean_(self.sums.clone())

    def check_finite(self) -> None:
        finite, steps = self.run.processes.least_(torch.stack((self.finite.long(), self.finite_steps))).tolist()
        if not finite:
            step = self.first_step + steps
            raise RunError(f"the loss is not finite at step {step} of {self.run.title}; {self._remedy(step)}", code=1)

    def check_weights(self) -> None:
        """The last step of a state may break weights without a loss that shows it."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.run.dense.parameters()):
            step = self.progress.step
            raise RunError(
                f"weights are not finite after step {step} of {self.run.title}; {self._remedy(step)}", code=1
            )

    def _remedy(self, step: int) -> str:
        """What can help against numbers that overflowed after so many steps of this state.

        Flags of training do not change on resume, which would meet the same numbers again.
        """
        args, trained = self.args, bool(step or self.progress.state)
        ways = ["a lower --lr"] if trained else []
        ways += ["--clip_grad 1"] if trained and not args.clip_grad else []
        ways += ["--amp off"] if self.run.precision else []
        if not ways:  # the first forward pass, in float32
            return "nothing has trained yet: look at the initial weights"
        last = "the last checkpoint is good; " if has_checkpoint(self.run.save_dir) else "there is no checkpoint yet; "
        return f"{last}start anew with {' or '.join(ways)}"

    # -- what is written down

    def _epoch_row(self, epoch: int, val: dict, cost: dict, fading: dict, seconds: float) -> dict:
        run, progress = self.run, self.progress
        loss, train_accuracy = (self._mean_sums() / run.steps_per_epoch).tolist()
        return {
            "state": progress.state,
            "epoch": epoch,
            "lr": run.schedule.rate(progress.step - 1),
            "train_loss": loss,
            "train_accuracy": train_accuracy,
            **{f"val_{name}": share for name, share in val.items()},
            "density": density(progress.masks),
            **cost,
            "lambda": self.strength,
            "residual": fading.get("rsst/residual", 0.0),
            "seconds": seconds,
            "images_per_second": (run.steps_per_epoch - self.first_batch) * run.images_a_step / seconds,
        }

    def _log_batch(self, epoch: int, batch: int, rate: float) -> None:
        run = self.run
        self.check_finite()
        mean_loss, accuracy = (self._mean_sums() / (batch + 1)).tolist()
        fading = self._fading()
        log.info(
            f"{run.title} epoch {epoch + 1}/{run.epochs} batch {batch + 1}/{run.steps_per_epoch}"
            f"  loss {mean_loss:.4f}  accuracy {100 * accuracy:.2f}%  lr {rate:.3g}{self._fading_note(fading)}"
        )
        if batch + 1 < run.steps_per_epoch:  # the last one is logged with its epoch
            run.track({"train/loss": mean_loss, "train/accuracy": accuracy, "train/lr": rate} | fading)

    def _fading(self) -> dict[str, float]:
        """lambda and residual norm of the doomed weights, while there are any; measuring waits for the device."""
        if not self.penalty:
            return {}
        return {"rsst/lambda": self.ramp.value(self.progress.step), "rsst/residual": self.penalty.residual()}

    def _fading_note(self, fading: dict[str, float]) -> str:
        """What `_fading` found and the dose so far, for a line of the log."""
        if not fading:
            return ""
        dose = f"{self.doses[self.progress.step]:.3g}" if self.doses else "unknown"
        return f"  lambda {fading['rsst/lambda']:.4g}  dose {dose}  residual {fading['rsst/residual']:.2g}"

    def _record_residuals(self) -> None:
        steps, start = self.run.steps_per_epoch, self.progress.start_norm
        for step, strength, norm in self.residuals.take():
            row = {"state": self.progress.state, "epoch": step / steps, "step": step, "lambda": strength}
            self.progress.penalty.append({**row, "residual": norm / start if start else 0.0})
