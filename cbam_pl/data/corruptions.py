"""The 19 corruptions of CIFAR-10-C, made on the fly: batched, and a function of (seed, corruption, severity, image).

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, arXiv:1903.12261. Operations and constants are those of the authors' ImageNet-C/create_c/make_cifar_c.py,
which made the published files, and not ImageNet-C's. docs/robustness.md says what differs from the published images:
the random numbers of all of them, and the frost, whose photographs are replaced by generated ice.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cbam_pl.data import corruption_parts as parts
from cbam_pl.data.corruption_parts import SIZE, Draws
from cbam_pl.errors import UserError
from cbam_pl.seeds import derive_seed

GREY = (0.299, 0.587, 0.114)  # OpenCV's luma weights
WATER = (175, 238, 238)  # pale turquoise, of 255
MUD = (63, 42, 20)
ICE = (0.78, 0.9, 1.0)  # bluish white


def corrupt(pixels: Tensor, name: str, severity: int, indices: Sequence[int], seed: int = 0) -> Tensor:
    """Corrupt each image; its result depends on its pixels, its index, the corruption, the severity and the seed.

    Args:
        pixels: images (B, 3, 32, 32) uint8, on the CPU.
        name: one of CORRUPTIONS.
        severity: 1 to 5.
        indices: each image's number in its data set, from 0.
        seed: another seed gives other random numbers.

    Returns:
        (B, 3, 32, 32) uint8, contiguous.

    Raises:
        UserError: images of another size, for which there are no such constants.
    """
    check_size(*pixels.shape[2:])
    function, constants = CORRUPTIONS[name]
    draws = Draws(derive_seed("corruption", seed, name, severity), indices)
    images = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return parts.round_down(function(images, draws, *constants[severity - 1])).to(torch.uint8)


def check_size(height: int, width: int) -> None:
    """Reject images of a size that CIFAR-10-C's constants are not made for, with a UserError."""
    if (height, width) != (SIZE, SIZE):
        raise UserError(
            f"--corruptions: the images are {height}×{width}, and the severities are those of CIFAR-10-C, whose blurs, "
            f"shifts and drops are measured in pixels of {SIZE}×{SIZE} images; use images of that size"
        )


# Each function takes images (B, 3, 32, 32) float32 in [0, 1], their draws, and a severity's constants, and gives images
# of the same shape, which `corrupt` clips.


# Noise


def gaussian_noise(images: Tensor, draws: Draws, sd: float) -> Tensor:
    """Add normal noise."""
    return images + sd * draws.normal(3, SIZE, SIZE)


def shot_noise(images: Tensor, draws: Draws, photons: float) -> Tensor:
    """Count photons, of which white has so many on average."""
    return draws.poisson(images * photons) / photons


def impulse_noise(images: Tensor, draws: Draws, fraction: float) -> Tensor:
    """Set a fraction of the values (of a channel, not of a whole pixel) to 0 or 1, as often to one as to the other."""
    number = draws.uniform(3, SIZE, SIZE)
    return torch.where(number < fraction, (number < fraction / 2).float(), images)


def speckle_noise(images: Tensor, draws: Draws, sd: float) -> Tensor:
    """Add normal noise in proportion to the value."""
    return images + images * (sd * draws.normal(3, SIZE, SIZE))


# Blur


def gaussian_blur(images: Tensor, draws: Draws, sigma: float) -> Tensor:
    """Filter with a Gaussian of `sigma` pixels."""
    return parts.smooth(images, sigma)


def defocus_blur(images: Tensor, draws: Draws, radius: float, alias_sigma: float) -> Tensor:
    """Filter with a disk, its edge smoothed; a radius below 1 leaves that smoothing alone."""
    return parts.filter_2d(images, parts.disk_kernel(radius, alias_sigma))


def glass_blur(images: Tensor, draws: Draws, sigma: float, times: int) -> Tensor:
    """Blur, displace each pixel by up to one pixel, and blur again.

    make_cifar_c.py means to swap neighbours, but its tuple of NumPy views copies one over the other, and only the
    neighbours above and to the left. A pixel is read before it is overwritten, so all move at once.
    """
    blurred = parts.round_down(parts.smooth(images, sigma)) / 255
    place = torch.arange(SIZE)
    for _ in range(times):
        # The first two rows and columns keep their pixels.
        shift = (draws.uniform(2, SIZE, SIZE) < 0.5).long()  # (B, 2, 32, 32)
        shift[:, :, :2], shift[:, :, :, :2] = 0, 0
        rows, columns = place[:, None] - shift[:, 0], place - shift[:, 1]  # (B, 32, 32)
        source = (rows * SIZE + columns).flatten(1)[:, None].expand(-1, 3, -1)
        blurred = blurred.flatten(2).gather(2, source).view_as(images)
    return parts.smooth(blurred, sigma)


