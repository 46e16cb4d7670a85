"""States, cuts and penalty of a run on one axis of epochs, all states in a row."""

from __future__ import annotations

import math

from reporting.runs import RunFiles


def state_spans(run: RunFiles) -> list[tuple[int, int, list[dict]]]:
    """(state, epochs before it, its rows of metrics.jsonl), in order."""
    spans, before = [], 0
    for state in sorted({row["state"] for row in run.history}):
        rows = [row for row in run.history if row["state"] == state]
        spans.append((state, before, rows))
        before += len(rows)
    return spans


def cut_epochs(run: RunFiles) -> dict[int, float]:
    """{state: epochs before its cut}, counted over the run; only states in which density falls."""
    cuts, density = {}, math.inf
    total = run.length[1]
    for state, before, rows in state_spans(run):
        for index, row in enumerate(rows):
            if row.get("density", math.nan) < density and state > 0:
                place = 0.0
                if run.args["struct"] == "rsst":
                    # at --reg_finish, or at the nearest end of an epoch, within the epoch in which density fell
                    place = float(run.args.get("reg_finish") or 0.0) * total
                    border = max(1, math.floor(place + 0.5))
                    place = border if abs(border - place) < total / 10 else place
                    place = min(max(place, index), index + 1)
                cuts[state] = before + place
            density = row.get("density", math.nan) if math.isfinite(row.get("density", math.nan)) else density
    return cuts


def penalty_curves(run: RunFiles) -> dict[int, list[tuple[float, float, float]]]:
    """{state: its points (epochs over the run, lambda, residual)} of states with doomed weights, from start to cut.

    Points are the rows of penalty.csv; for states without any, as in older runs, those of metrics.jsonl.
    """
    cuts, at_cut = cut_epochs(run), {row["state"]: row.get("residual", math.nan) for row in run.states}
    spans = {state: (before, rows) for state, before, rows in state_spans(run)}
    curves = {}
    for state in sorted({*spans, *(row["state"] for row in run.penalty)}):
        before, epochs = spans.get(state, (len(run.history), []))
        rows = [(before + row["epoch"], row) for row in run.penalty if row["state"] == state]
        rows = rows or [(before + i, row) for i, row in enumerate(epochs, 1) if row.get("lambda", 0.0) > 0]
        if not rows:
            continue
        points = [(before, 0.0, 1.0), *((place, row["lambda"], row.get("residual", math.nan)) for place, row in rows)]
        # after a cut within an epoch its end has no residual
        if state in cuts and not any(place >= cuts[state] and residual > 0 for place, _, residual in points):
            points.append((cuts[state], math.nan, at_cut.get(state, math.nan)))
        curves[state] = sorted(points, key=lambda point: point[0])
    return curves
