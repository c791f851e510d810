"""A page to draw pictures on, in inches from its left upper corner. Nothing here knows of networks."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# matplotlib's own axes, one for each small image, would take most of the drawing time, and leave their places to
# chance. Here all of a page is one pair of axes, and whoever draws says where.

DPI = 100  # pixels per inch of PNG files and TensorBoard's images
SMALL, NORMAL, LARGE = 7.5, 8.5, 11.0  # points
LINE = 0.15  # inches from one line of text to the next
COLOURS = colormaps["viridis"]  # readable with every kind of colour blindness, and in grey
_OVERLAY = 0.65  # weight of the colours where they lie over an image


class Page:
    """An empty page.

    Args:
        width: inches.
        height: inches.
    """

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure((width, height), dpi=DPI)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)

    def image(self, x: float, y: float, width: float, height: float, colours: np.ndarray) -> None:
        """Draw an image (H, W, 3) in [0, 1], its pixels as squares."""
        # Enlarged by whole factors where possible, so that pixels stay equally large.
        self.axes.imshow(colours, extent=(x, x + width, y + height, y), interpolation="nearest", aspect="auto")

    def text(self, x: float, y: float, text: str, size: float = NORMAL, align: str = "left") -> None:
        """Write a line, or several, whose top is at y. A dollar sign is no formula here."""
        self.axes.text(x, y, text, size=size, ha=align, va="top", parse_math=False, linespacing=1.15)

    def title(self, margin: float, text: str) -> None:
        """Write a large line and smaller ones below it, each cut where it would leave the page."""
        y = margin
        width = float(self.figure.get_figwidth()) - 2 * margin
        for number, line in enumerate(text.split("\n")):
            size = NORMAL if number else LARGE
            room = int(width / (0.6 * size / 72))  # a letter is about 0.6 of its size wide, and a point 1/72 inch
            self.text(margin, y, line if len(line) <= room else line[: room - 1] + "…", size)
            y += LINE if number else 0.2

    def bars(self, x: float, y: float, width: float, height: float, values: np.ndarray) -> None:
        """Draw values (N,) in [0, 1] as bars without gaps, over a frame with a line at a half."""
        edges = np.repeat(np.linspace(x, x + width, len(values) + 1), 2)
        tops = y + height * (1 - values)
        outline = np.concatenate([[y + height], np.repeat(tops, 2), [y + height]])
        self.axes.fill(edges, outline, color=COLOURS(0.35), linewidth=0)
        for share in (0.0, 0.5, 1.0):
            level = y + height * (1 - share)
            self.axes.plot([x, x + width], [level, level], color="0.6", linewidth=0.6, zorder=3)

    def colour_bar(self, x: float, y: float, width: float, low: float, high: float, label: str, overlay: bool) -> None:
        """Draw the scale of a column, with its ends and middle in numbers; 0.5 inches high.

        Args:
            x: left end.
            y: upper edge.
            width: length.
            low: the value of the darkest colour.
            high: the value of the brightest.
            label: what is measured.
            overlay: whether the colours lie over images; then they are shown as they look over medium grey.
        """
        ramp = np.linspace(0, 1, 128)[None]  # (1, 128)
        grey = np.full((1, 128), 0.5)
        self.image(x, y, width, 0.1, blend(grey, ramp) if overlay else COLOURS(ramp)[..., :3])
        digits = 2 if 0.05 <= high - low < 10 else 1 if high - low >= 10 else 3
        for share, align in ((0, "left"), (0.5, "center"), (1, "right")):
            value = low + share * (high - low)
            self.text(x + share * width, y + 0.13, f"{value:.{digits}f}", SMALL, align)
        self.text(x + width / 2, y + 0.13 + LINE, label, SMALL, "center")


def blend(grey: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Colours of values (H, W) in [0, 1] over an image grey (H, W) in [0, 1] → (H, W, 3)."""
    # With little contrast, or dark parts of the image would look like low values.
    grey = 0.2 + 0.6 * grey
    return (1 - _OVERLAY) * grey[..., None] + _OVERLAY * COLOURS(values)[..., :3]


def rasterise(figure: Figure) -> np.ndarray:
    """A figure as an image (H, W, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the path's suffix is the format: .png, .svg or .pdf."""
    figure.savefig(path, dpi=DPI)
