"""What several corruptions are made of: random numbers by image, linear blurs, noise fields, OpenCV's edges.

Images are (B, C, 32, 32) float32 in [0, 1] on the CPU, fields (B, 32, 32). Constants are in pixels of 32 × 32 images.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

SIZE = 32  # height and width of the images, which CIFAR-10-C's constants are made for


class Draws:
    """Random numbers for each image of a batch: a function of `key` and the image's index, whatever its batch is.

    Args:
        key: what the numbers are for, from 0 to 2⁶³ − 1.
        indices: number of each image (B,), from 0.
    """

    def __init__(self, key: int, indices: Sequence[int]) -> None:
        # Philox gives independent streams for different keys.
        self._generators = [np.random.Generator(np.random.Philox(key=[key, index])) for index in indices]

    def __len__(self) -> int:
        """The number of images."""
        return len(self._generators)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (B, *shape) float32."""
        numbers = np.empty((len(self._generators), *shape), np.float32)
        for generator, own in zip(self._generators, numbers, strict=True):
            generator.standard_normal(out=own, dtype=np.float32)
        return torch.from_numpy(numbers)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape) float32; without a shape (B,)."""
        numbers = np.empty((len(self._generators), *(shape or (1,))), np.float32)
        for generator, own in zip(self._generators, numbers, strict=True):
            generator.random(out=own, dtype=np.float32)
        return torch.from_numpy(numbers if shape else numbers[:, 0])

    def poisson(self, rates: Tensor) -> Tensor:
        """Poisson numbers with the given rates (B, …) ≥ 0, as float32."""
        pairs = zip(self._generators, rates.numpy(), strict=True)
        return torch.from_numpy(np.stack([generator.poisson(own) for generator, own in pairs])).float()


def round_down(images: Tensor) -> Tensor:
    """Images in [0, 1] → whole numbers from 0 to 255, as float32.

    make_cifar_c.py rounds down, in float64. Without the small number float32 would round whole numbers down, too.
    """
    return images.clamp(0, 1).mul_(255).add_(1e-4).floor_()


# Linear maps. Each is a matrix that SciPy's own filter makes of the identity, so that a batch is a matrix product.


@cache
def gaussian_matrix(sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Tensor:
    """A Gaussian filter of a line of pixels, (32, 32), with SciPy's border `mode`, cut at `truncate` sigmas."""
    lines = ndimage.gaussian_filter1d(np.eye(SIZE), sigma, axis=0, mode=mode, truncate=truncate)
    return torch.from_numpy(lines).float()


def smooth(images: Tensor, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Tensor:
    """Gaussian filter of (…, 32, 32) along rows and columns, as skimage.filters.gaussian."""
    matrix = gaussian_matrix(sigma, mode, truncate)
    return matrix @ images @ matrix.T


@cache
def zoom_matrix(factor: float) -> Tensor:
    """Enlarge the middle of a line of pixels to its whole length, linearly, (32, 32) float64."""
    count = math.ceil(SIZE / factor)
    top = (SIZE - count) // 2
    lines = ndimage.zoom(np.eye(SIZE)[top : top + count], (factor, 1), order=1)
    margin = (len(lines) - SIZE) // 2
    return torch.from_numpy(lines[margin : margin + SIZE].copy())


@cache
def zoom_blur_matrix(largest: float) -> Tensor:
    """The mean of an image and of its zooms by 1, 1.01, … below `largest`, on flattened pixels, (1024, 1024)."""
    factors = np.arange(1, largest, 0.01).tolist()  # rounding lets the first one end at 1.06, the others below
    total = torch.eye(SIZE * SIZE, dtype=torch.float64)
    for factor in factors:
        total += torch.kron(zoom_matrix(factor), zoom_matrix(factor))
    return (total / (len(factors) + 1)).float()


@cache
def disk_kernel(radius: float, alias_sigma: float) -> Tensor:
    """A disk, smoothed by OpenCV's Gaussian of 3 × 3 pixels; (5, 5), for radii below 2."""
    offsets = torch.arange(-2, 3, dtype=torch.float64)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).double()
    line = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).square().div(-2 * alias_sigma**2).exp()
    line /= line.sum()
    return filter_2d((disk / disk.sum())[None, None], torch.outer(line, line), "constant")[0, 0].float()