def motion_blur(images: Tensor, draws: Draws, radius: int, sigma: float) -> Tensor:
    """Blur along a direction within 45° of the horizontal."""
    return parts.motion_blur(images, 90 * draws.uniform() - 45, radius, sigma)


def zoom_blur(images: Tensor, draws: Draws, largest: float) -> Tensor:
    """The mean of the image and its enlargements by steps of 1 % below `largest`."""
    return (images.flatten(2) @ parts.zoom_blur_matrix(largest).T).view_as(images)


# Weather


def snow(
    images: Tensor,
    draws: Draws,
    mean: float,
    sd: float,
    zoom: float,
    least: float,
    radius: int,
    sigma: float,
    kept: float,
) -> Tensor:
    """Add moving flakes, drawn as enlarged noise above `least`, and make the scene pale, but for the share `kept`."""
    zoom_matrix = parts.zoom_matrix(zoom).float()
    flakes = zoom_matrix @ (mean + sd * draws.normal(SIZE, SIZE)) @ zoom_matrix.T
    flakes = parts.round_down(torch.where(flakes < least, 0.0, flakes)) / 255
    flakes = parts.motion_blur(flakes[:, None], -135 + 90 * draws.uniform(), radius, sigma)
    grey = torch.einsum("bchw,c->bhw", images, torch.tensor(GREY))[:, None]
    pale = torch.maximum(images, 1.5 * grey + 0.5)
    return kept * images + (1 - kept) * pale + flakes + flakes.flip(2, 3)


def frost(images: Tensor, draws: Draws, scale: float, weight: float) -> Tensor:
    """Add veins of ice to the darkened image.

    The original adds a crop of one of six photographs, which are not free to ship. Here the ice is generated: bright
    where a random cloud crosses its middle height. Its accuracy cannot be compared with that of CIFAR-10-C's frost.
    """
    veins = 1 - (2 * parts.plasma(draws, 1.5) - 1).abs()  # (B, 32, 32) in [0, 1]
    ice = (0.15 + 0.85 * veins**2)[:, None] * torch.tensor(ICE).view(3, 1, 1)
    return scale * images + weight * ice


def fog(images: Tensor, draws: Draws, amount: float, decay: float) -> Tensor:
    """Add a random cloud, and darken so that the brightest value may stay what it was."""
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + amount * parts.plasma(draws, decay)[:, None]) * brightest / (brightest + amount)


def spatter(
    images: Tensor, draws: Draws, mean: float, sd: float, sigma: float, least: float, strength: float, is_mud: bool
) -> Tensor:
    """Throw drops at the lens: of water, with lit edges, or of mud, blurred by `strength` pixels."""
    liquid = parts.smooth(mean + sd * draws.normal(SIZE, SIZE), sigma)
    if is_mud:
        cover = parts.smooth((liquid > least).float(), strength)
        cover = torch.where(cover < 0.8, 0.0, cover)[:, None]
        return images * (1 - cover) + cover * torch.tensor(MUD).view(3, 1, 1) / 255
    liquid = torch.where(liquid < least, 0.0, liquid).mul(255).floor() % 256  # as NumPy converts to uint8
    light = torch.tensor([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])  # from the lower right
    distance = parts.distance_to(parts.canny(liquid, 50, 150), 20.0)
    # In float64, as it is rounded down, and may be a whole number.
    distance = parts.filter_2d(distance[:, None].double(), torch.ones(3, 3)).div(9).float().floor()
    relief = parts.filter_2d(parts.equalise(distance[:, 0], 21)[:, None], light).clamp(0, 255)
    drops = liquid[:, None] * parts.filter_2d(relief, torch.ones(3, 3)).div(9).round()
    largest = drops.amax((2, 3), keepdim=True)
    # Where no drop is left make_cifar_c.py divides by 0; here the image stays as it is.
    drops = drops / torch.where(largest > 0, largest, 1.0) * strength
    return images + drops * torch.tensor(WATER).view(3, 1, 1) / 255


# Colour and compression


def brightness(images: Tensor, draws: Draws, more: float) -> Tensor:
    """Raise the value of HSV, the largest channel; hue and saturation stay."""
    value = images.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp_min(1e-6)), raised)


def saturate(images: Tensor, draws: Draws, factor: float, more: float) -> Tensor:
    """Change the saturation of HSV; hue and value stay. Grey counts as red, whose hue is 0, as in scikit-image."""
    value, chroma = images.amax(1, keepdim=True), images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    is_grey = chroma == 0
    red = torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1)
    missing = torch.where(is_grey, red, (value - images) / torch.where(is_grey, 1.0, chroma))  # of each channel, 0 to 1
    saturation = torch.where(is_grey, 0.0, chroma / value.clamp_min(1e-6))
    return value * (1 - missing * (saturation * factor + more).clamp(0, 1))


