"""How a training went, read from a run's logs and drawn as curves; several runs in one picture."""

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

from cbam_pl.inspect.page import DPI, LARGE, NORMAL, SMALL

FIGURES = ("train/loss", "val/loss", "train/acc", "val/acc", "lr")
# Okabe and Ito's colours, which differ for every kind of colour blindness; yellow is too pale for a line.
LINE_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_STYLES = [("--", "train"), ("-", "val")]


@dataclass(frozen=True)
class History:
    """What a run logged.

    Args:
        name: of the run, for the legend.
        steps: (S,) optimizer steps, from 1.
        losses: (S,) loss of each step's batch.
        epochs: (E,) from 1.
        figures: train/loss, val/loss, train/acc, val/acc, lr → (E,), NaN where an epoch has none.
    """

    name: str
    steps: np.ndarray
    losses: np.ndarray
    epochs: np.ndarray
    figures: dict[str, np.ndarray]


def read_history(logs: Path, name: str) -> History | None:
    """What the run with this log folder logged; None where there is no metrics.csv.

    Args:
        logs: logs/RECIPE/version_N.
        name: of the run, for the legend.
    """
    if not (logs / "metrics.csv").is_file():
        return None
    with (logs / "metrics.csv").open(newline="") as stream:
        rows = {int(row["epoch"]): row for row in csv.DictReader(stream)}  # of an epoch trained twice, the last
    epochs = sorted(rows)
    figures = {key: np.array([float(rows[epoch].get(key) or "nan") for epoch in epochs]) for key in FIGURES}
    steps, losses = _read_steps(logs)
    return History(name, steps, losses, np.array(epochs), figures)


def _read_steps(logs: Path) -> tuple[np.ndarray, np.ndarray]:
    """Optimizer steps and their losses, from the TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # All scalars, and nothing else of what the files hold.
    sizes = {"scalars": 0, "images": 1, "histograms": 1, "tensors": 1, "audio": 1, "compressedHistograms": 1}
    events = EventAccumulator(str(logs), sizes)
    events.Reload()
    if "train/loss_step" not in events.Tags()["scalars"]:
        return np.array([]), np.array([])
    points = {event.step: event.value for event in events.Scalars("train/loss_step")}
    steps = sorted(points)
    return np.array(steps), np.array([points[step] for step in steps])


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Means of `window` neighbours. Values (S,) → (S − window + 1,)."""
    return np.convolve(values, np.full(window, 1 / window), "valid")


def draw_curves(histories: Sequence[History], title: str) -> Figure:
    """Loss by optimizer step, raw and smoothed; loss, accuracy and learning rate by epoch; a colour for each run.

    The smoothed loss is the mean of a fiftieth of all steps, and of at least five, around each.

    Raises:
        ValueError: there is no run.
    """
    if not histories:
        raise ValueError("no run has logs, so there are no curves")
    figure = Figure((10.0, 7.2), dpi=DPI, layout="constrained")
    figure.suptitle(title.replace("$", r"\$"), fontsize=LARGE)
    (by_step, loss), (accuracy, rate) = figure.subplots(2, 2)
    key = []  # one legend below all, where it hides no curve
    for number, history in enumerate(histories):
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        count = len(history.steps)
        if count:
            window = min(count, max(5, count // 50))
            middle = history.steps[(window - 1) // 2 :][: count - window + 1]
            raw = {"alpha": 0.25, "linewidth": 0.5, "zorder": 1, "rasterized": True}
            by_step.plot(history.steps, history.losses, color=colour, **raw)
            by_step.plot(middle, smooth(history.losses, window), color=colour, linewidth=1.5, zorder=2)
        for axes, name in ((loss, "loss"), (accuracy, "acc")):
            for style, split in _STYLES:
                _plot(axes, history.epochs, history.figures[f"{split}/{name}"], color=colour, linestyle=style)
        # Thinner and thinner, so that equal rates can all be seen.
        width = 1.5 * (len(histories) - number)
        _plot(rate, history.epochs, history.figures["lr"], color=colour, linewidth=width, drawstyle="steps-mid")
        key.append(Line2D([], [], color=colour, label=history.name.replace("$", r"\$")))
    _label(by_step, "Training loss by step (pale: raw, bold: smoothed)", "optimizer step", "loss")
    losses = np.concatenate([history.losses for history in histories])
    losses = losses[np.isfinite(losses)]
    if losses.size:
        # A few steps, above all the first ones, may have several times the loss of all others.
        by_step.set_ylim(0, 1.05 * float(np.quantile(losses, 0.998)))
    else:
        by_step.text(0.5, 0.5, "the logs hold no steps", ha="center", va="center", transform=by_step.transAxes)
    _label(loss, "Mean loss", "epoch", "loss")
    _label(accuracy, "Accuracy", "epoch", "accuracy")
    _label(rate, "Learning rate", "epoch", "learning rate")
    rates = np.concatenate([history.figures["lr"] for history in histories])
    if rates.min() > 0 and rates.max() > 5 * rates.min():
        rate.set_yscale("log")
    else:
        rate.set_ylim(0, 1.1 * rates.max() or 1)
    key += [Line2D([], [], color="0.4", linestyle=style, label=f"by epoch: {split}") for style, split in _STYLES]
    figure.legend(handles=key, loc="outside lower center", ncols=4, fontsize=NORMAL, frameon=False)
    return figure


def _plot(axes: Axes, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    # One point draws no line.
    axes.plot(x, y, marker="o" if np.isfinite(y).sum() == 1 else None, **style)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=NORMAL + 1)
    axes.set_xlabel(x, fontsize=NORMAL)
    axes.set_ylabel(y, fontsize=NORMAL)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color="0.9", linewidth=0.6)
    if x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
