"""One state's training: the masks and units of `run.progress` and the weights of `run.dense` in, trained weights out.

What lives as long as a state stands here: the network that trains, its optimizer, masks and penalty, and the step.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm

import rsst
from engine import journal
from engine.capture import CapturedStep
from engine.checkpoint import has_checkpoint
from engine.network import Network, build_network
from engine.objective import Objective, count_right
from engine.optimizer import make_optimizer, moments_by_name, put_moments, set_rate
from engine.run import Run
from pruning.masks import density
from settings.flags import GRAPHS
from utils import RunError, autocast

log = logging.getLogger(__name__)


class StateTraining:
    """The training of the state that `run.progress` is in; `run.dense` gets the weights back at every `sync_dense`.

    Attributes:
        network: what trains, until the cut and after it; None once closed.
        penalty: on doomed weights, of strength `ramp` until they are cut after `cut_after` steps; false without any.
        doses: predicted after each step of the penalty; empty when unknown.
        strength: lambda of the step just done.
    """

    def __init__(self, run: Run):
        args, device = run.args, run.device
        self.run, self.args, self.progress = run, args, run.progress
        # read and written by every step, hence on the device and never replaced: a captured step knows their addresses
        self.sums = torch.zeros(2, dtype=torch.float64 if device.type != "mps" else None, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # all losses so far
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=device)  # steps of this epoch while that held
        self.objective = Objective(
            args.label_smoothing, args.kd_alpha or 0.0, args.kd_temperature, args.kd_hard, args.kd_features or 0.0
        )
        self.bar: tqdm | None = None  # of the epoch that trains
        self.first_batch = self.first_step = 0  # of this epoch, in this process's life
        self.strength = 0.0
        self.residuals = rsst.Trace()
        self.network: Network | None = None
        self.captured: CapturedStep | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.penalty: rsst.Penalty | None = None
        self.ramp: rsst.Ramp | None = None
        self.cut_after, self.doses = 0, []
        self.build()
        run.recorder.timer.restart("checkpoint")

    # -- the network that trains and what acts on it

    def build(self) -> None:
        """Network, optimizer and penalty for the masks and units enforced now; `run.dense` holds the weights."""
        run = self.run
        self.close()
        self.network = build_network(run)
        rate = torch.zeros((), dtype=run.dtype, device=run.device)
        self.optimizer = run.optimizer = make_optimizer(self.args, self.network.model, rate)
        self.captured = CapturedStep(self.device_step) if self.args.compile in GRAPHS else None
        parameters = dict(self.network.model.named_parameters())
        self.penalty = rsst.Penalty(parameters, self.network.doomed, self.progress.start_norm)
        if self.penalty:
            self._plan_penalty()

    def close(self) -> None:
        """Release the network and the captured step. The step refers to this object: without this, its graph, the
        graph's memory and the network would live on until Python's garbage collector finds the cycle."""
        self.network = self.captured = None

    def _plan_penalty(self) -> None:
        args, run = self.args, self.run
        self.progress.start_norm = self.penalty.start_norm
        self.cut_after = rsst.cut_step(run.round.total_steps, run.round.steps_per_epoch, args.reg_finish)
        sawtooth = args.reg_form == "gradient" and args.reg_clock != "state"
        period = run.round.steps_per_epoch if sawtooth else self.cut_after
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
        rates = [self.run.round.schedule.rate(step) for step in range(ramp.steps)]
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
        return self.progress.step >= self.run.round.total_steps

    @property
    def at_cut(self) -> bool:
        """Whether the step just done is the last one of the penalty."""
        return bool(self.penalty) and self.progress.step == self.cut_after

    @property
    def at_epoch_end(self) -> bool:
        return self.progress.step % self.run.round.steps_per_epoch == 0

    def step(self) -> None:
        """One optimizer step: the rate and the penalty's strength of now, then all that the device does."""
        run, progress, network = self.run, self.progress, self.network
        epoch, batch = divmod(progress.step, run.round.steps_per_epoch)
        if self.bar is None:
            self._start_epoch(epoch, batch)
        images, targets = run.round.data.batch(progress.state, epoch, batch)
        images = images.to(run.dtype)
        if run.mixing:
            images, targets = run.mixing(images, targets, progress.state, epoch, batch)
        if network.drop_path:
            network.drop_path.draw(images, progress.state, epoch, batch, run.round.images_per_step)
        rate = run.round.schedule.rate(progress.step)
        set_rate(self.optimizer, rate)
        self.strength = 0.0  # lambda
        if self.penalty:
            self.strength = self.ramp.value(progress.step + 1)
            decays = self.args.reg_form == "decay"
            self.penalty.set_(self.ramp.exponent_at(progress.step + 1) if decays else self.strength)
        taught = ()
        if run.teacher:
            taught = run.teacher.outputs(images, self.args.accum_steps, progress.state, epoch, batch)
        self.update(images, targets, *taught)
        run.processes.mean_each_(network.statistics)
        progress.step += 1
        if network.average:
            network.average.update(progress.step)
        if self.penalty and self.ramp.is_recorded(progress.step):
            self.residuals.add(progress.step, self.strength, self.penalty.measure())
        self.bar.update()
        run.bar.update()
        run.recorder.agree(run.signals)
        if (batch + 1) % self.args.print_freq == 0:
            self._log_batch(epoch, batch, rate)

    def _start_epoch(self, epoch: int, batch: int) -> None:
        run = self.run
        run.load_own_teacher()
        self.network.model.train()
        self.sums.copy_(torch.tensor(self.progress.sums if batch else [0.0, 0.0], dtype=self.sums.dtype))
        self.finite_steps.zero_()
        run.recorder.timer.restart("epoch")
        self.first_batch, self.first_step = batch, self.progress.step
        title, quiet = f"{run.title} epoch {epoch + 1}/{run.round.epochs}", not sys.stdout.isatty()
        self.bar = tqdm(
            total=run.round.steps_per_epoch, initial=batch, desc=title, unit=" steps", leave=False, disable=quiet
        )  # fmt: skip

    def update(self, *tensors: Tensor) -> None:
        """`device_step`, as a CUDA graph with --compile graph and the like."""
        (self.captured or self.device_step)(*tensors)

    def device_step(self, images: Tensor, targets: Tensor, *taught: Tensor) -> None:
        """All that the device does for one optimizer step; see `capture.CapturedStep` for what may stand here.

        Of several processes each shows its share of the images, and gradients are averaged in the last backward pass.

        Args:
            images: [B, 3, H, W], B = batch_size * accum_steps / processes.
            targets: labels [B], or the shares of all classes [B, classes] when images are mixed.
            taught: a teacher's logits [B, classes], when there is one, and its features [B, N, D], when they count.
        """
        args, optimizer, scaler, network = self.args, self.optimizer, self.run.scaler, self.network
        whole = self.run.round.images_per_step / self.run.processes.size
        start = 0
        for part, truth, *teacher in self._passes(images, targets, *taught):
            if network.drop_path:
                network.drop_path.show(start, start := start + len(part))
            with autocast(self.run.device, self.run.precision):
                answer = network.forward(part)
                loss = self.objective(answer, truth, *teacher)
            loss = loss * (len(truth) / whole)
            scaler.scale(loss).backward()
            self._count(loss.detach(), count_right(answer.logits.detach(), truth) / whole)
        self.finite_steps += self.finite
        scaler.unscale_(optimizer)
        self.mask_gradients()  # before clipping: pruned weights do not count in the norm
        if self.penalty and args.block_loss_grad:
            self.penalty.block_gradients_()
        if args.clip_grad:
            nn.utils.clip_grad_norm_(network.model.parameters(), args.clip_grad)
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
        with self.network.forward.no_sync() if self.run.processes.several else nullcontext():
            yield from others
        yield last

    def _count(self, loss: Tensor, accuracy: Tensor) -> None:
        """Add to the epoch's sums on the device; nothing here waits for it."""
        self.sums += torch.stack((loss, accuracy.to(loss.dtype)))
        self.finite &= loss.isfinite()

    def mask_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self.network.masked]
        if gradients:
            torch._foreach_mul_(gradients, self.network.masks)

    @torch.no_grad()
    def mask_weights(self) -> None:
        if self.network.masked:
            torch._foreach_mul_(self.network.masked, self.network.masks)

    # -- what comes between steps

    def cut(self) -> None:
        """RSST: the doomed weights become zero for good, their optimizer state too."""
        run, progress = self.run, self.progress
        before, residual = run.evaluate(self.network.selected, "val")["accuracy"], self.penalty.residual()
        self.sync_dense()
        moments = moments_by_name(self.optimizer, self.network.model, run.units, self.network.kept)
        progress.masks, progress.kept = progress.target, progress.target_kept
        self.build()
        masks = run.parameter_masks(progress.masks, progress.kept)
        put_moments(self.optimizer, self.network.model, run.units, self.network.kept, moments, masks)
        after = run.evaluate(self.network.selected, "val")["accuracy"]
        progress.cut = {"before": before, "after": after, "residual": residual}
        log.info(
            f"cut at step {progress.step}: accuracy {100 * before:.2f}% before, {100 * after:.2f}% after; "
            f"residual {residual:.2g}; the state before ended with {100 * journal.accuracy_at_start(progress):.2f}%"
        )
        if residual > 0.1:
            log.warning("residual above 0.1: the cut weights were not small; raise --reg_granularity_prune")
        self.network.model.train()

    def end_epoch(self) -> None:
        """Validate, write the epoch's line, keep the best, checkpoint."""
        run, progress = self.run, self.progress
        epoch = progress.step // run.round.steps_per_epoch - 1
        self.bar.close()
        self.bar = None
        self.check_finite()
        seconds = run.recorder.timer.passed("epoch")
        val = {} if run.trains_on_all else run.evaluate(self.network.selected, "val")
        fading = self._fading()
        cost = run.family.cost(run.dense, progress.kept)
        row = self._epoch_row(epoch, val, cost, fading, seconds)
        progress.history.append(row)
        progress.sums = []
        self._record_residuals()
        log.info(journal.epoch_line(row, run.title, run.round.epochs, self._fading_note(fading)))
        run.track(journal.epoch_values(row, cost, fading))
        self.sync_dense()
        self.check_weights()
        # before the cut the model is not yet what the state ends with; with nothing to select by the last one counts
        best = val["accuracy"] > progress.best.get("accuracy", -1.0) if val else self.finished
        if best and not self.penalty:
            progress.best = {"epoch": epoch, **{name: share for name, share in val.items() if name == "accuracy"}}
            run.processes.on_first(run.recorder.write_selected, run.selected_model())
        if self.args.prune_type == "rewind_lt" and progress.state == 0 and epoch + 1 == self.args.rewind_epoch:
            run.keep_for_rewind("rewind.pt")
        run.processes.on_first(journal.write, run.save_dir, progress)
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
        run, network = self.run, self.network
        if network.average:
            run.average = network.dense_weights(run, network.average.model)
        if network.model is not run.dense or network.frozen:
            run.dense.load_state_dict(network.dense_weights(run, network.model))

    def _mean_sums(self) -> Tensor:
        """Loss and accuracy over all images so far, times the steps."""
        return self.run.processes.mean_(self.sums.clone())

    def check_finite(self) -> None:
        finite, steps = self.run.processes.min_(torch.stack((self.finite.long(), self.finite_steps))).tolist()
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

        Flags of training do not change on resume, so the same numbers would come again.
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
        loss, train_accuracy = (self._mean_sums() / run.round.steps_per_epoch).tolist()
        return {
            "state": progress.state,
            "epoch": epoch,
            "lr": run.round.schedule.rate(progress.step - 1),
            "train_loss": loss,
            "train_accuracy": train_accuracy,
            **{f"val_{name}": share for name, share in val.items()},
            "density": density(progress.masks),
            **cost,
            "lambda": self.strength,
            "residual": fading.get("rsst/residual", 0.0),
            "seconds": seconds,
            "images_per_second": (run.round.steps_per_epoch - self.first_batch) * run.round.images_per_step / seconds,
        }

    def _log_batch(self, epoch: int, batch: int, rate: float) -> None:
        run = self.run
        self.check_finite()
        mean_loss, accuracy = (self._mean_sums() / (batch + 1)).tolist()
        fading = self._fading()
        log.info(
            f"{run.title} epoch {epoch + 1}/{run.round.epochs} batch {batch + 1}/{run.round.steps_per_epoch}"
            f"  loss {mean_loss:.4f}  accuracy {100 * accuracy:.2f}%  lr {rate:.3g}{self._fading_note(fading)}"
        )
        if batch + 1 < run.round.steps_per_epoch:  # the last one is logged with its epoch
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
        steps, start = self.run.round.steps_per_epoch, self.progress.start_norm
        for step, strength, norm in self.residuals.take():
            row = {"state": self.progress.state, "epoch": step / steps, "step": step, "lambda": strength}
            self.progress.penalty.append({**row, "residual": norm / start if start else 0.0})
