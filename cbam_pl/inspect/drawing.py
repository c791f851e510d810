"""Draw what a network computes: feature maps, attention, Grad-CAM, confusion and calibration, as matplotlib figures.

Those that draw maps raise a ValueError for a map that is not finite, or constant over all images, since its picture
would look like a result; but constant gates are drawn, and the picture says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from cbam_pl.inspect.calibration import Reliability
from cbam_pl.inspect.gates import AttentionMaps, FeatureMaps, upsample

DPI = 100  # pixels per inch of PNG files and TensorBoard's images
SMALL, NORMAL = 7.5, 8.5  # font sizes in points
COLOURS = colormaps["viridis"]  # readable with every kind of colour blindness, and in grey
OPACITY = 0.65  # of a map over its image
_SIDE = 128  # pixels of a panel, four times those of a CIFAR image
_CELL, _CELL_GAP = 64, 4  # pixels of one feature map, and between two
_MOSAIC = 3 * _CELL + 2 * _CELL_GAP
_GAP = 14  # pixels between a panel and the one below it
_HEADING: dict[str, Any] = {"loc": "left", "fontsize": NORMAL, "parse_math": False}  # of a column
_MIN_SPAN = 0.05  # of a gate's colour scale, so that a nearly constant gate looks nearly constant
_MIN_IMAGES = 10  # of a bin of the reliability diagram


@dataclass(frozen=True)
class CaptionedImages:
    """Images (B, 3, H, W) uint8 to draw, each with a caption of up to four lines."""

    pixels: Tensor
    captions: Sequence[str]


def describe(logits: Tensor, classes: Sequence[str], headings: Sequence[str]) -> list[str]:
    """Captions: each image's heading, the predicted class and its probability. Logits (B, classes)."""
    probabilities, labels = logits.float().softmax(1).cpu().max(1)
    return [
        f"{heading}\npredicted: {classes[label]}\nprobability {100 * probability:.0f} %"
        for heading, label, probability in zip(headings, labels.tolist(), probabilities.tolist(), strict=True)
    ]


def draw_features(images: CaptionedImages, features: FeatureMaps, title: str) -> Figure:
    """The first nine channels of each convolution block; one row per image."""
    figure, columns = _new_panels(images, len(features.blocks), 4, title, _MOSAIC)
    for axes, (name, values) in zip(columns, features.blocks.items(), strict=True):
        _check_map(f"the output of {name}", values)
        output = values.float()
        channels, height, width = output.shape[1:]
        first = output[:, :9]
        # The scale ends at the 98 % quantile, or a few bright places would leave all others dark; torch.quantile
        # accepts at most 16 million values.
        low, high = min(0.0, float(output.min())), float(first.flatten().kthvalue(round(0.98 * first.numel())).values)
        high = high if high > low else float(output.max())
        cells = F.interpolate(first, size=(_CELL, _CELL), mode="nearest-exact")  # (B, 9, cell, cell)
        mosaics = [make_grid(one[:, None], 3, _CELL_GAP, pad_value=torch.nan)[0] for one in cells]
        inner = [mosaic[_CELL_GAP:-_CELL_GAP, _CELL_GAP:-_CELL_GAP] for mosaic in mosaics]  # without the outer margin
        axes.imshow(_stack(torch.stack(inner)), cmap=COLOURS, vmin=low, vmax=high, interpolation="nearest")
        axes.set_title(f"{name}\nfirst {min(9, channels)} of {channels} channels, {height}×{width}", **_HEADING)
        _add_colour_bar(axes, "activation (brightest 2 % cut)")
    return figure


def draw_heat_maps(images: CaptionedImages, features: FeatureMaps, title: str) -> Figure:
    """The three channels of the last convolution with the highest mean, over each image; they differ by image."""
    last = features.last.float()
    _check_map("the last convolution's output", last)
    means, channels = last.mean((2, 3)).topk(min(3, last.shape[1]))  # (B, 3)
    chosen = last.gather(1, channels[..., None, None].expand(-1, -1, *last.shape[2:]))  # (B, 3, h, w)
    scale = min(0.0, float(chosen.min())), float(chosen.max())
    figure, columns = _new_panels(images, means.shape[1], 3, title, between=60)
    for rank, axes in enumerate(columns):
        _draw_over(axes, images, chosen[:, rank], *scale)
        axes.set_title(f"{('most active', 'second', 'third')[rank]}\n{last.shape[2]}×{last.shape[3]}", **_HEADING)
        values = zip(channels[:, rank].tolist(), means[:, rank].tolist(), strict=True)
        _set_captions(axes, [f"channel\n{channel}\nmean\n{mean:.2f}" for channel, mean in values], _SIDE)
    _add_colour_bar(columns[0], "activation", len(columns) + (len(columns) - 1) * 60 / _SIDE)
    return figure


