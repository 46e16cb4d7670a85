"""The report of one run: report.md, report.html and plots/ in its folder."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import utils
from pruning.depth import DEPTH, WHOLE
from reporting import need
from reporting.flags import TARGETS, command, flags_without_effect, has_filters
from reporting.page import publish, to_html, write_bytes
from reporting.plots import plot_accuracy, plot_density, plot_penalty, plot_sensitivity, plot_units
from reporting.results import key_results, legend, state_columns
from reporting.runs import METHODS, RunFiles, load_run
from reporting.timeline import penalty_curves
from reporting.words import code, duration, escaped, md_table, onnx_columns, percent, plural

STARTS = {
    "lt": "from the initial weights",
    "rewind_lt": "from the weights after epoch {rewind_epoch} of state 0",
    "pt": "from the pretrained weights",
    "finetune": "from the trained weights of the state before",
}
SENSITIVE = ", allocated by layer sensitivity"


def write(save_dir: Path) -> None:
    """Write report.md, report.html and plots/*.png of a run, finished or not, into its folder.

    Raises:
        RunError: no run, a damaged file, a missing package or a full disk; earlier files are unchanged.
    """
    write_report(load_run(Path(save_dir)))


def write_report(run: RunFiles) -> None:
    """As `write`, for a run that `load_run` has read."""
    need("markdown")  # before any picture is drawn
    drawn = {
        "accuracy": (plot_accuracy, run.history),
        "density": (plot_density, len(run.states) > 1),
        "penalty": (plot_penalty, penalty_curves(run)),
        "units": (plot_units, run.units),
        "sensitivity": (plot_sensitivity, run.sensitivity),
    }
    plots = {f"plots/{name}.png": plot(run) for name, (plot, has_data) in drawn.items() if has_data}
    text = _report(run, plots)
    page = to_html(run.name, text, plots)
    files = {name: partial(write_bytes, content=png) for name, png in plots.items()}
    files["report.md"] = partial(utils.write_text, text=text)
    files["report.html"] = partial(utils.write_text, text=page)
    publish(run.folder, files, stale={f"plots/{name}.png" for name in drawn} - set(plots))


def _report(run: RunFiles, plots: Mapping[str, bytes]) -> str:
    """report.md."""
    parts = [f"# {escaped(run.name)}"]
    if run.args.get("pretrained_note"):
        parts.append(f"> **Note:** {escaped(run.args['pretrained_note'])}")
    states = run.length[0]
    if not run.finished:
        finish = ", the finish not" if run.finish is not None else ""
        parts.append(
            f"> **This run is not finished:** {len(run.states)} of {plural(states, 'state')} done{finish}, "
            f"{plural(len(run.history), 'epoch')} trained. This report shows the results so far."
        )
    parts.append(describe(run))
    if run.states:
        parts += ["## States", md_table(run.states, state_columns(run)), legend(run)]
        parts += ["## Key results", *key_results(run)]
    elif not run.history:
        parts.append("No epoch has been trained yet.")
    if run.latency:
        parts += ["Speed of the small model, measured by `export.py --latency`:", code(run.latency)]
    if run.onnx:
        table = md_table(run.onnx, onnx_columns(run.onnx), left=1)
        parts += ["ONNX files under ONNX Runtime on a CPU, measured by `export.py --onnx --int8`:", table]
    more, star = (" The finish continues the last one.", " Stars: after the finish.") if run.finish else ("", "")
    captions = {
        "plots/accuracy.png": (
            "Accuracy over epochs",
            f"Every state has a new schedule; the top shows densities.{more}",
        ),
        "plots/density.png": ("Accuracy over density", f"The model selected on validation in each state.{star}"),
        "plots/penalty.png": ("Penalty", "Its strength, and the residual of the doomed weights."),
        "plots/units.png": ("Units kept per layer", "Percent of each layer at the end of every state."),
        "plots/sensitivity.png": (
            "Sensitivity",
            "The rise of the loss on training images where one layer alone loses its lowest-scored units, before the "
            "first pruning; marks show the share removed in the last state.",
        ),
    }
    if plots:
        parts.append("## Plots")
        parts += [f"### {captions[name][0]}\n\n{captions[name][1]}\n\n![{captions[name][0]}]({name})" for name in plots]
    parts += ["## Next steps", "All commands run in the folder of the program.", *_next_steps(run)]
    return "\n\n".join(parts) + "\n"


def _next_steps(run: RunFiles) -> list[str]:
    """Commands to resume, export and repeat the run."""
    where = _shown_path(run)
    if not run.finished:
        resume = f"python main_imp_fillback.py --save_dir {shlex.quote(where)} --resume"
        parts = ["Resume from the last checkpoint:", code(resume, "bash")]
    else:
        export = f"python export.py {shlex.quote(where)} --onnx --latency --evaluate"
        again = " again" if run.config else ""
        parts = [f"Write the small model{again}, with ONNX, speeds and its test accuracy:", code(export, "bash")]
        loading = f"import export\n\nmodel = export.load({os.path.join(where, 'model')!r})"
        parts += ["Load it (model/README.md says more):", code(loading, "python")]
    return [*parts, "Repeat this run in a new folder:", code(command(run), "bash")]


def _shown_path(run: RunFiles) -> str:
    """The run's folder as in its command; absolute if it was moved."""
    recorded = str(run.args.get("save_dir") or "")
    here = run.folder.resolve()
    return recorded if Path(recorded).name == here.name else str(here)


def describe(run: RunFiles) -> str:
    """One paragraph: method, network, data, pruning, training, machine, time."""
    args, (states, epochs) = run.args, run.length
    name, words = METHODS.get(run.method, (str(args["struct"]), ""))
    method = f"**{escaped(name)}**{f' ({words})' if words else ''}"
    shape = f"{plural(states, 'state')} of {plural(epochs, 'epoch')}{' each' if states > 1 else ''}"
    data = args["dataset"] if args["dataset"] != "folder" else f"the image folder {args.get('data')}"
    sentences = [
        f"{method} on {escaped(args['arch'])} and {escaped(data)}: {shape}, from {escaped(first_weights(args))}, "
        f"seed {escaped(args['seed'])}.",
        _pruning_words(run) if run.method != "dense" else "",
        _training_words(run),
        _finish_words(run) if run.finish is not None else "",
        _machine_words(run.environment) if run.environment else "",
        f"Training took {duration(run.seconds)}{'' if run.finished else ' so far'}.",
    ]
    return " ".join(filter(None, sentences))


def first_weights(args: Mapping) -> str:
    """The initial weights of state 0, as text."""
    given = args.get("pretrained")
    if args.get("init"):
        return f"the weights of {args['init']}"
    if not given or args.get("pretrained_note"):
        return "scratch"
    if given is not True:
        return f"the pretrained weights of {given}"
    tag = f", tag {args['pretrained_tag']}" if args.get("pretrained_tag") else ""
    return f"timm's pretrained weights{tag}"


def _training_words(run: RunFiles) -> str:
    args, rate = run.args, run.args.get("lr")
    training = [str(args.get("opt", "")).upper().replace("ADAMW", "AdamW")]
    training += [f"learning rate {rate:g}"] if isinstance(rate, int | float) else []
    training += [f"{args['sched']} schedule"] if args.get("sched") else []
    training += [f"batches of {args['batch_size']} images"] if args.get("batch_size") else []
    flips = " without flips" if args.get("flip") is False else ""
    training += [f"augmentation {args['aug']}{flips}"] if args.get("aug") else []
    training += [str(run.environment["precision"])] if run.environment.get("precision") else []
    training += [f"{args['train_limit']:,} training images"] if isinstance(args.get("train_limit"), int) else []
    return f"Training: {escaped(', '.join(filter(None, training)))}."


def _finish_words(run: RunFiles) -> str:
    rate, on_all = run.args.get("finish_lr"), run.args.get("finish_on_all")
    words = f"A finish of {plural(run.finish_epochs, 'epoch')} after the last state trains its selected model further"
    words += f" at learning rate {rate:g}" if isinstance(rate, int | float) else ""
    if not on_all:
        return f"{words}; its best epoch on validation is the final model."
    return (
        f"{words}, on training and validation images together; without validation images, the final model is the one "
        f"after the last step{', averaged' if run.args.get('ema_decay') else ''}."
    )


def _machine_words(machine: Mapping) -> str:
    versions = machine.get("versions") if isinstance(machine.get("versions"), dict) else {}
    versions = {"Python": machine.get("python"), **versions}
    shown = ", ".join(f"{key} {versions[key]}" for key in ("Python", "torch", "timm", "numpy") if versions.get(key))
    device = " ".join(dict.fromkeys(str(machine.get(key, "")) for key in ("device", "device_name"))).strip()
    threads = f" ({plural(machine['threads'], 'thread')})" if isinstance(machine.get("threads"), int) else ""
    commit = f", commit {str(machine['commit'])[:10]}" if machine.get("commit") else ""
    return f"Machine: {escaped(device)}{threads}, {escaped(machine.get('platform', ''))}; {escaped(shown + commit)}."


def budget_words(args: Mapping) -> str:
    """The goal of a target or a file of counts; empty where ratios set it."""
    if args.get("unit_counts"):
        return f"In the end each layer keeps the counts of a file ({sum(args['unit_counts'].values()):,} units)"
    target = next((name for name in TARGETS if args.get(name) is not None), None)
    if target is None:
        return ""
    words = TARGETS[target].format(args[target])
    ranked = ", by one ranking of all units" if args.get("sorting_mode") == "global" else ""
    ranked = SENSITIVE if args.get("ratio_allocation") == "sensitivity" else ranked
    return f"{words[0].upper()}{words[1:]}{ranked}"


def _pruning_words(run: RunFiles) -> str:
    args = run.args
    criterion = f"criterion {escaped(args.get('criteria'))}"
    schedule = f"on a {escaped(args.get('ratio_schedule', ''))} schedule"
    if goal := budget_words(args):
        words = f"{goal}, chosen by {criterion}, {schedule}"
        if run.timed:
            words += (
                f"; measured were {run.timed['measured_ms']:.2f} ms, {run.timed['dense_ms']:.2f} of the dense network"
            )
    elif args.get("vit_structured"):
        words = f"{_structured_goal(args)} by {criterion}, {schedule}"
    else:
        words = _element_wise_words(run, criterion, schedule)
    start = STARTS.get(args.get("prune_type"), "").format(rewind_epoch=args.get("rewind_epoch"))
    return f"{words}. Every state starts {start}." if start else f"{words}."


def _structured_goal(args: Mapping) -> str:
    """The shares of whole units that are removed, and how they are chosen."""
    rate, target = args.get("rate", math.nan), args.get("vit_prune_target")
    neurons = rate if args.get("mlp_prune_ratio") is None else args["mlp_prune_ratio"]
    goals = [f"{percent(rate)} of all heads"] if target in ("head", "both") else []
    goals += [f"{percent(neurons)} of all neurons"] if target in ("mlp", "both") else []
    goals += [f"{percent(rate)} of all {DEPTH[target]}"] if target in DEPTH else []
    goals += [f"{percent(rate)} of the MACs of all heads and neurons"] if target == "all" else []
    ranked = "over the whole model" if target in WHOLE else escaped(args.get("sorting_mode", "layer-wise"))
    how = f"{SENSITIVE}, chosen" if args.get("ratio_allocation") == "sensitivity" else f", chosen {ranked}"
    return f"{' and '.join(goals)} are removed in the end{how}"


def _element_wise_words(run: RunFiles, criterion: str, schedule: str) -> str:
    args, several = run.args, run.length[0] > 2
    if args.get("nm"):  # instead of the rate
        keep, _, group = escaped(args["nm"]).partition(":")
        words = (
            f"Of every {group} consecutive weights of a row {keep} stay in the end{f', {schedule}' if several else ''}"
        )
    else:
        prunings = f"Each of {run.length[0] - 1} prunings" if several else "The pruning"
        words = f"{prunings} removes {percent(args.get('rate', math.nan))} of the remaining prunable weights"
    if (args.get("fillback_rate") or has_filters(run)) and "criteria" not in flags_without_effect(run):
        back = f", and refill gives back {percent(args['fillback_rate'])}" if args.get("fillback_rate") else ""
        words += f"{back}, chosen by {criterion}"
    return words
