"""The picture of a comparison: test accuracy over density, a curve per group."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from reporting.figures import COLORS, LINES, MARKERS, density_axis, draw, percent_axis
from reporting.groups import Group, Point

STAR = "stars: after the finish"


def plot_compare(blocks: Sequence[tuple[str, list[Group]]]) -> bytes:
    longest = max(len(group.label) for _, groups in blocks for group in groups)
    columns = 1 if longest > 36 else 2 if longest > 16 else 3
    heights = []
    for _, groups in blocks:
        lines = sum(_legend_label(group).count("\n") + 1 for group in groups)
        heights.append(4.0 + 0.22 * math.ceil(lines / columns))

    def paint(figure) -> None:
        panels = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights)
        for (data, groups), panel in zip(blocks, panels[:, 0], strict=True):
            _paint_compare(panel, data, groups, columns)

    return draw(7.4, sum(heights), paint)


def _legend_label(group: Group) -> str:
    return textwrap.fill(f"{group.label}, n = {len(group.runs)}", 80)


def _coordinates(points: Sequence[Point]) -> list[list[float]]:
    """Densities, accuracies and their standard deviations, in percent."""
    rows = [(point.density, *point.test) for point in points]
    return [[100 * row[index] for row in rows] for index in range(3)]


def _paint_compare(panel, data: str, groups: Sequence[Group], columns: int) -> None:
    ax = panel.add_subplot()
    pruned = [group for group in groups if group.method != "dense"]
    lowest = min((point.density for group in pruned for point in group.points), default=1.0)
    for index, group in enumerate(pruned):
        points = [point for point in group.points if math.isfinite(point.density) and math.isfinite(point.test[0])]
        finish = [point for point in points if point.finish]  # at the density of the last state
        points = [point for point in points if not point.finish]
        color, bars = COLORS[index % len(COLORS)], {"capsize": 3.5, "label": _legend_label(group)}
        look = {"linestyle": LINES[index % len(LINES)], "linewidth": 1.6, "elinewidth": 1.1, "markersize": 6}
        look |= {"marker": MARKERS[index % len(MARKERS)], "markerfacecolor": "white" if index % 2 else color}
        ax.errorbar(*_coordinates(points), color=color, **look, **bars)
        if finish:
            bars["label"] = None if any(line.get_label() == STAR for line in ax.containers) else STAR
            ax.errorbar(*_coordinates(finish), color=color, marker="*", markersize=12, linestyle="none", **bars)
    for index, group in enumerate(group for group in groups if group.method == "dense"):
        mean, sd = group.points[-1].test
        style = (0, (6, 2, 1, 2)) if index == 0 else (0, (1 + index, 1.5))
        ax.axhline(100 * mean, color="black", linewidth=1.3, linestyle=style, label=_legend_label(group))
        if math.isfinite(sd):
            ax.axhspan(100 * (mean - sd), 100 * (mean + sd), color="black", alpha=0.08, linewidth=0)
    ax.margins(x=0.06, y=0.1)
    density_axis(ax, lowest)
    percent_axis(ax.yaxis)
    ax.set_ylabel("test accuracy, mean and sd over seeds")
    ax.set_title(data, fontsize=11)
    panel.legend(loc="outside lower center", ncols=columns, fontsize=9)
