"""What all pictures share: colours, style, axes, and drawing into a PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

from reporting import need
from reporting.runs import RunFiles
from reporting.timeline import state_spans

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#767676"
COLORS = [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY]  # of curves, in turn
LINES, MARKERS = ["-", "--", "-.", ":"], ["o", "s", "^", "D", "v", "P", "X", "*"]
_LOOK = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "text.parse_math": False,  # show names literally
}


def draw(width: float, height: float, paint: Callable) -> bytes:
    """The PNG of a figure, in inches, that `paint(figure)` fills."""
    matplotlib, figures = need("matplotlib"), need("matplotlib.figure")
    agg = need("matplotlib.backends.backend_agg")
    with matplotlib.rc_context(_LOOK):
        figure = figures.Figure(figsize=(width, height), dpi=180, layout="constrained", facecolor="white")
        agg.FigureCanvasAgg(figure)
        paint(figure)
        png = io.BytesIO()
        figure.savefig(png, format="png")
    return png.getvalue()


def percent_axis(axis) -> None:
    """Tick labels of an axis that holds percent."""
    axis.set_major_formatter(lambda value, _: f"{value:g}%")


def density_axis(ax, lowest: float) -> None:
    """Density in percent, falling to the right; logarithmic when it gets below a tenth."""
    if 0 < lowest < 0.1:
        ax.set_xscale("log")
        ticks = [tick for tick in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if tick >= 100 * lowest]
        ax.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
        ax.minorticks_off()
    else:
        percent_axis(ax.xaxis)
    ax.invert_xaxis()
    ax.set_xlabel("density: share of the prunable weights that is left (dense at the left)")


def band_states(ax, run: RunFiles, labels: bool = True) -> None:
    """Shade and separate the states; label at most about ten of them with number and density, above the axes."""
    spans, total = state_spans(run), len(run.history)
    tested = {row["state"]: row.get("density", math.nan) for row in run.states}
    for position, (_, before, rows) in enumerate(spans):
        if position % 2:
            ax.axvspan(before, before + len(rows), color="#f2f2f2", linewidth=0, zorder=0)
        if before:
            ax.axvline(before, color="#bdbdbd", linewidth=0.8, zorder=1)
    ax.set_xlim(0, total)
    ax.xaxis.set_major_locator(need("matplotlib.ticker").MaxNLocator(integer=True))
    if labels:
        step = math.ceil(len(spans) / 10)
        middles, names = [], []
        for state, before, rows in spans[::step]:
            density = tested.get(state, rows[-1].get("density", math.nan))
            middles.append(before + len(rows) / 2)
            name = "finish" if state == run.finish else f"state {state}"
            names.append(f"{name}\n{100 * density:.3g}%" if math.isfinite(density) else name)
        top = ax.secondary_xaxis("top")
        top.set_xticks(middles, names, fontsize=8.5)
        top.tick_params(length=0)
        top.spines["top"].set_visible(False)


def width_of(run: RunFiles) -> float:
    return min(10.0, max(6.6, 0.7 * len(state_spans(run)), len(run.history) / 40))
