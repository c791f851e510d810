"""Ten classes of generated shapes with the mask of each object: images that need no download."""

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cbam_pl.data.images import Images, Source
from cbam_pl.process import one_thread

_CHUNK = 100  # images drawn at once: few enough for the processor's cache
_CIFAR_SIZE = 32  # all lengths below are pixels of an image of this size
_SAMPLES = 3  # per pixel and axis; odd, so that no pixel is covered by exactly half
_CONTRAST = 0.3  # least difference in brightness, from 0 to 1, between an object and its surroundings


def _star(u: Tensor, v: Tensor) -> Tensor:
    # half a point, repeated by folding the angle: from the tip at radius 1 to the notch at radius 0.42
    half = math.pi / 5
    angle = (torch.remainder(torch.atan2(v, u) + half, 2 * half) - half).abs()
    radius = torch.hypot(u, v)
    x, y = radius * angle.cos(), radius * angle.sin()
    notch_x, notch_y = 0.42 * math.cos(half), 0.42 * math.sin(half)
    return (1 - x) * notch_y - (1 - notch_x) * y > 0


# Whether the point (u, v) in the shape's own frame is inside; each shape roughly fills the unit circle.
# No shape is a rotation or reflection of another, so augmentation cannot change a label.
_INSIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda u, v: u**2 + v**2 < 1,
    "ring": lambda u, v: (torch.hypot(u, v) < 1) & (torch.hypot(u, v) > 0.55),
    "square": lambda u, v: (u.abs() < 0.7) & (v.abs() < 0.7),
    "triangle": lambda u, v: (v > -0.5) & (math.sqrt(3) * u.abs() + v < 1),
    "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.27) & (torch.maximum(u.abs(), v.abs()) < 0.95),
    "star": _star,
    "crescent": lambda u, v: (u**2 + v**2 < 1) & ((u - 0.5) ** 2 + v**2 > 0.64),
    "bar": lambda u, v: (u.abs() < 0.95) & (v.abs() < 0.28),
    "heart": lambda u, v: (1.2 * u) ** 2 + (1.2 * v + 0.2 - 0.75 * (1.2 * u).abs().sqrt()) ** 2 < 1,
    "hourglass": lambda u, v: (v.abs() < 0.8) & (u.abs() < 0.08 + 0.75 * v.abs()),
}

CLASSES: list[str] = list(_INSIDE)


def load_shapes(seed: int, num_train: int = 10_000, num_test: int = 2_000, image_size: int = _CIFAR_SIZE) -> Source:
    """Generated training and test images from separate random streams; see make_shapes."""
    train = make_shapes(num_train, 2 * seed, image_size)
    return Source(CLASSES, train, make_shapes(num_test, 2 * seed + 1, image_size))


def make_shapes(num_images: int, seed: int, image_size: int = _CIFAR_SIZE) -> Images:
    """Draw one shape per image at a random position, size, angle and colour, over texture and clutter.

    Colour, position and area have the same distribution in all classes, so that only the form tells them apart.
    Classes differ by one image at most. The arguments alone decide every image; the global random state is unchanged.

    Shape:
        pixels (N, 3, image_size, image_size) uint8, labels (N,) int64 in random order, masks
        (N, 1, image_size, image_size) bool: the pixels that the object covers by more than half.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(num_images) % len(CLASSES))[torch.randperm(num_images, generator=generator)]
    with one_thread():
        parts = [_draw(part, image_size, generator) for part in labels.split(_CHUNK)]
    pixels, masks = zip(*parts, strict=True)
    return Images(torch.cat(pixels), labels, torch.cat(masks))


def _draw(labels: Tensor, image_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, H, W) uint8 and masks (N, 1, H, W) of the shapes with these labels (N,)."""
    num = len(labels)
    background = _draw_background(num, image_size, generator)  # (N, 3, H, W) in 0..1
    background = _draw_clutter(background, generator)
    scale = image_size / _CIFAR_SIZE
    areas = _uniform((num,), 110, 200, generator) * scale**2  # one distribution for all classes
    centres = image_size / 2 + _uniform((num, 2), -4, 4, generator) * scale
    angles = _uniform((num,), 0, 2 * math.pi, generator)
    coverage = _cover(labels, centres, areas, angles, image_size)  # (N, 1, H, W)
    colours = _contrasting_colours(background, coverage, generator)  # (N, 3, 1, 1)
    image = background + coverage * (colours - background)
    # over the object too, so that its smoothness does not give it away
    image += _uniform((num, 1, 1, 1), 0.01, 0.03, generator) * torch.randn(image.shape, generator=generator)
    return (image * 255).round_().clamp_(0, 255).to(torch.uint8), coverage > 0.5