def filter_2d(images: Tensor, kernel: Tensor, border: str = "reflect") -> Tensor:
    """Correlate (B, C, H, W) with one kernel (K, K); by default with OpenCV's border, mirrored at pixel centres."""
    reach = len(kernel) // 2
    height, width = images.shape[2:]
    padded = F.pad(images, (reach,) * 4, border)
    total = torch.zeros_like(images)
    # A convolution with one channel in and out is slower than its sum of shifted images.
    for row, column in kernel.nonzero().tolist():
        total.add_(padded[:, :, row : row + height, column : column + width], alpha=float(kernel[row, column]))
    return total


def motion_blur(images: Tensor, degrees: Tensor, radius: int, sigma: float) -> Tensor:
    """Blur each image in its own direction, by one half of a Gaussian, rounded to whole 1/255.

    Source: MotionBlurImage of ImageMagick's MagickCore/effect.c: 2 · radius + 1 nearest pixels on a ray, borders
    repeated. Degrees are (B,).
    """
    steps = torch.arange(2 * radius + 1, dtype=torch.float64)
    weights = (-(steps**2) / (2 * sigma**2)).exp()
    weights /= weights.sum()
    radians = torch.deg2rad(degrees.double())[:, None]
    right, down = ((steps * turn - 0.5).ceil().long() for turn in (radians.cos(), radians.sin()))  # (B, K) each
    place = torch.arange(SIZE)
    rows = (place + down[..., None]).clamp(0, SIZE - 1)  # (B, K, 32)
    columns = (place + right[..., None]).clamp(0, SIZE - 1)
    sources = (rows[..., None] * SIZE + columns[:, :, None]).flatten(2)  # (B, K, 1024)
    flat = images.flatten(2)  # (B, C, 1024)
    total = torch.zeros_like(flat)
    for weight, source in zip(weights.tolist(), sources.unbind(1), strict=True):
        total.add_(flat.gather(2, source[:, None].expand_as(flat)), alpha=weight)
    return total.view_as(images).mul_(255).add_(0.5).floor_().div_(255)


def sample(images: Tensor, x: Tensor, y: Tensor, centred: bool) -> Tensor:
    """Read images at x, y (B, 32, 32) in pixels, bilinearly, outside of them mirrored.

    Mirrored at the centres of the border's pixels (`centred`; OpenCV's BORDER_REFLECT_101) or at their outer edges
    (SciPy's "reflect").
    """
    grid = torch.stack((x, y), 3)
    grid = grid * (2 / (SIZE - 1)) - 1 if centred else (grid * 2 + 1) / SIZE - 1
    return F.grid_sample(images, grid.float(), "bilinear", "reflection", align_corners=centred)


def plasma(draws: Draws, decay: float) -> Tensor:
    """A random cloud (B, 32, 32), from 0 to 1, whose details are `decay`² weaker each time that they are half as large.

    Source: the diamond-square algorithm on a torus, as make_cifar_c.py has it.
    """
    heights = torch.zeros(len(draws), 1, 1)
    step, amplitude = SIZE, 100.0**2  # make_cifar_c.py multiplies by its amplitude of 100 twice
    while step >= 2:
        count = SIZE // step
        centres, tops, lefts = (2 * draws.uniform(3, count, count) - 1).mul_(amplitude).unbind(1)  # (B, count, count)
        right, below = heights.roll(-1, 2), heights.roll(-1, 1)  # a square's other corners
        centres = centres + (heights + right + below + right.roll(-1, 1)) / 4
        tops = tops + (heights + right + centres + centres.roll(1, 1)) / 4  # in the middle of a square's upper side
        lefts = lefts + (heights + below + centres + centres.roll(1, 2)) / 4
        rows = torch.stack((heights, tops), 3), torch.stack((lefts, centres), 3)  # (B, count, count, 2) each
        heights = torch.stack([row.flatten(2) for row in rows], 2).flatten(1, 2)  # (B, 2 · count, 2 · count)
        step, amplitude = step // 2, amplitude / decay**2
    heights = heights - heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True)


