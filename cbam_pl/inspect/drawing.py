"""Pictures of what a network sees: feature maps, heat maps, attention, Grad-CAM, confusion and curves.

    maps = attention_maps(network, images)

Each `draw_…` gives a matplotlib Figure. A map that is not finite, or the same everywhere in every image, is an error:
a picture of it would look like a finding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from cbam_pl.inspect.gates import AttentionMaps, FeatureMaps, attention_maps, upsample
from cbam_pl.inspect.page import COLOURS, DPI, LINE, NORMAL, SMALL, Page, blend

__all__ = [
    "Pictured",
    "attention_maps",
    "describe",
    "draw_attention",
    "draw_confusion",
    "draw_features",
    "draw_grad_cam",
    "draw_heat_maps",
]

_PANEL = 1.28  # inches; 128 pixels, four times those of a CIFAR image
_GAP = 0.14
_MARGIN = 0.2
_TITLE = 0.68
_HEADER = 0.36  # two lines over a column
_CAPTION = 4 * LINE + 0.1  # four lines below an image, or a colour bar below the last
_CELL, _CELL_GAP = 64, 4  # pixels of one feature map and between two
_MOSAIC = (3 * _CELL + 2 * _CELL_GAP) / DPI  # inches
# A gate that hardly varies is shown in hardly varying colours, not stretched until it looks alive.
_LEAST_SPAN = 0.05
_DIVERGED = "holds NaN or infinity: the network has diverged; choose an earlier checkpoint"


@dataclass(frozen=True)
class Pictured:
    """The images of a picture.

    Args:
        pixels: (B, 3, H, W) uint8.
        captions: of each image, up to four lines.
    """

    pixels: Tensor
    captions: Sequence[str]

    def colours(self, index: int) -> np.ndarray:
        """One image (H, W, 3) in [0, 1]."""
        return self.pixels[index].permute(1, 2, 0).cpu().numpy() / 255

    def grey(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """One image's brightness (H, W) in [0, 1], enlarged to `size`, its pixels as squares."""
        weights = torch.tensor([0.299, 0.587, 0.114], device=self.pixels.device).view(3, 1, 1)
        brightness = (self.pixels[index] / 255 * weights).sum(0)  # (H, W)
        return F.interpolate(brightness[None, None], size=size, mode="nearest-exact")[0, 0].cpu().numpy()


def describe(
    logits: Tensor, classes: Sequence[str], true: Sequence[str] | None = None, headings: Sequence[str] | None = None
) -> list[str]:
    """Captions with the predicted class and its probability, below the true class and a heading where known.

    Args:
        logits: (B, classes).
        classes: names of the classes.
        true: names of the images' true classes.
        headings: of each image, such as its index or file name.
    """
    captions = []
    for index, probabilities in enumerate(logits.float().softmax(1).cpu()):
        lines = [] if headings is None else [headings[index]]
        lines += [] if true is None else [f"true: {true[index]}"]
        probability, label = probabilities.max(0)
        lines += [f"predicted: {classes[int(label)]}", f"probability {100 * float(probability):.0f} %"]
        captions.append("\n".join(lines))
    return captions


def draw_features(pictured: Pictured, features: FeatureMaps, title: str) -> Figure:
    """Each image and the first nine channels of each convolution block, one row an image, layer by layer.

    Raises:
        ValueError: a block's output is not finite, or the same everywhere.
    """
    for name, output in features.blocks.items():
        _refuse_blank(f"the output of {name}", output)
    names = list(features.blocks)
    bands = _bands(names, 4)
    columns = 1 + max(map(len, bands))
    row, count = _MOSAIC + _CAPTION, len(pictured.pixels)
    band_height = _HEADER + count * row + _MARGIN
    page = Page(2 * _MARGIN + columns * (_MOSAIC + _GAP) - _GAP, _TITLE + len(bands) * band_height)
    page.title(_MARGIN, title)
    for band, blocks in enumerate(bands):
        top = _TITLE + band * band_height
        for column, name in enumerate(blocks, start=1):
            output = features.blocks[name].float()
            channels, height, width = output.shape[1:]
            # The brightest are cut, or a few places would leave all others dark.
            low, high = min(0.0, float(output.min())), _quantile(output[:, :9], 0.98)
            high = high if high > low else float(output.max())
            x = _MARGIN + column * (_MOSAIC + _GAP)
            shown = f"first 9 of {channels}" if channels > 9 else f"{channels}"
            page.text(x, top, f"{name}\n{shown} channels, {height}×{width}", NORMAL)
            for index in range(count):
                mosaic = _mosaic(((output[index, :9] - low) / (high - low)).clamp(0, 1))
                page.image(x, top + _HEADER + index * row, _MOSAIC, _MOSAIC, mosaic)
            below = top + _HEADER + count * row - _CAPTION + 0.1
            page.colour_bar(x, below, _MOSAIC, low, high, "activation (brightest 2 % cut)", overlay=False)
        _draw_images(page, pictured, top + _HEADER, row, _MOSAIC)
    return page.figure


