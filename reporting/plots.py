"""The pictures of one run: accuracy, density, penalty, units and sensitivity, each the bytes of a PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import pairwise

from reporting import figures, need
from reporting.figures import BLUE, GREEN, ORANGE, PURPLE, VERMILLION, density_axis, draw, percent_axis
from reporting.runs import RunFiles
from reporting.timeline import cut_epochs, penalty_curves, state_spans


def _mark_cuts(ax, places: Iterable[float]) -> None:
    for place in places:
        ax.axvline(place, color=VERMILLION, linestyle=":", linewidth=1.3, zorder=2)


def plot_accuracy(run: RunFiles) -> bytes:
    def paint(figure) -> None:
        ax = figure.add_subplot()
        figures.band_states(ax, run)
        marker = {"marker": "o", "markersize": 3} if len(run.history) <= 60 else {}
        for index, (_, before, rows) in enumerate(state_spans(run)):
            epochs = [before + number for number in range(1, len(rows) + 1)]
            for key, label, color, line in (
                ("train_accuracy", "train", ORANGE, "--"),
                ("val_accuracy", "validation", BLUE, "-"),
            ):
                values = [100 * row.get(key, math.nan) for row in rows]
                look = {"color": color, "linewidth": 1.5, "clip_on": False, **marker}
                ax.plot(epochs, values, line, label=None if index else label, **look)
        cells, cuts = {row["state"]: row for row in run.states}, cut_epochs(run)
        places = list(cuts.values())
        before, after = (
            [100 * cells.get(state, {}).get(f"accuracy_{when}_cut", math.nan) for state in cuts]
            for when in ("before", "after")
        )
        _mark_cuts(ax, places)
        if places:
            ax.vlines(places, before, after, VERMILLION, linewidth=1.8)
            look = {"color": VERMILLION, "linestyle": "none", "zorder": 4, "clip_on": False}
            label = "before the cut (dotted)"
            ax.plot(places, before, marker="o", mfc="white", markersize=8, label=label, **look)
            ax.plot(places, after, marker="v", markersize=4.5, label="after the cut", **look)
        percent_axis(ax.yaxis)
        ax.set_xlabel("epochs trained, all states in a row")
        ax.set_ylabel("accuracy")
        figure.legend(loc="outside lower center", ncols=4)

    return draw(figures.width_of(run), 4.0, paint)


def plot_density(run: RunFiles) -> bytes:
    def paint(figure) -> None:
        ax = figure.add_subplot()
        rows = [row for row in run.states if math.isfinite(row.get("density", math.nan))]
        finish = [row for row in rows if row["state"] == run.finish]  # at the density of the last state
        rows = [row for row in rows if row["state"] != run.finish]
        densities = [row["density"] for row in rows]
        for key, label, color, line, marker in (
            ("best_accuracy", "validation, selected model", BLUE, "-", "o"),
            ("test_accuracy", "test, the same model", GREEN, "--", "s"),
        ):
            values = [100 * row.get(key, math.nan) for row in rows]
            ax.plot([100 * d for d in densities], values, line, color=color, marker=marker, label=label, linewidth=1.5)
            for row in finish:
                value, look = 100 * row.get(key, math.nan), {"linestyle": "none", "marker": "*", "markersize": 11}
                if math.isfinite(value):
                    words = f"{label.partition(',')[0]}, after the finish"
                    ax.plot([100 * row["density"]], [value], color=color, label=words, **look)
        density_axis(ax, min(densities, default=1.0))
        percent_axis(ax.yaxis)
        ax.margins(x=0.06, y=0.12)
        ax.set_ylabel("accuracy")
        figure.legend(loc="outside lower center", ncols=2)

    return draw(6.6, 3.8, paint)


def plot_penalty(run: RunFiles) -> bytes:
    curves, cuts = penalty_curves(run), cut_epochs(run)
    end = max([len(run.history), *(points[-1][0] for points in curves.values())])  # may be within an epoch

    def paint(figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        few = len(run.history) <= 60 and not run.penalty
        marker = {"marker": "o", "markersize": 4, "clip_on": False} if few else {}
        for ax in (upper, lower):
            figures.band_states(ax, run, labels=ax is upper)
            _mark_cuts(ax, cuts.values())
        upper.set_xlim(0, end)
        lowest = 0.1
        for points in curves.values():
            strengths = [(place, value) for place, value, _ in points if math.isfinite(value)]
            upper.plot(*zip(*strengths, strict=True), color=PURPLE, linewidth=1.5, **marker)
            left = [(place, value) for place, _, value in points if 0 < value < math.inf]
            lowest = min(lowest, *(value for _, value in left))
            lower.plot(*zip(*left, strict=True), color=BLUE, linewidth=1.5, **marker)
        lower.set_yscale("log")
        lower.set_ylim(10.0 ** math.floor(math.log10(lowest)), 2.0)
        lower.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        lower.minorticks_off()
        upper.set_ylabel("penalty lambda")
        lower.set_ylabel("residual: norm of\ndoomed weights over\nthat at the start")
        lower.set_xlabel("epochs trained, all states in a row; dotted: the cut")

    return draw(figures.width_of(run), 4.8, paint)


def _unit_panels(run: RunFiles) -> dict[str, dict[str, list[dict]]]:
    """{title: {layer: rows of units.csv}}: a panel per kind of units, and per layer type for single weights."""
    panels: dict[str, dict[str, list[dict]]] = {}
    for row in run.units:
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", row["layer"])
        kind = f"{row['kind']}s kept"
        if block and row["kind"] == "weight":
            kind = f"{block[2]}: {kind}"
        panels.setdefault(kind, {}).setdefault(block[1] if block else row["layer"], []).append(row)
    return panels


def plot_units(run: RunFiles) -> bytes:
    panels = _unit_panels(run)
    states = sorted({row["state"] for row in run.units})
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    tallest = max(map(len, panels.values()))
    names_width = 0.1 + 0.075 * max(len(layer) for layers in panels.values() for layer in layers)
    cell_width = min(1.0, max(0.32, 2.6 / len(states)))
    cell_height = min(0.32, max(0.16, 5.0 / tallest))
    width = max(5.0, 0.9 + columns * (0.3 + names_width + cell_width * len(states)))
    height = lines * (0.9 + cell_height * tallest)

    def paint(figure) -> None:
        colors = need("matplotlib").colormaps["viridis"].with_extremes(bad="#dddddd")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for ax in axes[len(panels) :]:
            ax.remove()
        for ax, (title, layers) in zip(axes, panels.items(), strict=False):
            grid = [[math.nan] * len(states) for _ in layers]
            for y, rows in enumerate(layers.values()):
                for row in rows:
                    if row["total"] > 0 and math.isfinite(row["kept"]):
                        x, share = states.index(row["state"]), row["kept"] / row["total"]
                        grid[y][x] = share
                        color = "black" if share > 0.55 else "white"
                        look = {"ha": "center", "va": "center", "fontsize": min(8.0, 22 * cell_width)}
                        ax.text(x, y, f"{100 * share:.0f}", color=color, **look)
            image = ax.imshow(grid, aspect="auto", cmap=colors, vmin=0, vmax=1, interpolation="nearest")
            ax.set_xticks(range(len(states)), states, fontsize=8)
            ax.set_yticks(range(len(layers)), list(layers), fontsize=8)
            ax.set_title(title, fontsize=10)
            ax.set_xlabel("state", fontsize=9)
            ax.set_ylabel("block" if all(layer.isdigit() for layer in layers) else "layer", fontsize=9)
            ax.grid(False)
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
        bar = figure.colorbar(image, ax=list(axes[: len(panels)]), fraction=0.04, pad=0.02, aspect=6 * height)
        bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0%", "25%", "50%", "75%", "100%"])
        bar.outline.set_visible(False)

    return draw(width, height, paint)


def plot_sensitivity(run: RunFiles) -> bytes:
    """The first pruning's probe: a panel per kind, a row per layer, a cell per share removed from that layer alone."""
    panels: dict[str, list[dict]] = {}
    for layer in run.sensitivity[0]["layers"]:
        panels.setdefault(f"{layer['kind']}s", []).append(layer)
    ends = {row["layer"]: 1 - row["kept"] / row["total"] for row in run.units if row["state"] == run.units[-1]["state"]}
    highest = max(loss - layer["loss"][0] for layers in panels.values() for layer in layers for loss in layer["loss"])
    tallest = max(map(len, panels.values()))
    height, digits = 1.2 + 0.27 * tallest, 2 if highest > 0.2 else 3

    def paint(figure) -> None:
        norm = need("matplotlib.colors").PowerNorm(0.5, vmin=0, vmax=max(highest, 1e-9))
        colors, axes = need("matplotlib").colormaps["cividis"], figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (title, layers) in zip(axes, panels.items(), strict=True):
            for y, layer in enumerate(layers):
                shares = [1 - left / layer["units"] for left in layer["left"]]
                middles = [(before + after) / 2 for before, after in pairwise(shares)]
                cells = zip(pairwise([*middles, 1.0]), layer["loss"][1:], strict=True)
                for (left, right), loss in cells:
                    rise = max(0.0, loss - layer["loss"][0])
                    ax.barh(y, right - left, 0.94, left, color=colors(norm(rise)), linewidth=0)
                    if right - left > 0.055:
                        look = {"color": "white" if norm(rise) < 0.55 else "black", "fontsize": 6.5}
                        ax.text((left + right) / 2, y, f"{rise:.{digits}f}", ha="center", va="center", **look)
                if layer["layer"] in ends:
                    ax.vlines(ends[layer["layer"]], y + 0.2, y + 0.47, VERMILLION, linewidth=3, clip_on=False)
            names = [re.sub(r"^blocks\.(\d+)\.\w+$", r"\1", layer["layer"]) for layer in layers]
            ax.set_yticks(range(len(layers)), names, fontsize=8)
            ax.set_ylabel("block" if all(name.isdigit() for name in names) else "layer", fontsize=9)
            ax.set_ylim(len(layers) - 0.5, -0.5)
            ax.set_xlim(0, 1)
            ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
            ax.set_xlabel("share of the layer that is removed", fontsize=9)
            ax.set_title(title, fontsize=10)
            ax.grid(False)
        scale = need("matplotlib.cm").ScalarMappable(norm, colors)
        bar = figure.colorbar(scale, ax=list(axes), label="rise of the loss", fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)

    return draw(1.2 + 4.6 * len(panels), height, paint)