def _cover(labels: Tensor, centres: Tensor, areas: Tensor, angles: Tensor, image_size: int) -> Tensor:
    """The fraction of each pixel that the shape covers, (N, 1, H, W); from centres (N, 2), x and y in pixels."""
    steps = (torch.arange(_SAMPLES * image_size) + 0.5) / _SAMPLES  # the middle of each sample, in pixels
    coverage = torch.empty(len(labels), 1, image_size, image_size)
    for label, inside in enumerate(_INSIDE.values()):
        chosen = (labels == label).nonzero().squeeze(1)
        radius = (areas[chosen] / _unit_area(inside)).sqrt().view(-1, 1, 1)
        angle = angles[chosen].view(-1, 1, 1)
        cosine, sine = angle.cos() / radius, angle.sin() / radius
        x = (steps - centres[chosen, :1]).unsqueeze(1)  # (M, 1, samples)
        y = (steps - centres[chosen, 1:]).unsqueeze(2)  # (M, samples, 1)
        samples = inside(cosine * x + sine * y, cosine * y - sine * x)  # (M, samples, samples)
        coverage[chosen] = F.avg_pool2d(samples.float().unsqueeze(1), _SAMPLES)
    return coverage


@cache
def _unit_area(inside: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The area of a shape in its own frame, counted on a fine grid."""
    steps = (torch.arange(400) + 0.5) / 200 - 1  # the square from -1 to 1
    return 4 * inside(steps.unsqueeze(0), steps.unsqueeze(1)).float().mean().item()


def _draw_background(num: int, image_size: int, generator: torch.Generator) -> Tensor:
    """A plain colour with soft clouds, a grating and grain, each of random strength: (N, 3, H, W)."""
    base = _uniform((num, 3, 1, 1), 0.1, 0.9, generator)
    clouds = torch.randn(num, 3, 5, 5, generator=generator)
    clouds = F.interpolate(clouds, (image_size, image_size), mode="bilinear", align_corners=True)
    steps = (torch.arange(image_size) + 0.5) / image_size
    angle = _uniform((num, 1, 1), 0, math.pi, generator)
    cycles = _uniform((num, 1, 1), 1, 7, generator)  # per image width
    phase = _uniform((num, 1, 1), 0, 2 * math.pi, generator)
    along = steps.view(1, 1, -1) * angle.cos() + steps.view(1, -1, 1) * angle.sin()  # (N, H, W)
    grating = torch.sin(2 * math.pi * cycles * along + phase).unsqueeze(1)  # (N, 1, H, W)
    tint = torch.randn(num, 3, 1, 1, generator=generator)
    grain = torch.randn(num, 3, image_size, image_size, generator=generator)
    return (
        base
        + _uniform((num, 1, 1, 1), 0.02, 0.10, generator) * clouds
        + _uniform((num, 1, 1, 1), 0.0, 0.06, generator) * tint * grating
        + _uniform((num, 1, 1, 1), 0.0, 0.04, generator) * grain
    ).clamp_(0, 1)


def _draw_clutter(background: Tensor, generator: torch.Generator) -> Tensor:
    """Spots of two or three pixels and thin line fragments, too small and soft to be of any class."""
    num, _, image_size, _ = background.shape
    scale = image_size / _CIFAR_SIZE
    steps = torch.arange(image_size) + 0.5
    for half_lengths in ((0.0, 0.5), (0.0, 0.5), (2.0, 5.0), (2.0, 5.0)):
        centre = _uniform((num, 2, 1, 1), 0, image_size, generator)
        angle = _uniform((num, 1, 1), 0, math.pi, generator)
        half_length = _uniform((num, 1, 1), *half_lengths, generator) * scale
        width = _uniform((num, 1, 1), 1.0, 1.6, generator) * scale
        colour = _uniform((num, 3, 1, 1), 0, 1, generator)
        x, y = steps.view(1, 1, -1) - centre[:, 0], steps.view(1, -1, 1) - centre[:, 1]
        along = (x * angle.cos() + y * angle.sin()).abs()  # (N, H, W)
        across = y * angle.cos() - x * angle.sin()
        squared = (along - half_length).clamp_(min=0) ** 2 + across**2  # to the nearest point of the segment
        strength = (1 - squared / width**2).clamp_(min=0).unsqueeze(1)  # (N, 1, H, W), no hard edge
        background = background + strength * (colour - background)
    return background


def _contrasting_colours(background: Tensor, coverage: Tensor, generator: torch.Generator) -> Tensor:
    """For each image the first of several random colours that contrasts with its surroundings: (N, 3, 1, 1)."""
    num = len(background)
    near = F.max_pool2d(coverage, 5, stride=1, padding=2)  # the object and two pixels around it
    local = (background * near).sum((2, 3)) / near.sum((2, 3))  # (N, 3)
    candidates = _uniform((num, 16, 3), 0, 1, generator)
    # by brightness, so that the object shows in grey too: (N, 16) in 0..1
    distance = (candidates - local.unsqueeze(1)).mean(2).abs()
    first = (distance > _CONTRAST).float().argmax(1)  # argmax gives the first of equal ones
    chosen = torch.where(distance.amax(1) > _CONTRAST, first, distance.argmax(1))
    return candidates[torch.arange(num), chosen].view(num, 3, 1, 1)


def _uniform(size: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(size, generator=generator)
