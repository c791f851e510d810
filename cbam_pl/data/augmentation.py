"""Augmentation of a whole batch at once: a pure function of the images and of uniform draws.

An image's result depends only on its pixels and its own row of draws, so drawing them from (seed, epoch, index)
makes a run repeatable for any batch size, worker or device. Nothing here reads a tensor's value on the host, so on
a GPU every kernel is queued without waiting.

Why not a library: `rich` on 64 images of 32 × 32 takes 1.9 ms on one core of a Xeon (torch 2.14.1), kornia 0.9.0
12.8 ms (one order of the colour changes per batch), torchvision 0.29.1 49 ms. Colours agree with torchvision to 2e-6.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cbam_pl.process import one_thread

Augmentation = Literal["none", "basic", "alternating", "rich", "resized_crop"]

PADDING = 4  # pixels on each side before the crop
JITTER = 0.2  # brightness, contrast and saturation factors lie in 1 ± JITTER
HUE = 0.1  # largest hue shift, in turns of the colour circle
DEGREES = 15.0  # largest rotation, either way
CROP_SCALE = 0.08  # smallest part of an image's area that a resized crop takes
CROP_ASPECTS = (3 / 4, 4 / 3)  # width over height of a resized crop
CROP_ATTEMPTS = 10  # to find a resized crop inside the image, before it is the whole image
GREY = (0.2989, 0.587, 0.114)  # torchvision's luma weights, which sum to 0.9999

_NUM_DRAWS = {"none": 0, "basic": 3, "alternating": 3, "rich": 12, "resized_crop": 2 * CROP_ATTEMPTS + 3}


class CropFlip(NamedTuple):
    """Where each crop starts in the padded image, and whether it is flipped; all (B,)."""

    top: Tensor  # row, int64, 0 to 2 × PADDING
    left: Tensor  # column, int64, 0 to 2 × PADDING
    flip: Tensor  # True flips left and right


class ResizedCrop(NamedTuple):
    """The part of each image that is resized, in whole pixels, and whether it is flipped; all (B,)."""

    top: Tensor  # first row, float32, as all but `flip`
    left: Tensor  # first column
    height: Tensor  # at least 1
    width: Tensor
    flip: Tensor  # True flips left and right


class Jitter(NamedTuple):
    """The colour changes of each image."""

    position: Tensor  # (B, 4) int64, a permutation of 0 to 3: when brightness, contrast, saturation and hue change
    brightness: Tensor  # (B,) factor, 1 leaves the image as it is; so do the next two
    contrast: Tensor
    saturation: Tensor
    hue: Tensor  # (B,) shift in turns of the colour circle


def num_draws(augmentation: Augmentation) -> int:
    """The number of random draws in [0, 1) that one image uses."""
    if augmentation not in _NUM_DRAWS:
        raise ValueError(f"augmentation={augmentation!r} is unknown; use one of {', '.join(_NUM_DRAWS)}")
    return _NUM_DRAWS[augmentation]


def augment(
    pixels: Tensor,
    draws: Tensor,
    augmentation: Augmentation,
    image_size: int | None = None,
    crop_scale: float = CROP_SCALE,
) -> Tensor:
    """Augment each image by its own row of draws, independent uniform numbers in [0, 1).

    `none` only scales to [0, 1]; `basic` adds a zero-padded random crop and a horizontal flip; `rich` adds
    colour jitter in a random order per image, then a rotation. `alternating` is `basic` with reflected borders
    instead of zeros; its draws flip each image in every other epoch (`alternate_flips`). `resized_crop` resizes a
    random part of the image, and flips it.

    Source: the distributions and the arithmetic are those of torchvision's RandomCrop(size, padding=4),
    RandomHorizontalFlip(), ColorJitter(0.2, 0.2, 0.2, 0.1) and RandomRotation(15) on float images. A rotated
    pixel whose source is exactly halfway between two pixels may get the other one. The border of `alternating` is
    that of padding_mode="symmetric". `resized_crop` is RandomResizedCrop(image_size, (crop_scale, 1)) and
    RandomHorizontalFlip(), on a CPU to the pixel; elsewhere without antialiasing and without rounding to 8 bits.

    Args:
        pixels: the images.
        draws: a row for each image.
        augmentation: what is done.
        image_size: height and width of the output of resized_crop, in pixels; by default the images' height.
        crop_scale: smallest part of the area that resized_crop takes, above 0 and at most 1.

    Shape:
        pixels (B, 3, H, W) uint8 in any memory format, draws (B, num_draws(augmentation)) float32 on the same
        device; output (B, 3, H, W), of resized_crop (B, 3, image_size, image_size), float32 in [0, 1], contiguous.
    """
    shape, needed = tuple(draws.shape), (len(pixels), num_draws(augmentation))
    if shape != needed:
        raise ValueError(f"draws has shape {shape}; augmentation={augmentation!r} needs {needed}")
    if augmentation == "resized_crop":
        height, width = pixels.shape[-2:]
        crops = resized_crop_parameters(draws, height, width, crop_scale)
        resize = resize_crops_on_cpu if pixels.device.type == "cpu" else resize_crops
        return resize(pixels, crops, image_size or height)
    images = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if augmentation == "none":
        return images
    border = "reflection" if augmentation == "alternating" else "zeros"
    images = crop_and_flip(images, crop_and_flip_parameters(draws[:, :3]), border)
    if augmentation != "rich":
        return images
    images = color_jitter_(images, jitter_parameters(draws[:, 3:11]))
    return rotate(images, draws[:, 11] * (2 * DEGREES) - DEGREES)


def crop_and_flip_parameters(draws: Tensor) -> CropFlip:
    """Convert draws (B, 3) to crop positions and flips."""
    offsets = (draws[:, :2] * (2 * PADDING + 1)).long()  # (B, 2); in float32 the product stays below 9
    return CropFlip(offsets[:, 0], offsets[:, 1], draws[:, 2] < 0.5)


def alternate_flips(draws: Tensor, first: Tensor, epoch: int) -> None:
    """Flip images with `first` (N,) below 0.5 in odd epochs, the others in even ones; changes the draws (N, 3).

    Source: the alternating flip of Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498.
    """
    draws[:, 2] = ((first < 0.5).long() + epoch) % 2


def resized_crop_parameters(draws: Tensor, height: int, width: int, scale: float = CROP_SCALE) -> ResizedCrop:
    """Convert draws (B, 23) to parts of images of height × width, of at least `scale` of the area.

    Source: RandomResizedCrop.get_params: area and logarithm of the aspect ratio are uniform; of CROP_ATTEMPTS pairs
    the first that fits is taken. Where none fits, this takes the whole image, as torchvision does of a square one.
    """
    areas, aspects = draws[:, : 2 * CROP_ATTEMPTS].chunk(2, 1)  # (B, CROP_ATTEMPTS) each
    areas = (areas * (1 - scale) + scale) * (height * width)
    low, high = (math.log(aspect) for aspect in CROP_ASPECTS)
    aspects = (aspects * (high - low) + low).exp()
    widths, heights = (areas * aspects).sqrt().round(), (areas / aspects).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.byte().argmax(1, keepdim=True)  # (B, 1): argmax gives the first of equal ones
    found = fits.gather(1, first)
    crop_height = heights.gather(1, first).where(found, height).squeeze(1)
    crop_width = widths.gather(1, first).where(found, width).squeeze(1)
    down, across, flip = draws[:, 2 * CROP_ATTEMPTS :].unbind(1)
    # in float32 the products stay below the integer
    top, left = (down * (height - crop_height + 1)).floor(), (across * (width - crop_width + 1)).floor()
    return ResizedCrop(top, left, crop_height, crop_width, flip < 0.5)


def jitter_parameters(draws: Tensor) -> Jitter:
    """Convert draws (B, 8) to colour changes: four for the order, and one value for each change."""
    # sorting independent uniform numbers gives each of the 24 orders the same chance
    position = draws[:, :4].argsort(dim=1, stable=True)
    brightness, contrast, saturation = (draws[:, 4:7] * (2 * JITTER) + (1 - JITTER)).unbind(1)
    return Jitter(position, brightness, contrast, saturation, draws[:, 7] * (2 * HUE) - HUE)


def crop_and_flip(images: Tensor, parameters: CropFlip, border: str = "zeros") -> Tensor:
    """Pad (B, 3, H, W) with PADDING pixels of zeros or of its reflection, crop back to its size, and flip."""
    top, left, flip = parameters
    zero = torch.zeros_like(top)
    across = torch.stack((1 - 2 * flip.long(), zero, left - PADDING), 1)
    down = torch.stack((zero, zero + 1, top - PADDING), 1)
    return _sample(images, torch.stack((across, down)).to(images.dtype), border)


def resize_crops_on_cpu(pixels: Tensor, parameters: ResizedCrop, size: int) -> Tensor:
    """Parts of (B, 3, H, W) uint8, resized to (B, 3, size, size) float32 in [0, 1], with antialiasing.

    One by one: on 8 bits torch has Pillow's algorithm in vector instructions, which at 224 pixels takes a fifteenth of
    the time of `resize_crops`, most of all where a pixel's channels are neighbours in memory.
    """
    resized = []
    with one_thread():  # on a busy machine threads would mostly wait for one another, twice for each image
        for i, (top, left, height, width, flip) in enumerate(torch.stack(parameters, 1).int().tolist()):
            part = pixels[i : i + 1, :, top : top + height, left : left + width]
            part = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
            resized.append(part.flip(3) if flip else part)
    return torch.cat(resized).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def resize_crops(pixels: Tensor, parameters: ResizedCrop, size: int) -> Tensor:
    """Parts of (B, 3, H, W) uint8, resized to (B, 3, size, size) float32 in [0, 1], all at once.

    Without antialiasing, which hardly matters where the images are only a little larger than `size`.
    """
    top, left, height, width, flip = parameters
    images = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    position = (torch.arange(size, device=images.device, dtype=images.dtype) + 0.5) / size  # (size,)
    mirrored = torch.where(flip.unsqueeze(1), 1 - position, position)  # (B, size)
    rows = _within(position, top, height) * (2 / images.shape[-2]) - 1  # (B, size), in grid_sample's unit
    columns = _within(mirrored, left, width) * (2 / images.shape[-1]) - 1
    shape = (len(images), size, size)
    grid = torch.stack((columns.unsqueeze(1).expand(shape), rows.unsqueeze(2).expand(shape)))
    return F.grid_sample(images, grid.permute(1, 2, 3, 0), "bilinear", align_corners=False)


def _within(position: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Positions (B or 1, size) in 0..1 of parts, in pixels; half a pixel inside, so that no neighbour is blended in."""
    start, length = start.unsqueeze(1), length.unsqueeze(1)
    return start + torch.minimum(torch.clamp(position * length, min=0.5), length - 0.5)


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Turn (B, 3, H, W) by `angle` (B,), in degrees counter-clockwise: nearest pixel, zeros outside."""
    radians = angle * (math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    zero = torch.zeros_like(cos)
    across = torch.stack((cos, -sin, zero), 1)
    down = torch.stack((sin, cos, zero), 1)
    return _sample(images, torch.stack((across, down)))


def _sample(images: Tensor, matrix: Tensor, border: str = "zeros") -> Tensor:
    """Read each pixel of (B, 3, H, W) at matrix · (x, y, 1), in pixels from the centre; the matrix is (2, B, 3)."""
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device, dtype=images.dtype) - (width - 1) / 2  # (W,)
    y = torch.arange(height, device=images.device, dtype=images.dtype) - (height - 1) / 2  # (H,)
    # grid_sample's unit is half an image
    across, down = matrix[0].mul(2 / width).unsqueeze(2), matrix[1].mul(2 / height).unsqueeze(2)  # (B, 3, 1)
    # products and sums, not a matrix product, which may round to TF32 or bfloat16
    rows = torch.stack((across[:, 1] * y + across[:, 2], down[:, 1] * y + down[:, 2]))  # (2, B, H)
    columns = torch.stack((across[:, 0] * x, down[:, 0] * x))  # (2, B, W)
    grid = rows.unsqueeze(3) + columns.unsqueeze(2)  # (2, B, H, W)
    # any layout of the grid is allowed, and separate coordinate planes are faster to compute than pairs
    return F.grid_sample(images, grid.permute(1, 2, 3, 0), "nearest", border, align_corners=False)


# The three functions below work in place: allocating memory for every step would cost more than the arithmetic.


def color_jitter_(images: Tensor, parameters: Jitter) -> Tensor:
    """Change the colours of contiguous images (B, 3, H, W) float32 in place, each image in its own order.

    In seven fixed steps: three blends, hue, three blends, since hue is the most expensive of the four changes, and the
    blends share one formula. Each image uses the steps that give its order; the other blends leave it unchanged.
    """
    position, *factors, hue = parameters
    turn, hue_turn = position[:, :3], position[:, 3:]  # (B, 3), (B, 1)
    # turns 0 to 2 before hue are steps 0 to 2, turns 1 to 3 after it are steps 3 to 5
    step = turn + 2 * (turn > hue_turn)
    active = step == torch.arange(6, device=step.device).view(6, 1, 1)  # (6, B, 3)
    change = active * (torch.stack(factors, 1) - 1)  # (6, B, 3)
    scale = change.sum(2) + 1  # (6, B)
    _, mean_weight, grey_weight = change.neg_().unbind(2)  # (6, B) each
    for i in range(6):
        if i == 3:
            _shift_hue_(images, hue)
        _blend_(images, scale[i], grey_weight[i], mean_weight[i])
    return images


def _blend_(images: Tensor, scale: Tensor, grey_weight: Tensor, mean_weight: Tensor) -> None:
    """scale × image (B, 3, H, W) + grey_weight × its grey + mean_weight × its mean grey, clamped; weights (B,)."""
    planes = images.view(*images.shape[:2], -1)  # (B, 3, H·W)
    red, green, blue = planes.unbind(1)
    grey = red.mul(GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])  # (B, H·W)
    mean = grey.mean(1).mul_(mean_weight)  # (B,)
    base = grey.mul_(grey_weight.unsqueeze(1)).add_(mean.unsqueeze(1))
    torch.addcmul(base.unsqueeze(1), planes, scale.view(-1, 1, 1), out=planes).clamp_(0, 1)


def _shift_hue_(images: Tensor, shift: Tensor) -> None:
    """Turn the hue, keeping each pixel's largest and smallest channel value.

    With chroma = max − min, a pixel's distance from red on the colour circle of length 6 is
    ((green − min) + (blue − min) − (red − min) + chroma) / chroma, towards green where green ≥ blue. This is
    HSV's hue without a case for each largest channel: on a CPU, comparing and selecting cost ten times an
    addition. Back again, a channel is at max within 1 of its own hue (red 0, green 2, blue 4), at min beyond
    2, and linear in between. Images (B, 3, H, W), shift (B,) in turns from -0.5 to 0.5.
    """
    red, green, blue = images.view(*images.shape[:2], -1).unbind(1)  # (B, H·W) each
    largest, smallest = torch.maximum(red, green), torch.minimum(red, green)
    torch.maximum(largest, blue, out=largest)
    torch.minimum(smallest, blue, out=smallest)
    chroma = largest - smallest
    ramp = green - blue  # first the sign of the hue, then scratch memory
    hue = (green + blue).sub_(red).sub_(smallest).add_(chroma)
    hue.div_(torch.clamp(chroma, min=1e-12))  # grey has no hue: any finite number, as chroma 0 removes it
    hue.copysign_(ramp).add_(6 * shift.unsqueeze(1))
    hue.sub_(torch.div(hue, 6, out=ramp).floor_(), alpha=6)  # in [0, 6]

    smallest.sub_(chroma)
    largest.add_(chroma)
    # red's ramps are measured from the opposite hue, 3, since the circle is cut at red
    ramps = ((red, 3, smallest, 1), (green, 2, largest, -1), (blue, 4, largest, -1))
    for channel, centre, end, sign in ramps:
        torch.sub(hue, centre, out=ramp).abs_().clamp_(1, 2)
        torch.addcmul(end, chroma, ramp, value=sign, out=channel)