def draw_attention(images: CaptionedImages, maps: Mapping[str, AttentionMaps], title: str) -> Figure:
    """The spatial gate of each block over the image, and its channel gate as sorted bars; one row per image."""
    panels = [(name, gate) for name, one in maps.items() for gate in (one.spatial, one.channel) if gate is not None]
    figure, columns = _new_panels(images, len(panels), 6, title)
    for axes, (name, gate) in zip(columns, panels, strict=True):
        if gate.ndim == 3:
            _draw_spatial_gate(axes, images, name, gate)
        else:
            _draw_channel_gate(axes, name, gate)
    return figure


def draw_grad_cam(
    images: CaptionedImages, cams: Tensor, maps: Mapping[str, AttentionMaps], title: str, layer: str | None = None
) -> Figure:
    """Grad-CAM of the predicted class (B, H, W) ≥ 0 over each image, and the spatial gates beside it.

    `layer` is the name of the module that it is of, where that was chosen.
    """
    _check_map("Grad-CAM", cams)
    spatial = {name: gates.spatial for name, gates in maps.items() if gates.spatial is not None}
    figure, columns = _new_panels(images, 1 + len(spatial), 7, title)
    # Relative to each image's maximum: logits of different images and classes have no common unit.
    _draw_over(columns[0], images, cams / cams.amax((1, 2), keepdim=True).clamp_min(1e-30), 0.0, 1.0)
    columns[0].set_title("Grad-CAM\n" + cut(f"of {layer}" if layer else "predicted class", 24), **_HEADING)
    _add_colour_bar(columns[0], "fraction of maximum")
    for axes, (name, gate) in zip(columns[1:], spatial.items(), strict=True):
        _draw_spatial_gate(axes, images, name, gate)
    return figure


