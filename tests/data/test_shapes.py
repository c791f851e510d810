"""Generated shapes: the masks against plain geometry, and that nothing but the form tells the class."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cbam_pl.data.images import Images
from cbam_pl.data.shapes import CLASSES, _cover, load_shapes, make_shapes

# The corners of the polygons in their own frames, written out apart from the formulas in shapes.py.
CORNERS = {
    "square": [(0.7, 0.7), (-0.7, 0.7), (-0.7, -0.7), (0.7, -0.7)],
    "triangle": [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in (90, 210, 330)],
    "cross": [
        *[(0.95, -0.27), (0.95, 0.27), (0.27, 0.27), (0.27, 0.95), (-0.27, 0.95), (-0.27, 0.27)],
        *[(-0.95, 0.27), (-0.95, -0.27), (-0.27, -0.27), (-0.27, -0.95), (0.27, -0.95), (0.27, -0.27)],
    ],
    "star": [
        (r * math.cos(math.radians(36 * i)), r * math.sin(math.radians(36 * i))) for i, r in enumerate([1, 0.42] * 5)
    ],
    "bar": [(0.95, 0.28), (-0.95, 0.28), (-0.95, -0.28), (0.95, -0.28)],
    "hourglass": [(0.68, 0.8), (-0.68, 0.8), (-0.08, 0), (-0.68, -0.8), (0.68, -0.8), (0.08, 0)],
}

THIRDS = (1 / 6, 3 / 6, 5 / 6)  # where the samples of a pixel lie, on each axis


@pytest.fixture(scope="module")
def train() -> Images:
    return make_shapes(2_000, seed=1)


@pytest.fixture(scope="module")
def test() -> Images:
    return make_shapes(500, seed=2)


def polygon_area(corners: list[tuple[float, float]]) -> float:
    pairs = zip(corners, corners[1:] + corners[:1], strict=True)
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs)) / 2


def in_polygon(x: float, y: float, corners: list[tuple[float, float]]) -> bool:
    """Whether a ray from the point to the right crosses the outline an odd number of times."""
    inside = False
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            inside = not inside
    return inside


def cover(name: str, centre: tuple[float, float], area: float, angle: float) -> torch.Tensor:
    label = torch.tensor([CLASSES.index(name)])
    return _cover(label, torch.tensor([centre]), torch.tensor([area]), torch.tensor([angle]), 32)[0, 0]


@pytest.mark.parametrize("name", list(CORNERS))
def test_polygon_covers_the_samples_inside_its_corners(name: str) -> None:
    centre, area, angle = (14.3, 17.1), 150.0, 0.6
    radius = math.sqrt(area / polygon_area(CORNERS[name]))
    corners = [
        (
            centre[0] + radius * (u * math.cos(angle) - v * math.sin(angle)),
            centre[1] + radius * (u * math.sin(angle) + v * math.cos(angle)),
        )
        for u, v in CORNERS[name]
    ]
    covered = cover(name, centre, area, angle)
    wrong = 0
    for row in range(32):
        for column in range(32):
            samples = [in_polygon(column + dx, row + dy, corners) for dx in THIRDS for dy in THIRDS]
            wrong += abs(round(9 * covered[row, column].item()) - sum(samples))
    assert wrong <= 2  # two of 9216 samples, which may lie on the very edge


def test_disc_and_ring_cover_the_samples_within_their_radii() -> None:
    disc, ring = cover("disc", (15.2, 16.9), 120.0, 0.0), cover("ring", (15.2, 16.9), 120.0, 0.0)
    disc_radius = math.sqrt(120 / math.pi)
    outer = math.sqrt(120 / math.pi / (1 - 0.55**2))
    for row in range(32):
        for column in range(32):
            distances = [math.dist((column + dx, row + dy), (15.2, 16.9)) for dx in THIRDS for dy in THIRDS]
            in_disc = sum(d < disc_radius for d in distances)
            in_ring = sum(0.55 * outer < d < outer for d in distances)
            assert disc[row, column].item() == pytest.approx(in_disc / 9)
            assert ring[row, column].item() == pytest.approx(in_ring / 9)


@pytest.mark.parametrize("name", CLASSES)
def test_area_is_the_one_asked_for(name: str) -> None:
    for angle in (0.3, 1.1, 2.0):
        assert cover(name, (16.2, 15.7), 140.0, angle).sum().item() == pytest.approx(140, rel=0.04)


def test_colour_is_even_inside_the_mask_and_stands_out(train: Images) -> None:
    assert train.masks is not None
    masks = train.masks.float()
    pixels = train.pixels.float()
    core = (F.avg_pool2d(masks, 3, 1, 1) == 1).float()  # mask pixels with nine mask pixels around: no edge
    around = (F.max_pool2d(masks, 7, 1, 3) - F.max_pool2d(masks, 3, 1, 1)).clamp(min=0)  # a seam, edge left out
    colour = (pixels * core).sum((2, 3), keepdim=True) / core.sum((2, 3), keepdim=True)
    spread = ((pixels - colour) ** 2 * core).sum((1, 2, 3)) / core.sum((1, 2, 3)) / 3
    assert spread.sqrt().max() < 0.045 * 255  # noise of at most 0.03 on pixels in 0..1
    outside = (pixels * around).sum((2, 3), keepdim=True) / around.sum((2, 3), keepdim=True)
    contrast = (colour - outside).mean((1, 2, 3)).abs() / 255
    assert contrast.median() > 0.3
    assert contrast.quantile(0.01) > 0.15


def test_masks_have_the_size_of_the_object(train: Images) -> None:
    assert train.masks is not None
    assert train.masks.dtype == torch.bool
    area = train.masks.sum((1, 2, 3)).float()
    assert area.min() > 85
    assert area.max() < 240
    for label in range(10):
        assert area[train.labels == label].mean().item() == pytest.approx(155, rel=0.08)


def fit_softmax(x: np.ndarray, y: np.ndarray, steps: int, rate: float) -> np.ndarray:
    """Multinomial logistic regression by plain gradient descent with momentum."""
    weight = np.zeros((x.shape[1], 10), np.float32)
    velocity = np.zeros_like(weight)
    for _ in range(steps):
        scores = x @ weight
        shares = np.exp(scores - scores.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        velocity = 0.9 * velocity - rate * x.T @ (shares - np.eye(10, dtype=np.float32)[y]) / len(x)
        weight += velocity
    return weight


def accuracies(train: np.ndarray, test: np.ndarray, labels: tuple[np.ndarray, np.ndarray], rate: float) -> tuple:
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    x, t = (np.c_[(part - mean) / deviation, np.ones(len(part))].astype(np.float32) for part in (train, test))
    weight = fit_softmax(x, labels[0], 60, rate)
    return ((x @ weight).argmax(1) == labels[0]).mean(), ((t @ weight).argmax(1) == labels[1]).mean()


def test_a_linear_classifier_of_the_pixels_fails(train: Images, test: Images) -> None:
    labels = (train.labels.numpy(), test.labels.numpy())
    flat = [images.pixels.flatten(1).numpy() / np.float32(255) for images in (train, test)]
    on_train, on_test = accuracies(flat[0], flat[1], labels, rate=0.01)
    assert on_train > 0.5  # it does learn, by heart
    assert on_test < 0.25


def test_colour_place_and_area_do_not_tell_the_class(train: Images, test: Images) -> None:
    def describe(images: Images) -> dict[str, np.ndarray]:
        assert images.masks is not None
        pixels, masks = images.pixels.double(), images.masks.double()
        area = masks.sum((2, 3))  # (N, 1)
        steps = torch.arange(32).double()
        x, y = (masks.sum(2) @ steps / area), (masks.sum(3) @ steps / area)  # (N, 1)
        features = {
            "mean colour": pixels.mean((2, 3)),
            "object colour": (pixels * masks).sum((2, 3)) / area,
            "place": torch.cat([x, y, x**2, y**2], 1),
            "area": torch.cat([area, area**2], 1),
        }
        return {name: value.numpy() for name, value in features.items()}

    labels = (train.labels.numpy(), test.labels.numpy())
    on_train, on_test = describe(train), describe(test)
    for name in on_train:
        assert accuracies(on_train[name], on_test[name], labels, rate=0.1)[1] < 0.2, name


@pytest.mark.parametrize("num_images", [1, 10, 205, 1_003])
def test_classes_are_balanced_and_shuffled(num_images: int) -> None:
    labels = make_shapes(num_images, seed=0, image_size=8).labels
    counts = torch.bincount(labels, minlength=10)
    assert counts.sum() == num_images
    assert counts.max() - counts.min() <= 1
    if num_images > 100:
        assert not torch.equal(labels, torch.arange(num_images) % 10)


def test_arguments_alone_decide_and_the_global_state_stays() -> None:
    torch.manual_seed(5)
    before, num_threads = torch.random.get_rng_state(), torch.get_num_threads()
    first = make_shapes(250, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == num_threads
    torch.manual_seed(6)
    again, other = make_shapes(250, seed=3), make_shapes(250, seed=4)
    assert first.masks is not None
    assert again.masks is not None
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.labels, other.labels)
    assert (first.pixels != other.pixels).float().mean() > 0.9


def test_train_and_test_of_all_seeds_differ() -> None:
    sources = [load_shapes(seed, num_train=20, num_test=10) for seed in (0, 1, 2)]
    images = [part.pixels[:10].flatten(1) for source in sources for part in (source.train, source.test)]
    every = torch.cat(images)
    assert len(every.unique(dim=0)) == len(every) == 60
    assert sources[0].classes == CLASSES
    assert len(CLASSES) == len(set(CLASSES)) == 10
    assert (len(sources[0].train), len(sources[0].test), sources[0].val) == (20, 10, None)


def test_a_larger_image_shows_the_same_at_a_larger_scale(train: Images) -> None:
    large = make_shapes(200, seed=1, image_size=64)
    assert large.pixels.shape == (200, 3, 64, 64)
    assert large.pixels.dtype == torch.uint8
    assert large.masks is not None
    assert train.masks is not None
    assert large.masks.float().mean().item() == pytest.approx(train.masks.float().mean().item(), rel=0.05)
    assert _spread(large.masks) == pytest.approx(2 * _spread(train.masks), rel=0.2)


def _spread(masks: Tensor) -> float:
    """Standard deviation of the objects' centres over the images (N, 1, H, W), in pixels."""
    steps = torch.arange(masks.shape[-1]) + 0.5
    weights = masks.squeeze(1).double()  # (N, H, W)
    x = (weights.sum(1) * steps).sum(1) / weights.sum((1, 2))
    return x.std().item()
