import shutil

import numpy as np
import pytest
import torch

from cbam_pl.data.datamodule import ImageDataModule, channel_statistics, stratified_split
from cbam_pl.errors import UserError


def test_statistics_are_those_of_all_pixels():
    pixels = torch.randint(0, 256, (7, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(pixels)
    values = pixels.numpy().astype(np.float64) / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(values.std((0, 2, 3)).tolist())


def test_a_split_takes_from_every_class_its_share():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[
        torch.randperm(100, generator=torch.Generator().manual_seed(1))
    ]
    train, val = stratified_split(labels, 10, seed=0)
    assert torch.bincount(labels[val]).tolist() == [5, 3, 2]
    assert torch.cat([train, val]).sort().values.tolist() == list(range(100))


def test_a_split_that_does_not_divide_has_the_asked_size():
    labels = torch.arange(33) % 3
    _, val = stratified_split(labels, 10, seed=0)
    assert sorted(torch.bincount(labels[val]).tolist()) == [3, 3, 4]


def test_a_split_depends_on_the_seed_alone():
    labels = torch.arange(60) % 3
    again = [stratified_split(labels, 12, seed=seed)[1].tolist() for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_a_folder_is_split_and_normalised_by_its_training_images(image_folder):
    data = ImageDataModule("folder", str(image_folder), batch_size=8)
    data.prepare_data()
    data.setup()
    assert data.classes == ["blue", "green", "red"]
    assert data.num_classes == 3
    assert [len(data.images(split)) for split in ("train", "val", "test")] == [84, 9, 21]
    x = torch.cat([images for images, _ in ImageDataModule.val_dataloader(data)])
    pixels = data.images("val").pixels / 255
    expected = (pixels - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    assert torch.allclose(x, expected, atol=1e-5)
    assert (data.mean, data.std) == channel_statistics(data.images("train").pixels)


def test_cifar_has_its_published_statistics():
    assert ImageDataModule("cifar10").mean == [0.4914, 0.4822, 0.4465]
    assert ImageDataModule("cifar10").std == [0.2470, 0.2435, 0.2616]
    assert ImageDataModule("cifar100").mean == [0.5074, 0.4867, 0.4411]
    assert ImageDataModule("cifar100").std == [0.2675, 0.2565, 0.2761]


def test_a_val_folder_is_used_and_not_split_again(image_folder, tmp_path):
    root = shutil.copytree(image_folder, tmp_path / "images", ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(root / "test", root / "val")
    data = ImageDataModule("folder", str(root))
    data.setup()
    assert [len(data.images(split)) for split in ("train", "val", "test")] == [93, 21, 21]
    with pytest.raises(UserError, match="brings its own val folder"):
        ImageDataModule("folder", str(root), val_size=5).setup()


def test_val_size_zero_is_the_test_split(image_folder):
    data = ImageDataModule("folder", str(image_folder), val_size=0)
    with pytest.warns(UserWarning, match="selected on the test set"):
        data.setup("fit")
    assert len(data.images("train")) == 93
    assert torch.equal(data.images("val").pixels, data.images("test").pixels)


def test_a_checkpoint_brings_its_normalisation_and_refuses_other_classes(image_folder):
    data = ImageDataModule("folder", str(image_folder))
    data.load_state_dict({"classes": ["blue", "green", "red"], "mean": [0.1] * 3, "std": [0.2] * 3})
    data.setup("test")
    assert (data.mean, data.std) == ([0.1] * 3, [0.2] * 3)
    with pytest.raises(UserError, match=r"\(cat, dog\) are not those of the data \(blue, green, red\)"):
        data.load_state_dict({"classes": ["cat", "dog"], "mean": [], "std": []})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "mnist"}, "dataset='mnist' is unknown"),
        ({"augmentation": "wild"}, "augmentation='wild' is unknown"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"val_size": -1}, "val_size=-1 must be at least 0"),
        ({"dataset": "shapes", "image_size": 4}, "image_size=4 must be at least 8"),
        ({"image_size": 64}, "image_size=64 does not fit"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**options)


def test_too_large_a_val_size_is_refused(image_folder):
    with pytest.raises(UserError, match="val_size=93 leaves nothing to train on; there are 93"):
        ImageDataModule("folder", str(image_folder), val_size=93).setup()
