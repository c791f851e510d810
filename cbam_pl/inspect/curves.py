"""Training curves, read from the logs of runs; several runs in one figure."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cbam_pl.inspect.drawing import DPI, NORMAL, SMALL

FIGURES = ("train/loss", "val/loss", "train/acc", "val/acc", "lr")
# Okabe and Ito's colours, which differ for every kind of colour blindness; yellow is too pale for a line.
LINE_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_STYLES = [("--", "train"), ("-", "val")]


@dataclass(frozen=True)
class History:
    """What a run logged."""

    name: str  # for the legend
    steps: np.ndarray  # (S,) optimizer steps, from 1
    losses: np.ndarray  # (S,) loss of each step's batch
    epochs: np.ndarray  # (E,) from 1
    figures: dict[str, np.ndarray]  # train/loss, val/loss, train/acc, val/acc, lr → (E,), NaN where an epoch has none


def read_metrics(logs: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv, one per epoch, without empty cells; of an epoch trained twice, the last."""
    with (logs / "metrics.csv").open(newline="") as stream:
        rows = {int(row["epoch"]): row for row in csv.DictReader(stream)}
    return [{name: float(value) for name, value in rows[epoch].items() if value} for epoch in sorted(rows)]


def read_history(logs: str | Path, name: str) -> History | None:
    """What a run logged into logs/RECIPE/version_N, or a plain Trainer's TensorBoardLogger into its `log_dir`.

    None where there is nothing of a complete epoch.
    """
    logs = Path(logs)
    if not logs.is_dir():
        return None
    events = EventAccumulator(str(logs), {"scalars": 0})  # all of them
    events.Reload()
    logged = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    if (logs / "metrics.csv").is_file():
        rows = read_metrics(logs)
    else:
        ended = sorted(logged.get("train/loss", {}))
        rows = [{"epoch": n, **{key: logged[key][n] for key in FIGURES if n in logged.get(key, {})}} for n in ended]
    if not rows:
        return None
    figures = {key: np.array([row.get(key, np.nan) for row in rows]) for key in FIGURES}
    losses = logged.get("train/loss_step", {})
    steps = np.array(sorted(losses), dtype=int)
    epochs = np.array([row["epoch"] for row in rows])
    return History(name, steps, np.array([losses[step] for step in steps.tolist()]), epochs, figures)


def draw_curves(histories: Sequence[History]) -> Figure:
    """Loss by optimizer step, raw and smoothed; loss, accuracy and learning rate by epoch; one colour per run."""
    figure = Figure((10.0, 7.2), dpi=DPI, layout="constrained")
    (by_step, loss), (accuracy, rate) = figure.subplots(2, 2)
    key = []  # one legend for all, below them, where it hides no curve
    for number, history in enumerate(histories):
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        count = len(history.steps)
        if count:
            window = min(count, max(5, count // 50))
            middle = history.steps[(window - 1) // 2 :][: count - window + 1]
            raw = {"alpha": 0.25, "linewidth": 0.5, "zorder": 1, "rasterized": True}
            by_step.plot(history.steps, history.losses, color=colour, **raw)
            smoothed = np.convolve(history.losses, np.full(window, 1 / window), "valid")  # (S − window + 1,)
            by_step.plot(middle, smoothed, color=colour, linewidth=1.5, zorder=2)
        for axes, name in ((loss, "loss"), (accuracy, "acc")):
            for style, split in _STYLES:
                _plot(axes, history.epochs, history.figures[f"{split}/{name}"], color=colour, linestyle=style)
        # Thinner and thinner, so that equal rates can all be seen.
        width = 1.5 * (len(histories) - number)
        _plot(rate, history.epochs, history.figures["lr"], color=colour, linewidth=width, drawstyle="steps-mid")
        key.append(Line2D([], [], color=colour, label=history.name))
    losses = np.concatenate([history.losses for history in histories])
    losses = losses[np.isfinite(losses)]
    if losses.size:
        # A few steps, above all the first ones, may have several times the loss of all others.
        by_step.set_ylim(0, 1.05 * float(np.quantile(losses, 0.998)))
    rates = np.concatenate([history.figures["lr"] for history in histories])
    rates = rates[np.isfinite(rates)]
    if rates.size and rates.min() > 0 and rates.max() > 5 * rates.min():
        rate.set_yscale("log")
    else:
        rate.set_ylim(0, 1.1 * rates.max(initial=0) or 1)
    label_axes(by_step, "optimizer step", "training loss (pale: raw, bold: smoothed)")
    for axes, label in ((loss, "mean loss"), (accuracy, "accuracy"), (rate, "learning rate")):
        label_axes(axes, "epoch", label)
    key += [Line2D([], [], color="0.4", linestyle=style, label=f"by epoch: {split}") for style, split in _STYLES]
    longest = max(len(history.name) for history in histories)
    columns = max(1, min(4, 140 // (longest + 8)))  # 140 letters fit into the width, and a line's sample takes 8
    legend = figure.legend(handles=key, loc="outside lower center", ncols=columns, fontsize=NORMAL, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Name both axes, in the style of all curves and charts."""
    axes.set_xlabel(x, fontsize=NORMAL)
    axes.set_ylabel(y, fontsize=NORMAL)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plot(axes: Axes, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    known = np.isfinite(y)  # not every epoch need be validated; a line would end at each that was not
    axes.plot(x[known], y[known], marker="o" if known.sum() == 1 else None, **style)  # one point draws no line
