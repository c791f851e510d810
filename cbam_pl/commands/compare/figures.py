"""The report's figures: small enough that one fills a phone's width, and readable without colours."""

from collections.abc import Sequence
from io import BytesIO, StringIO
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from cbam_pl.inspect.curves import LINE_COLOURS
from cbam_pl.inspect.page import DPI, NORMAL, SMALL

_WIDTH, _HEIGHT = 4.1, 2.9  # inches
_MARKERS, _SIGNS = "osD^vPX", "●■◆▲▼✚✖"
_MOST_CLASSES = 20


def draw_epochs(recipes: dict[str, Any]) -> Figure:
    """Validation accuracy by epoch: mean over the seeds, with a band of one standard deviation either way."""
    figure, axes = _new(_HEIGHT)
    for number, recipe in enumerate(recipes.values()):
        curve = {name: np.array(values) for name, values in recipe["curve"].items()}
        style = {"color": _colour(number), "label": recipe["label"]}
        every = max(1, len(curve["epoch"]) // 6)
        axes.plot(curve["epoch"], curve["mean"], marker=_marker(number), markevery=every, markersize=4, **style)
        axes.fill_between(
            curve["epoch"],
            curve["mean"] - curve["sd"],
            curve["mean"] + curve["sd"],
            color=_colour(number),
            alpha=0.18,
            lw=0,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, "epoch", "validation accuracy, %")
    axes.legend(fontsize=SMALL, frameon=False)
    return figure


def draw_differences(recipes: dict[str, Any]) -> Figure:
    """Each recipe's difference to the baseline: the pairs as dots, their mean and 95 % interval."""
    shown = [(number, one) for number, one in enumerate(recipes.values()) if one["difference"]]
    figure, axes = _new(0.9 + 0.5 * len(shown))
    axes.axvline(0, color="0.4", linewidth=1)
    for row, (number, recipe) in enumerate(shown):
        difference = recipe["difference"]
        axes.plot(difference["pairs"], [row + 0.2] * len(difference["pairs"]), "o", color="0.55", markersize=3.5)
        if difference["interval"]:
            axes.plot(difference["interval"], [row, row], color=_colour(number), linewidth=2.5)
        axes.plot(difference["mean"], row, _marker(number), color=_colour(number), markersize=7)
    axes.set_yticks(range(len(shown)), [fill(recipe["label"], 16) for _, recipe in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    _label(axes, "test accuracy minus baseline's, points", "")
    return figure


def draw_against_cost(recipes: dict[str, Any], key: str, heading: str, divisor: float) -> Figure:
    """Test accuracy, mean ± one standard deviation, against one cost."""
    figure, axes = _new(2.4)
    costs = []
    for number, recipe in enumerate(recipes.values()):
        if recipe["cost"] is None or recipe["cost"][key] is None:
            continue
        test = recipe["test_acc"]
        costs.append(recipe["cost"][key] / divisor)
        axes.errorbar(
            costs[-1],
            test["mean"],
            yerr=test["sd"] or None,
            fmt=_marker(number),
            color=_colour(number),
            markersize=6,
            capsize=3,
            label=recipe["label"],
        )
    if costs and max(costs) - min(costs) < 0.02 * max(costs):
        middle = (max(costs) + min(costs)) / 2
        axes.set_xlim(0.985 * middle, 1.015 * middle)  # costs that hardly differ are not to look far apart
    axes.margins(0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if costs and max(costs) >= 10_000:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:.4g} M" if value >= 1e6 else f"{value:,.0f}")
    _label(axes, heading, "test accuracy, %")
    return figure


def draw_classes(recipes: dict[str, Any]) -> Figure | None:
    """Differences of each class's accuracy with their 95 % intervals; of many classes the largest differences."""
    shown = [(number, one) for number, one in enumerate(recipes.values()) if one["per_class"]]
    if not shown:
        return None
    largest: dict[str, float] = {}
    for _, recipe in shown:
        for row in recipe["per_class"]:
            largest[row["class"]] = max(largest.get(row["class"], 0.0), abs(row["mean"]))
    chosen = set(sorted(largest, key=lambda name: -largest[name])[:_MOST_CLASSES])
    classes = [name for name in largest if name in chosen]
    figure, axes = _new(0.9 + len(classes) * (0.16 + 0.1 * len(shown)))
    axes.axvline(0, color="0.4", linewidth=1)
    for place, (number, recipe) in enumerate(shown):
        offset = 0.6 * ((place + 0.5) / len(shown) - 0.5)
        rows = {row["class"]: row for row in recipe["per_class"]}
        for height, name in enumerate(classes):
            row, colour = rows[name], _colour(number)
            if row["interval"]:
                axes.plot(row["interval"], [height + offset] * 2, linewidth=1.2, color=colour)
            axes.plot(row["mean"], height + offset, _marker(number), markersize=4, color=colour)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    _label(axes, "class's accuracy minus baseline's, points", "")
    return figure


def as_svg(figure: Figure) -> str:
    """A figure as an SVG element to stand in a page, its text as text."""
    # "none": text is set in the page's own font, and can be searched and read aloud.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "compare", "font.family": "sans-serif"}):
        stream = StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    return text[text.index("<svg") :]


def as_png(figure: Figure) -> bytes:
    """A figure as a small PNG file: 256 colours."""
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    small = BytesIO()
    Image.open(stream).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def _new(height: float) -> tuple[Figure, Axes]:
    figure = Figure((_WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=NORMAL)
    axes.set_ylabel(y, fontsize=NORMAL)
    axes.tick_params(labelsize=NORMAL)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(number: int) -> str:
    return LINE_COLOURS[number % len(LINE_COLOURS)]


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]


def legend(recipes: dict[str, Any]) -> Sequence[tuple[str, str, str]]:
    """Label, colour and mark of each recipe."""
    return [
        (recipe["label"], _colour(number), _SIGNS[number % len(_SIGNS)])
        for number, recipe in enumerate(recipes.values())
    ]