def contrast(images: Tensor, draws: Draws, factor: float) -> Tensor:
    """Bring each channel closer to its mean over the image."""
    means = images.mean((2, 3), keepdim=True)
    return (images - means) * factor + means


def elastic_transform(images: Tensor, draws: Draws, shift: float, sigma: float, corner: float) -> Tensor:
    """Move three points by up to `corner` pixels, the image with them, then each pixel by a smooth random field.

    OpenCV's warpAffine, the first step of make_cifar_c.py, rounded coordinates to 1/32 pixel before version 5.
    """
    high, low = SIZE // 2 + SIZE // 3, SIZE // 2 - SIZE // 3
    before = torch.tensor([[high, high], [high, low], [low, low]], dtype=torch.float64)  # (3, 2): x, y of the points
    after = before + corner * (2 * draws.uniform(3, 2).double() - 1)  # (B, 3, 2)
    # What is at (x, y) comes from (x, y, 1) · matrix.
    matrix = torch.linalg.solve(torch.cat([after, torch.ones(len(after), 3, 1)], 2), before.expand_as(after))
    place = torch.arange(SIZE, dtype=torch.float64)
    y, x = torch.meshgrid(place, place, indexing="ij")
    source = torch.stack((x, y, torch.ones_like(x)), 2).view(1, -1, 3) @ matrix  # (B, 1024, 2)
    from_x, from_y = source.view(-1, SIZE, SIZE, 2).unbind(3)
    moved = parts.sample(images, from_x, from_y, centred=True)
    if not shift:
        return moved
    field = shift * parts.smooth(2 * draws.uniform(2, SIZE, SIZE) - 1, sigma, "reflect", 3.0)  # (B, 2, 32, 32)
    return parts.sample(moved, x + field[:, 0], y + field[:, 1], centred=False)


def pixelate(images: Tensor, draws: Draws, scale: float) -> Tensor:
    """Average into fewer pixels, and enlarge again, with Pillow's box filter."""
    size = (int(SIZE * scale),) * 2
    return _by_pillow(
        images, lambda image: image.resize(size, Image.Resampling.BOX).resize((SIZE, SIZE), Image.Resampling.BOX)
    )


def jpeg_compression(images: Tensor, draws: Draws, quality: int) -> Tensor:
    """Compress with Pillow's JPEG codec, and decode."""

    def compress(image: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        return Image.open(stream)

    return _by_pillow(images, compress)


def _by_pillow(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(own))) for own in pixels])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).float() / 255


# Each corruption with its constants, of severity 1 to 5.
COMMON: dict[str, tuple[Callable[..., Tensor], list[tuple[Any, ...]]]] = {
    "gaussian_noise": (gaussian_noise, [(0.04,), (0.06,), (0.08,), (0.09,), (0.1,)]),
    "shot_noise": (shot_noise, [(500,), (250,), (100,), (75,), (50,)]),
    "impulse_noise": (impulse_noise, [(0.01,), (0.02,), (0.03,), (0.05,), (0.07,)]),
    "defocus_blur": (defocus_blur, [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)]),
    "glass_blur": (glass_blur, [(0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)]),
    "motion_blur": (motion_blur, [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)]),
    "zoom_blur": (zoom_blur, [(1.06,), (1.11,), (1.16,), (1.21,), (1.26,)]),
    "snow": (
        snow,
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
    ),
    "frost": (frost, [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)]),
    "fog": (fog, [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)]),
    "brightness": (brightness, [(0.05,), (0.1,), (0.15,), (0.2,), (0.3,)]),
    "contrast": (contrast, [(0.75,), (0.5,), (0.4,), (0.3,), (0.15,)]),
    "elastic_transform": (  # 32 × make_cifar_c.py's shares of the image
        elastic_transform,
        [(0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)],
    ),
    "pixelate": (pixelate, [(0.95,), (0.9,), (0.85,), (0.75,), (0.65,)]),
    "jpeg_compression": (jpeg_compression, [(80,), (65,), (58,), (50,), (40,)]),
}
EXTRA: dict[str, tuple[Callable[..., Tensor], list[tuple[Any, ...]]]] = {
    "speckle_noise": (speckle_noise, [(0.06,), (0.1,), (0.12,), (0.16,), (0.2,)]),
    "gaussian_blur": (gaussian_blur, [(0.4,), (0.6,), (0.7,), (0.8,), (1,)]),
    "spatter": (
        spatter,
        [
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ],
    ),
    "saturate": (saturate, [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)]),
}
CORRUPTIONS = COMMON | EXTRA
SEVERITIES = (1, 2, 3, 4, 5)
