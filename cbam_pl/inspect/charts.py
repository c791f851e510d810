"""Charts of what was measured of a network: its gates replaced, its layers randomised, its images corrupted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cbam_pl.inspect.ablation import REPLACEMENTS
from cbam_pl.inspect.curves import LINE_COLOURS, label_axes
from cbam_pl.inspect.drawing import COLOURS, DPI, NORMAL, SMALL

_STYLES = dict(zip(REPLACEMENTS, zip(LINE_COLOURS, "oDx", strict=False), strict=True))  # colour and marker


def draw_ablation(ablation: Mapping[str, Any], title: str) -> Figure:
    """The result of `ablate_gates`: accuracy by block and replacement, one panel for each gate.

    Bars are one standard error of the change on either side.
    """
    gates = list(dict.fromkeys(row["gate"] for row in ablation["rows"]))
    blocks = list(dict.fromkeys(row["block"] for row in ablation["rows"]))
    figure = Figure((1.6 + 2.4 * len(gates), 1.9 + 0.2 * len(blocks)), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=NORMAL + 1, parse_math=False)
    panels = figure.subplots(1, len(gates), sharex=True, sharey=True, squeeze=False)[0]
    for axes, gate in zip(panels, gates, strict=True):
        axes.axvline(100 * ablation["accuracy"], color="0.5", linewidth=1, label="as trained")
        for replacement, (colour, marker) in _STYLES.items():
            rows = [row for row in ablation["rows"] if (row["gate"], row["replaced_by"]) == (gate, replacement)]
            places = [blocks.index(row["block"]) for row in rows]
            values, errors = (np.array([100 * row[name] for row in rows]) for name in ("accuracy", "change_error"))
            axes.plot(values, places, marker, color=colour, markersize=6, fillstyle="none", label=replacement)
            axes.hlines(places, values - errors, values + errors, color=colour, linewidth=1)
        axes.axhline(len(blocks) - 1.5, color="0.8", linewidth=0.8)  # between the blocks and all of them
        label_axes(axes, "accuracy, %\n(bars: ± 1 standard error)", "")
        axes.set_title(f"{gate} gates" if gate == "both" else f"{gate} gate", loc="left", fontsize=NORMAL)
    left, right = panels[0].get_xlim()
    panels[0].set_xlim(max(left, -2), min(right, 102))  # for all of them; no further than there are accuracies
    panels[0].set_yticks(range(len(blocks)), blocks)
    panels[0].set_ylim(len(blocks) - 0.5, -0.5)
    _add_legend(figure, panels[0], 4 if len(gates) > 1 else 2)
    return figure


def draw_randomisation(randomisation: Mapping[str, Any], title: str) -> Figure:
    """The result of `cascading_randomisation`: rank correlation by step, one curve for each map."""
    layers = randomisation["layers"]
    figure = Figure((max(6.0, 2 + 0.3 * len(layers)), 4.2), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=NORMAL + 1, parse_math=False)
    axes = figure.subplots()
    gates = [name for name in randomisation["spearman"] if name != "Grad-CAM"]
    colours = dict(zip(gates, COLOURS(np.linspace(0, 0.9, len(gates))), strict=True))
    for name, values in randomisation["spearman"].items():
        style = (
            {"color": "black", "linewidth": 2.5} if name == "Grad-CAM" else {"color": colours[name], "linewidth": 1.2}
        )
        curve = [1.0, *(np.nan if value is None else value for value in values)]
        axes.plot(range(len(curve)), curve, marker="o", markersize=3, label=name, **style)
    axes.axhline(0, color="0.5", linewidth=0.8)
    label_axes(axes, "re-initialised, from the top down to …", "Spearman's rank correlation")
    axes.set_xticks(range(1 + len(layers)), ["nothing", *layers], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_ylim(min(axes.get_ylim()[0], -0.1), 1.05)
    many = len(gates) > 16
    for line in axes.get_lines() if many else []:  # then the first and the last of them tell how the colours go
        if line.get_label() not in ("Grad-CAM", gates[0], gates[-1]):
            line.set_label("")
    _add_legend(figure, axes, 5)
    return figure


def draw_robustness(rows: Sequence[tuple[str, Sequence[float]]], columns: Sequence[str], title: str) -> Figure:
    """A heat map of accuracies in per cent: rows of a label and its values, one a column; means in bold."""
    values = np.array([row for _, row in rows])
    figure = Figure((2.6 + 0.62 * len(columns), 1.1 + 0.26 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(values, cmap=COLOURS, vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=SMALL)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=SMALL)
    axes.set_xlabel("severity", fontsize=NORMAL)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=NORMAL, parse_math=False)
    for (row, column), value in np.ndenumerate(values):
        weight = "bold" if "mean" in (columns[column], rows[row][0].split()[0]) else "normal"
        colour = "black" if value > 45 else "white"  # readable on the colour below it
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL, "weight": weight}
        axes.text(column, row, f"{value:.1f}", color=colour, **style)
    bar = figure.colorbar(picture, ax=axes)
    bar.set_label("test accuracy, %", fontsize=NORMAL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def _add_legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False)
