"""Each corruption against its slow version, and what an image's result depends on."""

import colorsys

import numpy as np
import pytest
import torch

from cbam_pl.data.corruption_parts import Draws
from cbam_pl.data.corruptions import COMMON, CORRUPTIONS, EXTRA, SEVERITIES, corrupt, spatter
from cbam_pl.errors import UserError
from cbam_pl.seeds import derive_seed
from tests.data import corruption_oracles

SEED = 5


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Three images (3, 3, 32, 32) uint8 like photographs: smooth, with edges, and with grey, black and white parts."""
    y, x = np.mgrid[:32, :32] / 31
    ramps = np.stack((x, y, 1 - x))
    stripes = (np.sin(9 * x + 5 * y) > 0) * np.array([0.9, 0.5, 0.2])[:, None, None] + 0.05
    grey = np.stack([np.where(x + y < 0.7, 0.0, np.where(y > 0.8, 1.0, (x + y) / 2))] * 3)
    noise = np.random.default_rng(0).normal(0, 0.05, (3, 3, 32, 32)) * np.array([1, 1, 0])[:, None, None, None]
    return torch.from_numpy(np.uint8(np.clip(np.stack((ramps, stripes, grey)) + noise, 0, 1) * 255))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_it_equals_the_slow_version(name, severity, images):
    indices = [7, 0, 9_999]
    result = corrupt(images, name, severity, indices, SEED)
    assert (result.dtype, result.shape) == (torch.uint8, images.shape)
    assert float((result != images).double().mean()) > 0.005
    _, constants = CORRUPTIONS[name]
    for image, ours, index in zip(images, result, indices, strict=True):
        generator = np.random.Generator(np.random.Philox(key=[derive_seed("corruption", SEED, name, severity), index]))
        slow = getattr(corruption_oracles, name)(image.permute(1, 2, 0).numpy(), generator, *constants[severity - 1])
        # The slow version rounds down in float64 too, but 17.0 may be 16.999999999 there.
        theirs = np.uint8(slow + 1e-4)
        difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01  # of float32, where a result is close to a whole number


def test_the_published_corruptions_are_all_there():
    assert len(COMMON) == 15
    assert list(EXTRA) == ["speckle_noise", "gaussian_blur", "spatter", "saturate"]
    assert all(len(constants) == 5 for _, constants in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_result_depends_on_seed_and_image_and_not_on_the_batch(name, images):
    pixels = images.repeat(3, 1, 1, 1)
    whole = corrupt(pixels, name, 3, range(9), SEED)
    for part in ([4], [8, 1], [2, 3, 7]):
        assert torch.equal(corrupt(pixels[part], name, 3, part, SEED), whole[part])
    is_random = name not in {
        *("defocus_blur", "zoom_blur", "gaussian_blur", "brightness", "saturate", "contrast", "pixelate"),
        "jpeg_compression",
    }
    assert (not torch.equal(whole[:3], whole[3:6])) == is_random  # the same pixels at another index
    assert (not torch.equal(corrupt(pixels, name, 3, range(9), SEED + 1), whole)) == is_random


def test_noise_has_the_published_strength():
    grey = torch.full((64, 3, 32, 32), 128, dtype=torch.uint8)

    def spread(name, severity):
        return float(corrupt(grey, name, severity, range(64)).double().std()) / 255

    mean = 128 / 255
    assert spread("gaussian_noise", 4) == pytest.approx(0.09, rel=0.01)
    assert spread("speckle_noise", 5) == pytest.approx(0.2 * mean, rel=0.01)
    assert spread("shot_noise", 3) == pytest.approx((mean / 100) ** 0.5, rel=0.01)
    noisy = corrupt(grey, "impulse_noise", 5, range(64))
    assert float((noisy == 0).double().mean()) == pytest.approx(0.035, rel=0.05)
    assert float((noisy == 255).double().mean()) == pytest.approx(0.035, rel=0.05)


def test_saturate_takes_grey_for_red_as_the_original_does():
    grey = torch.full((1, 3, 32, 32), 102, dtype=torch.uint8)
    expected = [int(255 * value + 1e-4) for value in colorsys.hsv_to_rgb(0, 0.2, 102 / 255)]
    assert corrupt(grey, "saturate", 5, [0])[0, :, 0, 0].tolist() == expected


def test_images_without_a_drop_stay_as_they_are(images):
    pixels = images / 255
    assert torch.equal(spatter(pixels, Draws(0, range(3)), 0.6, 0.1, 0.7, 2.0, 0.5, False), pixels)  # not 0 / 0


def test_other_sizes_are_rejected():
    with pytest.raises(UserError, match="are 64×64, and the severities are those of CIFAR-10-C"):
        corrupt(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "fog", 1, [0])