# OpenCV's functions for whole numbers from 0 to 255, as (B, 32, 32) float32


def canny(grey: Tensor, low: int, high: int) -> Tensor:
    """Edges (B, 32, 32) bool of an image.

    Source: OpenCV's Canny with an aperture of 3 and the sum of absolute derivatives.
    """
    padded = F.pad(grey[:, None], (1,) * 4, "replicate")[:, 0].int()
    across, down = padded[:, :, 2:] - padded[:, :, :-2], padded[:, 2:] - padded[:, :-2]
    across = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    down = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    x, y = across.abs(), down.abs()
    strength = x + y
    around = F.pad(strength, (1,) * 4)

    def neighbour(row: int, column: int) -> Tensor:
        return around[:, 1 + row : 1 + row + SIZE, 1 + column : 1 + column + SIZE]

    def highest(row: int, column: int, last_may_equal: bool) -> Tensor:
        after = neighbour(row, column)
        return (strength > neighbour(-row, -column)) & (strength >= after if last_may_equal else strength > after)

    flat = round(math.tan(math.pi / 8) * 2**15)  # in units of 2⁻¹⁵, as OpenCV rounds it
    horizontal = (y << 15) < x * flat
    vertical = (y << 15) > x * flat + (x << 16)
    rising = (across < 0) != (down < 0)
    diagonal = torch.where(rising, highest(1, -1, False), highest(1, 1, False))
    maximum = torch.where(horizontal, highest(0, 1, True), torch.where(vertical, highest(1, 0, True), diagonal))
    candidates = maximum & (strength > low)
    edges = candidates & (strength > high)
    while True:  # weak edges that touch an edge
        grown = (F.max_pool2d(edges.float()[:, None], 3, 1, 1)[:, 0] > 0) & candidates
        if torch.equal(grown, edges):
            return edges
        edges = grown


def distance_to(edges: Tensor, largest: float) -> Tensor:
    """Distance in pixels from each pixel to the nearest edge, at most `largest`. Edges are (B, 32, 32) bool.

    Source: OpenCV's distanceTransform with DIST_L2 and a mask of 5: shortest paths of steps that cost 1, 1.4 or 2.1969.
    """
    costs = {(0, 1): 1.0, (1, 1): 1.4, (1, 2): 2.1969}
    moves = [(r, c) for r in range(-2, 3) for c in range(-2, 3) if (min(abs(r), abs(c)), max(abs(r), abs(c))) in costs]
    distance = torch.where(edges, 0.0, largest)
    while True:
        padded, before = F.pad(distance, (2,) * 4, value=largest), distance
        for row, column in moves:
            near, far = sorted((abs(row), abs(column)))
            shifted = padded[:, 2 + row : 2 + row + SIZE, 2 + column : 2 + column + SIZE]
            distance = torch.minimum(distance, shifted + costs[near, far])
        if torch.equal(distance, before):
            return distance


def equalise(grey: Tensor, levels: int) -> Tensor:
    """Spread the values of each image, whole numbers below `levels`, evenly from 0 to 255.

    Source: OpenCV's equalizeHist, which leaves an image of one value as it is.
    """
    values = grey.long().flatten(1)  # (B, 1024)
    counts = F.one_hot(values, levels).sum(1)  # (B, levels)
    up_to = counts.cumsum(1)
    lowest = up_to.gather(1, values.amin(1, keepdim=True))  # (B, 1): pixels of the lowest value
    scale = torch.div(torch.tensor(255.0), SIZE * SIZE - lowest)  # 255 / tensor would round twice
    scaled = ((up_to - lowest) * scale).round()
    mapped = scaled.gather(1, values)
    return torch.where(lowest == SIZE * SIZE, values.float(), mapped).view_as(grey)
