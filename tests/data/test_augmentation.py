"""The batched augmentation against torchvision's transforms, one image at a time."""

import itertools
import math
from typing import get_args

import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from cbam_pl.data.augmentation import (
    Augmentation,
    CropFlip,
    Jitter,
    ResizedCrop,
    alternate_flips,
    augment,
    color_jitter_,
    crop_and_flip,
    crop_and_flip_parameters,
    jitter_parameters,
    num_draws,
    resize_crops,
    resize_crops_on_cpu,
    resized_crop_parameters,
    rotate,
)

COLOR_TOLERANCE = 1e-5


def random_pixels(count: int, height: int, width: int | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, height, width or height)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    # few levels make equal channels, greys and saturated colours common, where hue has its special cases
    pixels[: count // 4] = pixels[: count // 4] // 64 * 85
    return pixels


def random_draws(count: int, augmentation: Augmentation, seed: int = 0) -> Tensor:
    return torch.rand(count, num_draws(augmentation), generator=torch.Generator().manual_seed(seed))


def crop_and_flip_one(image: Tensor, top: int, left: int, flip: bool, border: str = "constant") -> Tensor:
    height, width = image.shape[-2:]
    image = tv.crop(tv.pad(image, [4, 4, 4, 4], padding_mode=border), top, left, height, width)
    return tv.horizontal_flip(image) if flip else image


def color_jitter_one(image: Tensor, parameters: Jitter, i: int) -> Tensor:
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    amounts = [amount[i].item() for amount in parameters[1:]]
    for turn in range(4):
        operation = parameters.position[i].tolist().index(turn)
        image = operations[operation](image, amounts[operation])
    return image


def change_one_color(images: Tensor, name: str, amounts: Tensor) -> Tensor:
    """Images of which only brightness, contrast, saturation or hue is changed."""
    one = torch.ones(len(images))
    parameters = Jitter(torch.arange(4).expand(len(images), 4), one, one, one, torch.zeros(len(images)))
    return color_jitter_(images.clone(), parameters._replace(**{name: amounts}))


def off_ties(angle: Tensor, height: int, width: int) -> Tensor:
    """(B, 1, H, W): True where the sampled point is clearly nearest to one pixel, by float64 arithmetic."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = x.double() - (width - 1) / 2, y.double() - (height - 1) / 2
    radians = angle.double().view(-1, 1, 1) * math.pi / 180
    across = radians.cos() * x - radians.sin() * y + (width - 1) / 2
    down = radians.sin() * x + radians.cos() * y + (height - 1) / 2
    ties = [((point - point.floor()) - 0.5).abs() < 1e-4 for point in (across, down)]
    return ~(ties[0] | ties[1]).unsqueeze(1)


@pytest.mark.parametrize(("border", "theirs"), [("zeros", "constant"), ("reflection", "symmetric")])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (33, 33), (20, 27), (8, 8)])
def test_crop_and_flip_equals_torchvision(height, width, border, theirs):
    images = random_pixels(162, height, width) / 255
    cell = torch.arange(162)  # all 9 × 9 offsets, each with and without a flip
    parameters = CropFlip(cell % 9, cell // 9 % 9, cell >= 81)
    expected = [
        crop_and_flip_one(image, int(top), int(left), bool(flip), theirs)
        for image, top, left, flip in zip(images, *parameters, strict=True)
    ]
    assert torch.equal(crop_and_flip(images, parameters, border), torch.stack(expected))


@pytest.mark.parametrize(
    ("name", "theirs", "low", "high"),
    [
        ("brightness", tv.adjust_brightness, 0.0, 2.0),
        ("contrast", tv.adjust_contrast, 0.0, 2.0),
        ("saturation", tv.adjust_saturation, 0.0, 2.0),
        ("hue", tv.adjust_hue, -0.5, 0.5),
    ],
)
@pytest.mark.parametrize("size", [32, 33])
def test_color_operations_equal_torchvision(name, theirs, low, high, size):
    images = random_pixels(48, size) / 255
    amounts = torch.linspace(low, high, 48)
    result = change_one_color(images, name, amounts)
    expected = [theirs(image, amount.item()) for image, amount in zip(images, amounts, strict=True)]
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=COLOR_TOLERANCE)


def test_hue_of_every_tie_equals_torchvision():
    levels = torch.tensor([0.0, 1e-7, 0.25, 0.5, 0.5 + 6e-8, 0.75, 1.0])
    colors = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 1, -1)  # (1, 3, 1, 343)
    for shift in (-0.5, -1 / 3, -1 / 6, -0.1, 0.0, 0.05, 1 / 6, 0.5):
        result = change_one_color(colors, "hue", torch.tensor([shift]))
        torch.testing.assert_close(result, tv.adjust_hue(colors, shift), rtol=0, atol=COLOR_TOLERANCE)


@pytest.mark.parametrize("size", [32, 64, 33, 7])
def test_rotate_equals_torchvision(size):
    angles = torch.cat((torch.linspace(-15, 15, 61), torch.tensor([-90.0, 45.3, 123.4])))
    images = random_pixels(len(angles), size) / 255
    result = rotate(images, angles)
    expected = torch.stack(
        [
            tv.rotate(image, angle.item(), interpolation=InterpolationMode.NEAREST)
            for image, angle in zip(images, angles, strict=True)
        ]
    )
    clear = off_ties(angles, size, size)
    assert clear.float().mean() > 0.95
    assert torch.equal(result * clear, expected * clear)


def test_color_jitter_in_each_of_24_orders():
    images = random_pixels(96, 8) / 255
    orders = torch.tensor(list(itertools.permutations(range(4)))).repeat(4, 1)
    parameters = jitter_parameters(torch.rand(96, 8, generator=torch.Generator().manual_seed(3)))
    parameters = parameters._replace(position=orders)
    expected = torch.stack([color_jitter_one(image, parameters, i) for i, image in enumerate(images)])
    torch.testing.assert_close(color_jitter_(images, parameters), expected, rtol=0, atol=COLOR_TOLERANCE)


@pytest.mark.parametrize("size", [32, 64, 33])
def test_rich_equals_torchvision_composition(size):
    pixels, draws = random_pixels(32, size), random_draws(32, "rich")
    where, colors = crop_and_flip_parameters(draws[:, :3]), jitter_parameters(draws[:, 3:11])
    angles = draws[:, 11] * 30 - 15
    expected = []
    for i, image in enumerate(tv.to_dtype(pixels, torch.float32, scale=True)):
        top, left, flip = (parameter[i].item() for parameter in where)
        image = color_jitter_one(crop_and_flip_one(image, top, left, flip), colors, i)
        expected.append(tv.rotate(image, angles[i].item()))
    clear = off_ties(angles, size, size)
    result = augment(pixels, draws, "rich")
    torch.testing.assert_close(result * clear, torch.stack(expected) * clear, rtol=0, atol=COLOR_TOLERANCE)


@pytest.mark.parametrize(("augmentation", "border"), [("basic", "constant"), ("alternating", "symmetric")])
def test_crop_and_flip_alone_equal_torchvision_composition(augmentation, border):
    pixels, draws = random_pixels(48, 32), random_draws(48, augmentation)
    where = crop_and_flip_parameters(draws)
    expected = [crop_and_flip_one(pixels[i], *(p[i].item() for p in where), border) for i in range(48)]
    assert torch.equal(augment(pixels, draws, augmentation), torch.stack(expected) / 255)


def resized_crop_one(pixels: Tensor, crop: ResizedCrop, i: int, size: int, antialias: bool) -> Tensor:
    top, left, height, width = (int(value[i]) for value in crop[:4])
    result = tv.resized_crop(pixels[i], top, left, height, width, [size, size], antialias=antialias)
    return tv.horizontal_flip(result) if crop.flip[i] else result


def some_crops() -> ResizedCrop:
    """Of images of 40 × 30: all of one, single pixels in two corners, strips, and others, every second one flipped."""
    boxes = [(0, 0, 40, 30), (0, 0, 1, 1), (39, 29, 1, 1), (3, 0, 2, 30), (0, 28, 40, 2), (7, 5, 20, 18)]
    boxes = torch.tensor(boxes * 2).float()
    return ResizedCrop(*boxes.unbind(1), torch.arange(len(boxes)) < len(boxes) // 2)


@pytest.mark.parametrize("size", [24, 33, 8])
def test_resized_crops_equal_torchvision(size):
    crops = some_crops()
    pixels = random_pixels(len(crops.top), 40, 30)
    expected = [resized_crop_one(pixels, crops, i, size, antialias=True) for i in range(len(pixels))]
    assert torch.equal(resize_crops_on_cpu(pixels, crops, size), torch.stack(expected) / 255)
    expected = [resized_crop_one(pixels / 255, crops, i, size, antialias=False) for i in range(len(pixels))]
    torch.testing.assert_close(resize_crops(pixels, crops, size), torch.stack(expected), rtol=0, atol=2e-5)


def test_resized_crops_of_a_cpu_and_of_other_devices_hardly_differ():
    photo = tv.resize(random_pixels(64, 8), [73, 73])  # smooth, as photos are, and 8 / 7 of the crop's size
    crops = resized_crop_parameters(random_draws(64, "resized_crop"), 73, 73)
    difference = (resize_crops_on_cpu(photo, crops, 64) - resize_crops(photo, crops, 64)).abs() * 255
    assert difference.mean() < 0.5
    assert difference.max() < 4


@pytest.mark.parametrize("scale", [0.08, 0.9, 1.0])
def test_resized_crops_are_distributed_as_torchvisions(scale):
    torch.manual_seed(5)
    image = torch.empty(3, 60, 60)
    boxes = [RandomResizedCrop.get_params(image, (scale, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]
    theirs = torch.tensor(boxes).double().T
    crops = resized_crop_parameters(random_draws(20_000, "resized_crop", seed=3), 60, 60, scale)
    ours = torch.stack(crops[:4]).double()
    assert (ours[:2] >= 0).all()
    assert (ours[:2] + ours[2:] <= 60).all()
    for name, mine, other in zip(crops._fields, ours, theirs, strict=False):
        assert ks_2samp(mine, other).pvalue > 1e-3, name
    for mine, other in ((ours[2] * ours[3], theirs[2] * theirs[3]), (ours[3] / ours[2], theirs[3] / theirs[2])):
        assert ks_2samp(mine, other).pvalue > 1e-3  # area and aspect
    assert torch.allclose(torch.corrcoef(ours)[0, 1], torch.corrcoef(theirs)[0, 1], atol=0.06, equal_nan=True)
    assert abs(crops.flip.double().mean() - 0.5) < 0.02


def test_the_first_pair_that_fits_is_taken_and_the_whole_image_where_none_does():
    draws = torch.full((2, num_draws("resized_crop")), 1 - 2**-24)  # all of the area at 4:3 does not fit a square
    draws[0, 3], draws[0, 13] = 0.0, 0.5  # the fourth pair is 8 % of the area, as a square: 17 × 17 of 60 × 60
    crops = resized_crop_parameters(draws, 60, 60)
    assert [values.tolist() for values in crops] == [[43, 0], [43, 0], [17, 60], [17, 60], [False, False]]


def test_a_resized_crop_has_the_size_that_is_asked_for():
    pixels, draws = random_pixels(6, 40), random_draws(6, "resized_crop")
    crops = resized_crop_parameters(draws, 40, 40, 0.5)
    assert (crops.height * crops.width).min() > 0.47 * 40 * 40
    expected = resize_crops_on_cpu(pixels, crops, 35)
    assert torch.equal(augment(pixels, draws, "resized_crop", 35, 0.5), expected)


def test_alternate_flips_mirror_each_image_in_every_other_epoch():
    draws, first = random_draws(1000, "alternating"), torch.rand(1000, generator=torch.Generator().manual_seed(1))
    offsets = draws[:, :2].clone()
    flips = []
    for epoch in range(4):
        alternate_flips(draws, first, epoch)
        flips.append(crop_and_flip_parameters(draws).flip)
    assert torch.equal(flips[0], flips[2])
    assert torch.equal(flips[1], flips[3])
    assert torch.equal(flips[0], first >= 0.5)
    assert torch.equal(flips[1], first < 0.5)
    assert 400 < flips[0].sum() < 600
    assert torch.equal(draws[:, :2], offsets)


def test_none_only_scales():
    pixels = random_pixels(4, 32)
    assert torch.equal(augment(pixels, torch.rand(4, 0), "none"), pixels / 255)


@pytest.mark.parametrize("augmentation", get_args(Augmentation))
@pytest.mark.parametrize("size", [32, 33])
def test_result_does_not_depend_on_the_rest_of_the_batch(augmentation, size):
    pixels, draws = random_pixels(37, size), random_draws(37, augmentation)
    together = augment(pixels, draws, augmentation)
    alone = torch.cat([augment(pixels[i : i + 1], draws[i : i + 1], augmentation) for i in range(37)])
    assert together.dtype == torch.float32
    assert together.is_contiguous()
    assert 0 <= together.min() <= together.max() <= 1
    if augmentation == "rich":
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    else:
        assert torch.equal(together, alone)


@pytest.mark.parametrize("augmentation", get_args(Augmentation))
def test_any_memory_format(augmentation):
    pixels, draws = random_pixels(8, 32), random_draws(8, augmentation)
    expected = augment(pixels, draws, augmentation)
    wide = torch.zeros(8, 3, 64, 32, dtype=torch.uint8)
    wide[:, :, ::2] = pixels
    for same in (pixels.contiguous(memory_format=torch.channels_last), wide[:, :, ::2]):
        before = same.clone()
        result = augment(same, draws, augmentation)
        assert torch.equal(result, expected)
        assert result.is_contiguous()
        assert torch.equal(same, before)


def test_repeatable_and_without_gradient_state():
    pixels, draws = random_pixels(8, 32), random_draws(8, "rich")
    first, second = augment(pixels, draws, "rich"), augment(pixels, draws, "rich")
    assert torch.equal(first, second)
    assert not first.requires_grad


@pytest.mark.parametrize("augmentation", get_args(Augmentation))
def test_nothing_is_read_on_the_host(augmentation):
    # meta tensors have no values, so a read of one, which would stop a GPU's queue, is an error
    pixels, draws = random_pixels(8, 32).to("meta"), random_draws(8, augmentation).to("meta")
    assert augment(pixels, draws, augmentation).shape == (8, 3, 32, 32)


def test_distribution_of_crop_and_flip():
    count = 90_000
    top, left, flip = crop_and_flip_parameters(random_draws(count, "basic", seed=1))
    for offset in (top, left):
        counts = offset.bincount(minlength=9)
        assert counts.shape == (9,)
        assert (counts - count / 9).abs().max() < 5 * math.sqrt(count / 9)
    pairs = (top * 9 + left).bincount(minlength=81)
    assert (pairs - count / 81).abs().max() < 5 * math.sqrt(count / 81)
    assert abs(flip.float().mean() - 0.5) < 5 * 0.5 / math.sqrt(count)


def test_distribution_of_colors_and_angle():
    count = 96_000
    draws = random_draws(count, "rich", seed=2)
    parameters = jitter_parameters(draws[:, 3:11])
    orders = (parameters.position * torch.tensor([1, 4, 16, 64])).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 24
    assert (orders - count / 24).abs().max() < 5 * math.sqrt(count / 24)

    ranges = [(0.8, 1.2)] * 3 + [(-0.1, 0.1), (-15.0, 15.0)]
    values = [*parameters[1:], draws[:, 11] * 30 - 15]
    for value, (low, high) in zip(values, ranges, strict=True):
        width = high - low
        assert value.min() >= low - 1e-6
        assert value.max() <= high + 1e-6
        share = ((value - low) / width * 10).long().clamp(0, 9).bincount(minlength=10)
        assert (share - count / 10).abs().max() < 5 * math.sqrt(count / 10)
        assert abs(value.double().mean() - (low + high) / 2) < 5 * width / math.sqrt(12 * count)
    correlations = torch.corrcoef(torch.stack(values))
    assert (correlations - torch.eye(5)).abs().max() < 5 / math.sqrt(count)


def test_the_largest_draw_stays_in_range():
    largest = torch.full((2, 12), 1 - 2**-24)
    assert crop_and_flip_parameters(largest[:, :3]).top.tolist() == [8, 8]
    # equal draws, too, give an order: each turn once
    assert jitter_parameters(largest[:, 3:11]).position.tolist() == [[0, 1, 2, 3]] * 2


def test_unknown_name_is_rejected():
    with pytest.raises(ValueError, match=r"augmentation='heavy'.*none, basic, alternating, rich, resized_crop"):
        num_draws("heavy")
    with pytest.raises(ValueError, match=r"augmentation='heavy'.*none, basic, alternating, rich, resized_crop"):
        augment(random_pixels(1, 32), torch.rand(1, 0), "heavy")


def test_draws_of_another_shape_are_rejected():
    with pytest.raises(ValueError, match=r"draws has shape \(4, 3\); augmentation='rich' needs \(4, 12\)"):
        augment(random_pixels(4, 32), torch.rand(4, 3), "rich")
