"""The table of a run's states, and the key results of its report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from reporting.flags import has_filters
from reporting.runs import RunFiles
from reporting.words import duration, giga, md_table, percent, thousands, wilson


def state_columns(run: RunFiles) -> dict[str, Callable[[Mapping], object]]:
    """Columns of the table of states; each is a function of a row of states.csv."""
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
        "trained": lambda row: percent(row.get("accuracy_trained")),
        "selected": lambda row: percent(row.get("best_accuracy")),
        "test": lambda row: percent(row.get("test_accuracy")),
        **top5,
        "time": lambda row: duration(row.get("seconds", math.nan)),
    }


def legend(run: RunFiles) -> str:
    """What the columns of the table of states mean."""
    soft = run.method == "rsst"
    before = "just before the cut" if soft else "at the end of the state before"
    after = "just after it" if soft else "of the same weights after they are cut, before they are rewound"
    cut = f"Before cut: {before}; after cut: {after}. " if run.method != "dense" else ""
    top5 = " Top-5: the share of test images whose class is among the five most likely." if run.has_top5 else ""
    counts = ""
    if run.method != "dense" and not run.args.get("vit_structured") and (run.method == "imp" or not has_filters(run)):
        counts = " Parameters are those not zero; single zeros do not make the model faster, so MACs count whole units."
    precision = run.environment.get("precision", "float32")
    measured = "" if precision == "float32" else f" (computed in {precision} on validation, in float32 on test images)"
    return (
        f"Accuracy is on validation images, but for the test column{measured}. {cut}Trained: after the last epoch; "
        f"selected: after the epoch that is best on validation, the model whose test accuracy is shown.{top5}{counts}"
        f"{_finish(run)}"
    )


def _finish(run: RunFiles) -> str:
    """What the row of the finish means."""
    if run.finish is None or len(run.states) <= run.finish:
        return ""
    images = ", on training and validation images: the model after its last step is tested"
    start = " The finish continues from the selected model of the last state, with its masks"
    return f"{start}{images if run.args.get('finish_on_all') else ''}."


def key_results(run: RunFiles) -> list[str]:
    table = _dense_and_last(run) if len(run.states) > 1 else _dense_alone(run)
    return [table, *_interval(run), *_worst_cut(run), *([_verification(run)] if run.parity else [])]


def _worst_cut(run: RunFiles) -> list[str]:
    """A sentence about the cut that cost the most accuracy; none where nothing was cut."""
    cuts, from_start = [], False
    for row in run.states:
        before, after, start, residual = (
            row.get(name, math.nan)
            for name in ("accuracy_before_cut", "accuracy_after_cut", "accuracy_at_start", "residual")
        )
        if not (math.isfinite(before) and math.isfinite(after)):
            continue
        fades = run.method == "rsst" and math.isfinite(start)
        from_start |= fades
        at_start = f"{percent(start)} at the end of the state before, " if fades else ""
        left = f", residual {residual:.2g}" if math.isfinite(residual) else ""
        words = f"state {row['state']}: {at_start}{percent(before)} before, {percent(after)} after{left}"
        cuts.append((after - (start if fades else before), words))
    if not cuts:
        return []
    change, where = min(cuts)
    cut, them = ("The cut", "it") if len(cuts) == 1 else (f"The {len(cuts)} cuts", "them")
    cut += f", with the fading before {them}," if from_start else ""
    cut += "" if run.method == "rsst" else ", before any retraining,"
    most = f"changed accuracy by {100 * change:+.2f} points at worst" if change < 0 else "lost no accuracy"
    return [f"{cut} {most} ({where})."]


def _interval(run: RunFiles) -> list[str]:
    """How well the test images know the last accuracy; nothing for runs of older versions, which noted no count."""
    share, counts = run.states[-1].get("test_accuracy", math.nan), run.environment.get("images")
    images = counts.get("test") if isinstance(counts, dict) else None
    if not (isinstance(images, int) and images > 0 and 0 <= share <= 1):
        return []
    low, high = wilson(share, images)
    return [
        f"Test accuracy {percent(share)} of {images:,} images: 95% interval {percent(low)} to {percent(high)} (Wilson)."
    ]


def _dense_and_last(run: RunFiles) -> str:
    """A table that compares the dense state with the last one."""
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
        return "same" if a == b else f"{a / b:.2f}x {'less' if key == 'density' else 'fewer'}" if b > 0 else "none left"

    shown = "finish" if last["state"] == run.finish else f"state {last['state']}"
    columns = {
        "measure": lambda row: row[0],
        f"dense (state {first['state']})": lambda row: row[2](first.get(row[1])),
        f"{'final' if run.finished else 'so far'} ({shown})": lambda row: row[2](last.get(row[1])),
        "change": lambda row: change(row[1]),
    }
    return md_table(rows, columns, left=1)


def _dense_alone(run: RunFiles) -> str:
    row = run.states[0]
    val_top5 = f" (top-5 {percent(_val_top5(run, row))})" if run.has_top5 else ""
    test_top5 = f" (top-5 {percent(row['test_top5'])})" if run.has_top5 else ""
    return (
        f"Dense, {percent(row.get('density'))} of the weights: "
        f"validation {percent(row.get('best_accuracy'))}{val_top5}, "
        f"test {percent(row.get('test_accuracy'))}{test_top5}, {thousands(row.get('parameters'))} parameters, "
        f"{giga(row.get('macs'))} MACs per image."
    )


def _val_top5(run: RunFiles, row: Mapping) -> float:
    """Validation top-5 accuracy of the model that a state selected."""
    selected = (row["state"], row.get("best_epoch"))
    values = [row.get("val_top5", math.nan) for row in run.history if (row["state"], row["epoch"]) == selected]
    return values[0] if values else math.nan


def _verification(run: RunFiles) -> str:
    """The comparison of outputs in parity.json, and the sizes in config.json, of model/."""

    def value(source: Mapping, *keys: str) -> float:
        for key in keys:
            source = source.get(key, {}) if isinstance(source, dict) else {}
        return float(source) if isinstance(source, int | float) else math.nan

    found = partial(value, run.parity)
    allowed = found("bound" if "bound" in run.parity else "bound_float32")  # runs of older versions
    text = (
        f"**Verified:** the small model in model/ computes what the masked one does: its logits differ by at most "
        f"{found('max_difference_float64'):.2g} in float64 (allowed: {allowed:.2g}) and "
        f"{found('max_difference_float32'):.2g} in float32, and it predicts the same class for "
        f"{percent(found('top1_agreement'))} of {thousands(found('images'))} validation images."
    )
    sizes = [value(run.config, key, part) for key in ("parameters", "macs") for part in ("dense", "removed")]
    if all(math.isfinite(size) and size > 0 for size in sizes):
        text += (
            f" It has {thousands(sizes[1])} of {thousands(sizes[0])} parameters ({sizes[0] / sizes[1]:.2f}x fewer) and "
            f"takes {giga(sizes[3])} of {giga(sizes[2])} MACs per image ({sizes[2] / sizes[3]:.2f}x fewer)."
        )
    return text
