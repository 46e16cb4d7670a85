"""What a run reached: from a `Run` to the table of its states and the key results of its report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from reporting.flags import has_filters
from reporting.runs import Run
from reporting.words import duration, giga, md_table, percent, thousands


def state_columns(run: Run) -> dict[str, Callable[[Mapping], object]]:
    """Columns of the table of states: title to a function of a row of states.csv."""
    counts = {name: lambda row, name=name: thousands(row.get(name)) for name in run.counts}
    top5 = {"top-5": lambda row: percent(row.get("test_top5"))} if run.has_top5 else {}
    return {
        "state": lambda row: "finish" if row["state"] == run.finish else row["state"],
        "density": lambda row: percent(row.get("density")),
        **counts,
        "parameters": lambda row: thousands(row.get("parameters")),
        "MACs": lambda row: giga(row.get("macs")),
        "before cut": lambda row: percent(row.get("accuracy_before_cut")),
        "after cut": lambda row: percent(row.get("accuracy_after_cut")),
        **({"repaired": lambda row: percent(row.get("accuracy_after_repair"))} if _repairs(run) else {}),
        "trained": lambda row: percent(row.get("accuracy_trained")),
        "selected": lambda row: percent(row.get("best_accuracy")),
        "test": lambda row: percent(row.get("test_accuracy")),
        **top5,
        "time": lambda row: duration(row.get("seconds", math.nan)),
    }


def _repairs(run: Run) -> bool:
    return any(math.isfinite(row.get("accuracy_after_repair", math.nan)) for row in run.states)


def legend(run: Run) -> str:
    """What the columns of the table of states mean, as far as that is not plain."""
    soft = run.method == "rsst"
    before = "just before the cut" if soft else "at the end of the state before"
    after = "just after it" if soft else "of the same weights once they are cut, before they are rewound"
    cut = f"Before cut: {before}; after cut: {after}. " if run.method != "dense" else ""
    if _repairs(run):
        cut += "Repaired: after the cut, once the weights that stay have taken over (--repair). "
    top5 = " Top-5: the share of test images whose class is among its five likeliest." if run.has_top5 else ""
    counts = ""
    if run.method != "dense" and not run.args.get("vit_structured") and (run.method == "imp" or not has_filters(run)):
        counts = " Parameters are those not zero; single zeros do not make the model faster, so MACs count whole units."
    return (
        f"Accuracy is on validation images, but for the test column. {cut}Trained: after the last epoch; selected: "
        f"after the epoch that is best on validation, the model whose test accuracy is shown.{top5}{counts}"
        f"{_finish(run)}"
    )


def _finish(run: Run) -> str:
    """What the row of the finish means."""
    if run.finish is None or len(run.states) <= run.finish:
        return ""
    begins = " The finish goes on from the selected model of the last state, with its masks"
    if not run.args.get("finish_on_all"):
        return f"{begins}."
    return f"{begins}, on training and validation images: none is held out, and what its last step leaves is tested."


def key_results(run: Run) -> list[str]:
    parts = [_dense_and_last(run) if len(run.states) > 1 else _dense_alone(run)]
    cuts, from_start = [], False
    for row in run.states:
        before, after = row.get("accuracy_before_cut", math.nan), row.get("accuracy_after_cut", math.nan)
        repaired, unrepaired = row.get("accuracy_after_repair", math.nan), ""
        if math.isfinite(repaired):
            after, unrepaired = repaired, f" with repair ({percent(after)} without)"
        start = row.get("accuracy_at_start", math.nan)
        fades = run.method == "rsst" and math.isfinite(start)
        if math.isfinite(before) and math.isfinite(after):
            residual = row.get("residual", math.nan)
            at_start = f"{percent(start)} at the end of the state before, " if fades else ""
            from_start |= fades
            left = f", residual {residual:.2g}" if math.isfinite(residual) else ""
            said = f"{percent(before)} before, {percent(after)} after{unrepaired}{left}"
            cuts.append((after - (start if fades else before), f"state {row['state']}: {at_start}{said}"))
    if cuts:
        worst = min(cuts)
        most = f"changed accuracy by {100 * worst[0]:+.2f} points at worst" if worst[0] < 0 else "lost no accuracy"
        cut = "The cut" if len(cuts) == 1 else f"The {len(cuts)} cuts"
        cut += f", with the fading before {'it' if len(cuts) == 1 else 'them'}," if from_start else ""
        parts.append(f"{cut}{'' if run.method == 'rsst' else ', before any retraining,'} {most} ({worst[1]}).")
    if run.proof:
        parts.append(_proof(run))
    return parts


def _dense_and_last(run: Run) -> str:
    """Table of the dense state against the last one."""
    first, last = (row | {"val_top5": _val_top5(run, row)} for row in (run.states[0], run.states[-1]))
    rows = [("test accuracy", "test_accuracy", percent), ("validation accuracy", "best_accuracy", percent)]
    if run.has_top5:
        rows[1:1] = [("test top-5", "test_top5", percent)]
        rows += [("validation top-5", "val_top5", percent)]
    rows += [("density", "density", percent)] + [(name, name, thousands) for name in run.counts]
    rows += [("parameters", "parameters", thousands), ("MACs per image", "macs", giga)]

    def change(key: str) -> str:
        a, b = first.get(key, math.nan), last.get(key, math.nan)
        if not (math.isfinite(a) and math.isfinite(b)):
            return "-"
        if key.endswith(("accuracy", "top5")):
            return f"{100 * (b - a):+.2f} points"
        return "same" if a == b else f"{a / b:.2f}x {'less' if key == 'density' else 'fewer'}" if b > 0 else "all gone"

    shown = "finish" if last["state"] == run.finish else f"state {last['state']}"
    columns = {
        "measure": lambda row: row[0],
        f"dense (state {first['state']})": lambda row: row[2](first.get(row[1])),
        f"{'final' if run.finished else 'so far'} ({shown})": lambda row: row[2](last.get(row[1])),
        "change": lambda row: change(row[1]),
    }
    return md_table(rows, columns, left=1)


def _dense_alone(run: Run) -> str:
    row = run.states[0]
    val_top5 = f" (top-5 {percent(_val_top5(run, row))})" if run.has_top5 else ""
    test_top5 = f" (top-5 {percent(row['test_top5'])})" if run.has_top5 else ""
    return (
        f"Dense, {percent(row.get('density'))} of the weights: "
        f"validation {percent(row.get('best_accuracy'))}{val_top5}, "
        f"test {percent(row.get('test_accuracy'))}{test_top5}, {thousands(row.get('parameters'))} parameters, "
        f"{giga(row.get('macs'))} MACs per image."
    )


def _val_top5(run: Run, row: Mapping) -> float:
    """Top-5 accuracy on validation of the model that a state selected."""
    selected = (row["state"], row.get("best_epoch"))
    values = [row.get("val_top5", math.nan) for row in run.history if (row["state"], row["epoch"]) == selected]
    return values[0] if values else math.nan


def _proof(run: Run) -> str:
    """What parity.json and config.json of model/ say."""

    def value(source: Mapping, *keys: str) -> float:
        for key in keys:
            source = source.get(key, {}) if isinstance(source, dict) else {}
        return float(source) if isinstance(source, int | float) else math.nan

    proof = partial(value, run.proof)
    allowed = proof("bound" if "bound" in run.proof else "bound_float32")  # runs of older versions
    text = (
        f"**Proof:** the small model in model/ computes what the masked one does: its logits differ by at most "
        f"{proof('max_difference_float64'):.2g} in float64 (allowed: {allowed:.2g}) and "
        f"{proof('max_difference_float32'):.2g} in float32, and it gives the same class for "
        f"{percent(proof('top1_agreement'))} of {thousands(proof('images'))} validation images."
    )
    sizes = [value(run.config, key, part) for key in ("parameters", "macs") for part in ("dense", "removed")]
    if all(math.isfinite(size) and size > 0 for size in sizes):
        text += (
            f" It has {thousands(sizes[1])} of {thousands(sizes[0])} parameters ({sizes[0] / sizes[1]:.2f}x fewer) and "
            f"takes {giga(sizes[3])} of {giga(sizes[2])} MACs per image ({sizes[2] / sizes[3]:.2f}x fewer)."
        )
    return text