def draw_heat_maps(pictured: Pictured, features: FeatureMaps, title: str) -> Figure:
    """The three most active channels of the last convolution over each image: its own three, by their mean.

    Raises:
        ValueError: the activations are not finite, or the same everywhere.
    """
    last = features.last.float()
    _refuse_blank("the last convolution's output", last)
    means, channels = last.mean((2, 3)).topk(min(3, last.shape[1]))  # (B, 3)
    chosen = last.gather(1, channels[..., None, None].expand(-1, -1, *last.shape[2:]))  # (B, 3, h, w)
    count, columns = means.shape
    high = float(chosen.max())
    low = min(0.0, float(chosen.min()))
    row = _PANEL + _CAPTION
    width = 2 * _MARGIN + (1 + columns) * (_PANEL + _GAP) - _GAP
    page = Page(max(width, 5.9), _TITLE + _HEADER + count * row + 0.6)
    page.title(_MARGIN, title)
    for rank in range(columns):
        x = _MARGIN + (1 + rank) * (_PANEL + _GAP)
        page.text(x, _TITLE, ("most active", "second", "third")[rank] + f"\n{last.shape[2]}×{last.shape[3]}", NORMAL)
        for index in range(count):
            y = _TITLE + _HEADER + index * row
            _draw_over(page, x, y, pictured, index, (chosen[index, rank] - low) / (high - low))
            caption = f"channel {int(channels[index, rank])}\nmean {float(means[index, rank]):.2f}"
            page.text(x, y + _PANEL + 0.04, caption, SMALL)
    _draw_images(page, pictured, _TITLE + _HEADER, row, _PANEL)
    below = _TITLE + _HEADER + count * row + 0.05
    x = _MARGIN + _PANEL + _GAP
    page.colour_bar(x, below, columns * (_PANEL + _GAP) - _GAP, low, high, "activation", overlay=True)
    return page.figure


def draw_attention(pictured: Pictured, maps: Mapping[str, AttentionMaps], title: str) -> Figure:
    """Per block the spatial gate over the image, and the channel gate as sorted bars; one row an image.

    Raises:
        ValueError: there are no gates, or one is not finite, or a spatial gate is the same everywhere in all images.
    """
    if not maps:
        raise ValueError("this network has no gates: its attention is none")
    _refuse_bad_gates(maps)
    panels = max((gates.spatial is not None) + (gates.channel is not None) for gates in maps.values())
    bands = _bands(list(maps), 3 if panels == 2 else 6)
    row, count = _PANEL + _CAPTION, len(pictured.pixels)
    band_height = _HEADER + count * row + _MARGIN
    block_width = panels * (_PANEL + _GAP) + 2 * _GAP
    width = 2 * _MARGIN + _PANEL + _GAP + max(map(len, bands)) * block_width
    page = Page(max(width, 5.9), _TITLE + len(bands) * band_height)
    page.title(_MARGIN, title)
    for band, blocks in enumerate(bands):
        top = _TITLE + band * band_height
        below = top + _HEADER + count * row - _CAPTION + 0.1
        for column, name in enumerate(blocks):
            gates = maps[name]
            x = _MARGIN + _PANEL + 2 * _GAP + column * block_width
            page.text(x, top, f"{name}\n{_sizes(gates)}", NORMAL)
            if gates.spatial is not None:
                low, high = _gate_scale(gates.spatial)
                for index in range(count):
                    shares = (gates.spatial[index] - low) / (high - low)
                    _draw_over(page, x, top + _HEADER + index * row, pictured, index, shares)
                page.colour_bar(x, below, _PANEL, low, high, "spatial gate", overlay=True)
                x += _PANEL + 2 * _GAP
            if gates.channel is not None:
                ordered = gates.channel.sort(1, descending=True).values.cpu().numpy()  # (B, C)
                for index in range(count):
                    y = top + _HEADER + index * row
                    page.bars(x, y, _PANEL, _PANEL, ordered[index])
                    for level, label in ((0.0, "1"), (0.5, "½"), (1.0, "0")):
                        page.text(x - 0.04, y + level * _PANEL - 0.06, label, SMALL, "right")
                page.text(x, below, "channel gate,\nhighest first", SMALL)
        _draw_images(page, pictured, top + _HEADER, row, _PANEL)
    return page.figure


