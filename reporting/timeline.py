"""Where things lie on the axis of a run's epochs, all states in a row: from a `Run` to its states, cuts and penalty."""

from __future__ import annotations

import math

from reporting.runs import Run


def state_spans(run: Run) -> list[tuple[int, int, list[dict]]]:
    """(state, epochs before it, its rows of metrics.jsonl), in order."""
    spans, before = [], 0
    for state in sorted({row["state"] for row in run.history}):
        rows = [row for row in run.history if row["state"] == state]
        spans.append((state, before, rows))
        before += len(rows)
    return spans


def cut_epochs(run: Run) -> dict[int, float]:
    """{state: epochs before its cut}, counted over the run; states in which density never falls have none."""
    cuts, density = {}, math.inf
    total = run.length[1]
    for state, before, rows in state_spans(run):
        for index, row in enumerate(rows):
            if row.get("density", math.nan) < density and state > 0:
                place = 0.0
                if run.args["struct"] == "rsst":
                    # where --reg_finish says, or the epoch border next to it, within the epoch whose density fell
                    place = float(run.args.get("reg_finish") or 0.0) * total
                    border = max(1, math.floor(place + 0.5))
                    place = border if abs(border - place) < total / 10 else place
                    place = min(max(place, index), index + 1)
                cuts[state] = before + place
            density = row.get("density", math.nan) if math.isfinite(row.get("density", math.nan)) else density
    return cuts