def draw_confusion(counts: Tensor, classes: Sequence[str], title: str) -> Figure:
    """Counts (classes, classes) of images by true class (rows) and predicted class, coloured by the row's fraction."""
    few = len(classes) <= 20
    side = len(classes) * (42 if few else 13)  # pixels
    width, height = 130 + max(200, side) + 100, 80 + side + 130  # the names' space is on the left and below
    figure = _new_figure(width, height, title.split("\n"))
    axes = figure.add_axes((130 / width, 130 / height, side / width, side / height))
    fractions = (counts / counts.sum(1, keepdim=True).clamp_min(1)).cpu().numpy()
    axes.imshow(fractions, cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest")
    axes.tick_params(length=0, labelbottom=False, labelleft=False)  # two hundred ticks would take most of the time
    axes.set_xlabel("predicted class", fontsize=NORMAL, labelpad=80)  # points
    axes.set_ylabel("true class", fontsize=NORMAL, labelpad=80)
    style: dict[str, Any] = {"size": SMALL if few else 6, "parse_math": False}
    for index, name in enumerate(classes):
        axes.text(-0.7, index, cut(name, 16), ha="right", va="center", **style)
        axes.text(index, len(classes) - 0.3, cut(name, 16), ha="center", va="top", rotation=90, **style)
    if few:
        for (true, predicted), fraction in np.ndenumerate(fractions):
            colour = "black" if fraction > 0.45 else "white"
            axes.text(predicted, true, f"{counts[true, predicted]}", ha="center", va="center", color=colour, **style)
    place = axes.inset_axes((1 + 20 / side, 0.1, 12 / side, 0.8))
    figure.colorbar(axes.images[0], cax=place).set_label("fraction of the true class", fontsize=NORMAL)
    place.tick_params(labelsize=SMALL)
    return figure


def draw_reliability(before: Reliability, after: Reliability | None, title: str) -> Figure:
    """Accuracy by confidence over the number of images; after calibration, where that was done, as a line.

    Bins with fewer images than _MIN_IMAGES are pale, and are left out of the line: their accuracy is chance.
    """
    lines = title.split("\n")
    height = 580 + 16 * len(lines)
    figure = _new_figure(560, height, lines)
    place = {"top": 1 - (60 + 16 * len(lines)) / height, "bottom": 0.09, "left": 0.12, "right": 0.96}
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1), **place})
    middles = (np.arange(len(before)) + 0.5) / len(before)
    counts, accuracy = (np.array([row[key] for row in before]) for key in ("images", "accuracy"))
    width, enough = 0.94 / len(before), counts >= _MIN_IMAGES
    upper.plot([0, 1], [0, 1], color="0.3", linestyle="--", linewidth=1, label="calibrated perfectly")
    upper.bar(middles[enough], accuracy[enough], width, color=COLOURS(0.35), label="measured")
    few = (counts > 0) & ~enough
    if few.any():
        label = f"fewer than {_MIN_IMAGES} images"
        upper.bar(middles[few], accuracy[few], width, color=COLOURS(0.35), alpha=0.3, label=label)
    if after is not None:
        points = [(row["confidence"], row["accuracy"]) for row in after if row["images"] >= _MIN_IMAGES]
        upper.plot(
            *np.reshape(points, (-1, 2)).T, "s-", color="#d55e00", markersize=4, linewidth=1.2, label="with temperature"
        )
    upper.set_ylabel("accuracy", fontsize=NORMAL)
    upper.set_ylim(0, 1.02)
    upper.legend(fontsize=SMALL, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    lower.bar(middles, counts, width, color="0.6")
    lower.set_ylabel("images", fontsize=NORMAL)
    lower.set_xlabel("confidence: probability of the predicted class", fontsize=NORMAL)
    lower.set_xlim(0, 1)
    for axes in (upper, lower):
        axes.tick_params(labelsize=SMALL)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def gate_scale(gate: Tensor) -> tuple[float, float]:
    """Ends of the colour scale of a spatial gate of several images (B, H, W): its range, but not less than 0.05."""
    low, high = float(gate.min()), float(gate.max())
    if high - low < _MIN_SPAN:
        low = min(max(min(0.0, low), (low + high - _MIN_SPAN) / 2), max(1.0, high) - _MIN_SPAN)
        high = low + _MIN_SPAN
    return low, high


def cut(text: str, length: int) -> str:
    """Cut a text that is too long, with an ellipsis; bytes of a file name that are not UTF-8 are shown as numbers."""
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= length else text[: length - 1] + "…"


def rasterise(figure: Figure) -> np.ndarray:
    """A figure as an image (H, W, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _new_panels(
    images: CaptionedImages, count: int, per_row: int, title: str, side: int = _SIDE, between: int = 30
) -> tuple[Figure, list[Axes]]:
    """A figure with the images in its left column and `count` columns beside it, in as many rows as these need."""
    # One pair of axes holds a column of panels, one per image, and has as many pixels as its arrays: a pair for each
    # panel, or a layout engine, takes several times as long, and draws the pixels of an image in unequal sizes.
    rows = -(-count // per_row)
    per_row = -(-count // rows)
    column = len(images.pixels) * (side + _GAP)
    left, right, above, below = 160, 40, 40, 40  # captions are on the left, a heading above, a colour bar below
    width = left + (1 + per_row) * (side + between) - between + right
    lines = [part for line in title.split("\n") for part in wrap(line, width // 8)]  # a letter takes about 7 pixels
    top = 20 + 16 * len(lines)
    height = top + rows * (above + column + below)
    figure = _new_figure(width, height, lines)
    place = {"left": left / width, "right": 1 - right / width, "wspace": between / side}
    place |= {"bottom": below / height, "top": 1 - (top + above) / height, "hspace": (above + below) / column}
    grid = figure.subplots(rows, 1 + per_row, squeeze=False, gridspec_kw=place)
    for axes in grid.flat:
        axes.set_axis_off()
    pixels = F.interpolate(images.pixels.cpu(), size=(side, side), mode="nearest-exact")
    colours = np.stack([_stack(channel, fill=255) for channel in pixels.unbind(1)], -1)
    for axes in grid[:, 0]:
        axes.imshow(colours, interpolation="nearest")
        _set_captions(axes, images.captions, side)
    return figure, list(grid[:, 1:].flat)[:count]


def _new_figure(width: float, height: float, title: Sequence[str]) -> Figure:
    figure = Figure((width / DPI, height / DPI), dpi=DPI)
    place = {"x": 10 / width, "y": 1 - 10 / height, "ha": "left", "va": "top"}
    figure.suptitle("\n".join(title), fontsize=NORMAL + 1, parse_math=False, **place)
    return figure


def _stack(panels: Tensor, fill: float = torch.nan) -> np.ndarray:
    """Panels (B, H, W) as one column (B · (H + gap), W); NaN is drawn transparent."""
    return F.pad(panels, (0, 0, 0, _GAP), value=fill).flatten(0, 1).cpu().numpy()


def _draw_over(axes: Axes, images: CaptionedImages, maps: Tensor, low: float, high: float) -> None:
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    brightness = (images.pixels.cpu() / 255 * weights).sum(1, keepdim=True)
    grey = F.interpolate(brightness, size=(_SIDE, _SIDE), mode="nearest-exact")[:, 0]
    # From 0.2 to 0.8 only, or dark parts of the image would look like low values of the map.
    axes.imshow(_stack(grey), cmap="gray", vmin=-1 / 3, vmax=4 / 3, interpolation="nearest")
    values = _stack(upsample(maps.float(), (_SIDE, _SIDE)))
    axes.imshow(values, cmap=COLOURS, vmin=low, vmax=high, alpha=OPACITY, interpolation="nearest")


def _draw_spatial_gate(axes: Axes, images: CaptionedImages, name: str, gate: Tensor) -> None:
    check_finite(f"the spatial gate of {name}", gate)
    _draw_over(axes, images, gate, *gate_scale(gate))
    flat = f", {float(gate.mean()):.3f} everywhere" if _is_flat(gate) else ""
    axes.set_title(f"{name}\n{gate.shape[1]}×{gate.shape[2]}{flat}", **_HEADING)
    _add_colour_bar(axes, "spatial gate")


def _draw_channel_gate(axes: Axes, name: str, gate: Tensor) -> None:
    """Draw gates (B, C) as bars, highest first, at the heights of the images."""
    check_finite(f"the channel gate of {name}", gate)
    ordered = gate.sort(1, descending=True).values.cpu()
    top_value = max(1.0, float(ordered.max()))  # a network's own gate may exceed 1
    heights = F.interpolate(ordered[:, None] / top_value, size=_SIDE, mode="nearest-exact")  # (B, 1, side)
    levels = (torch.arange(_SIDE, 0, -1) - 0.5)[:, None] / _SIDE  # (side, 1)
    bars = torch.where(levels < heights, 0.35, torch.nan)  # (B, side, side)
    axes.imshow(_stack(bars), cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest")
    tops = np.arange(len(gate)) * (_SIDE + _GAP)
    axes.autoscale(False)
    axes.hlines([*tops, *(tops + _SIDE / 2), *(tops + _SIDE)], 0, _SIDE, color="0.6", linewidth=0.6)
    for top in tops.tolist():
        axes.text(-4, top, f"{top_value:.3g}", size=SMALL, ha="right", va="center")
        axes.text(-4, top + _SIDE, "0", size=SMALL, ha="right", va="center")
    flat = f"all {float(gate.mean()):.3f}" if _is_flat(gate) else "sorted"
    axes.set_title(f"{name}\n{gate.shape[1]} channels, {flat}", **_HEADING)


def _set_captions(axes: Axes, captions: Sequence[str], side: int) -> None:
    for index, caption in enumerate(captions):
        text = "\n".join(cut(line, 24) for line in caption.split("\n"))
        place = -6, index * (side + _GAP) + side / 2
        axes.text(*place, text, size=SMALL, ha="right", va="center", parse_math=False)


def _add_colour_bar(axes: Axes, label: str, width: float = 1.0) -> None:
    """Add the colour scale of the last image below it, `width` times as wide, with numbers at its ends and middle."""
    image = axes.images[-1]
    low, high = image.get_clim()
    digits = 2 if 0.05 <= high - low < 10 else 1 if high - low >= 10 else 3
    place = axes.inset_axes((0, 0, width, 8 / axes.get_ylim()[0]))  # 8 pixels high, in the gap below the last panel
    place.set_facecolor("0.5")  # where the map is drawn over an image, its colours over medium grey
    ticks = [low, (low + high) / 2, high]
    bar = axes.figure.colorbar(image, cax=place, orientation="horizontal", ticks=ticks, format=f"%.{digits}f")
    place.spines[:].set_visible(False)
    bar.set_label(label, fontsize=SMALL)
    place.tick_params(labelsize=SMALL, length=0, pad=2)
    for text, align in zip(place.get_xticklabels(), ("left", "center", "right"), strict=True):
        text.set(ha=align)


def check_finite(what: str, values: Tensor) -> None:
    """Raise a ValueError that begins with `what` where a value is NaN or infinite."""
    if not values.isfinite().all():
        raise ValueError(f"{what} holds NaN or infinity: the network has diverged; choose an earlier checkpoint")


def _is_flat(values: Tensor) -> bool:
    return float(values.max() - values.min()) < 1e-6


def _check_map(what: str, values: Tensor) -> None:
    check_finite(what, values)
    if _is_flat(values):
        raise ValueError(
            f"{what} is {float(values.mean()):.3f} everywhere in every image, a map that shows nothing; "
            "choose other images, or a checkpoint that was trained longer"
        )