def draw_grad_cam(pictured: Pictured, cams: Tensor, maps: Mapping[str, AttentionMaps], title: str) -> Figure:
    """Grad-CAM of the predicted class over each image, and beside it the spatial gates.

    Args:
        pictured: the images.
        cams: (B, H, W) ≥ 0.
        maps: the gates; those without a spatial gate are left out.
        title: over the picture.

    Raises:
        ValueError: a map is not finite, or the same everywhere in all images.
    """
    _refuse_blank("Grad-CAM", cams)
    _refuse_bad_gates(maps)
    spatial = {name: gates.spatial for name, gates in maps.items() if gates.spatial is not None}
    bands = _bands(list(spatial), 6) or [[]]
    row, count = _PANEL + _CAPTION, len(pictured.pixels)
    band_height = _HEADER + count * row + _MARGIN
    width = 2 * _MARGIN + (2 + max(map(len, bands))) * (_PANEL + _GAP) - _GAP
    page = Page(max(width, 5.9), _TITLE + len(bands) * band_height)
    page.title(_MARGIN, title)
    # Each image's own largest is 1: logits of different images and classes have no common unit.
    largest = cams.amax((1, 2), keepdim=True)
    shares = torch.where(largest > 0, cams / largest.clamp_min(1e-30), 0.0)
    for band, blocks in enumerate(bands):
        top = _TITLE + band * band_height
        below = top + _HEADER + count * row - _CAPTION + 0.1
        x = _MARGIN + _PANEL + _GAP
        page.text(x, top, "Grad-CAM\nof the predicted class", NORMAL)
        for index in range(count):
            _draw_over(page, x, top + _HEADER + index * row, pictured, index, shares[index])
        page.colour_bar(x, below, _PANEL, 0.0, 1.0, "share of image's max.", overlay=True)
        for column, name in enumerate(blocks):
            x = _MARGIN + (2 + column) * (_PANEL + _GAP)
            low, high = _gate_scale(spatial[name])
            height, width = spatial[name].shape[1:]
            page.text(x, top, f"{name}\nspatial gate, {height}×{width}", NORMAL)
            for index in range(count):
                values = (spatial[name][index] - low) / (high - low)
                _draw_over(page, x, top + _HEADER + index * row, pictured, index, values)
            page.colour_bar(x, below, _PANEL, low, high, "spatial gate", overlay=True)
        _draw_images(page, pictured, top + _HEADER, row, _PANEL)
    return page.figure


def draw_confusion(counts: Tensor, classes: Sequence[str], title: str) -> Figure:
    """How many images of each true class (rows) were taken for each class (columns), coloured by the row's share.

    Args:
        counts: (classes, classes) int64.
        classes: names.
        title: over the picture.
    """
    few = len(classes) <= 20
    cell, size = (0.42, SMALL) if few else (0.13, 6.0)
    names = [_shorten(name) for name in classes]
    label = 0.1 + 0.075 * max(map(len, names)) * (size / SMALL)
    side = cell * len(classes)
    page = Page(max(4.5, 2 * _MARGIN + label + side + 0.2), _TITLE + 0.1 + side + label + 0.8)
    page.title(_MARGIN, title)
    shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).cpu().numpy()
    left, top = _MARGIN + label, _TITLE + 0.1
    page.image(left, top, side, side, COLOURS(shares)[..., :3])
    place: dict[str, Any] = {"size": size, "parse_math": False}
    for index, name in enumerate(names):
        middle = (index + 0.5) * cell
        page.axes.text(left - 0.06, top + middle, name, ha="right", va="center", **place)
        page.axes.text(left + middle, top + side + 0.06, name, ha="center", va="top", rotation=90, **place)
    if few:
        for (true, predicted), share in np.ndenumerate(shares):
            colour = "black" if share > 0.6 else "white"
            x, y = left + (predicted + 0.5) * cell, top + (true + 0.5) * cell
            page.axes.text(x, y, str(int(counts[true, predicted])), ha="center", va="center", color=colour, **place)
    below = top + side + label + 0.1
    page.colour_bar(left, below, max(side, 1.5), 0, 1, "rows: true class, columns: predicted; share of row", False)
    return page.figure


def _draw_images(page: Page, pictured: Pictured, top: float, row: float, side: float) -> None:
    for index, caption in enumerate(pictured.captions):
        y = top + index * row
        page.image(_MARGIN, y, side, side, pictured.colours(index))
        lines = [_shorten(line, 24) for line in caption.split("\n")]
        page.text(_MARGIN, y + side + 0.04, "\n".join(lines), SMALL)


def _draw_over(page: Page, x: float, y: float, pictured: Pictured, index: int, shares: Tensor) -> None:
    """Draw one map (h, w), in [0, 1], over its image."""
    side = round(_PANEL * DPI)
    values = upsample(shares[None].float(), (side, side))[0].clamp(0, 1).cpu().numpy()
    page.image(x, y, _PANEL, _PANEL, blend(pictured.grey(index, (side, side)), values))


def _mosaic(maps: Tensor) -> np.ndarray:
    """Up to nine maps (C, h, w) in [0, 1] as squares in three rows (H, W, 3), white between."""
    step = _CELL + _CELL_GAP
    canvas = np.ones((3 * step - _CELL_GAP, 3 * step - _CELL_GAP, 3))
    enlarged = F.interpolate(maps[None], size=(_CELL, _CELL), mode="nearest-exact")[0].cpu().numpy()
    for number, values in enumerate(enlarged):
        y, x = number // 3 * step, number % 3 * step
        canvas[y : y + _CELL, x : x + _CELL] = COLOURS(values)[..., :3]
    return canvas


def _bands(names: list[str], per_band: int) -> list[list[str]]:
    """Names in groups that stand one above the other, about equally many in each."""
    count = -(-len(names) // per_band)
    return [part.tolist() for part in np.array_split(np.array(names, dtype=object), count)] if count else []


def _sizes(gates: AttentionMaps) -> str:
    parts = [] if gates.spatial is None else ["×".join(map(str, gates.spatial.shape[1:]))]
    parts += [] if gates.channel is None else [f"{gates.channel.shape[1]} channels"]
    return ", ".join(parts)


def _gate_scale(gate: Tensor) -> tuple[float, float]:
    """The scale of a block's gates in all images, not narrower than the least span."""
    low, high = float(gate.min()), float(gate.max())
    if high - low < _LEAST_SPAN:
        middle = (low + high) / 2
        low = min(max(0.0, middle - _LEAST_SPAN / 2), 1 - _LEAST_SPAN)
        high = low + _LEAST_SPAN
    return low, high


def _quantile(values: Tensor, share: float) -> float:
    # Not torch.quantile, which takes no more than 16 million values.
    flat = values.flatten()
    return float(flat.kthvalue(max(1, round(share * flat.numel()))).values)


def _shorten(text: str, length: int = 16) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _refuse_bad_gates(maps: Mapping[str, AttentionMaps]) -> None:
    for name, gates in maps.items():
        if gates.channel is not None and not gates.channel.isfinite().all():
            raise ValueError(f"the channel gate of {name} {_DIVERGED}")
        if gates.spatial is not None:
            _refuse_blank(f"the spatial gate of {name}", gates.spatial)


def _refuse_blank(what: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{what} {_DIVERGED}")
    if float(values.max() - values.min()) < 1e-6:
        raise ValueError(
            f"{what} is {float(values.mean()):.3f} everywhere in every image, a map that shows nothing; "
            "choose other images, or a checkpoint that was trained longer"
        )
