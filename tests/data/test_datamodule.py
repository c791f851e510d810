import shutil

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from cbam_pl.data.cifar import load_cifar
from cbam_pl.data.datamodule import (
    ImageDataModule,
    as_trained,
    channel_statistics,
    images_digest,
    may_have_seen,
    stratified_split,
)
from cbam_pl.data.folder import decode
from cbam_pl.data.images import Images
from cbam_pl.errors import UserError
from tests.helpers import COLOURS, REPOSITORY

CLASSES = ["cat", "dog", "emu"]


def test_statistics_are_those_of_all_pixels():
    pixels = torch.randint(0, 256, (7, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(Images(pixels, torch.zeros(7, dtype=torch.int64)))
    values = pixels.numpy().astype(np.float64) / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(values.std((0, 2, 3)).tolist())


def test_weights_may_have_seen_what_another_split_of_the_same_images_holds_out():
    data = ImageDataModule("shapes")  # of 10,000 images to train on
    data.setup()
    here = {"dataset": "shapes", "root": "data", "seed": 0, "val_size": 1000}
    for trained, seen in (
        (here, False),
        ({}, False),
        (here | {"val_size": None}, False),  # the same tenth
        (here | {"dataset": "cifar100", "seed": 1}, False),
        (here | {"seed": 1, "root": "elsewhere"}, True),
        (here | {"val_size": 200}, True),
        (here | {"val_size": 0}, True),
    ):
        assert may_have_seen(trained, data) == seen, trained
    data = ImageDataModule("shapes", val_size=0)
    data.setup("test")
    assert not may_have_seen(here, data)  # which validates on the test images


def test_weights_may_have_seen_the_images_of_a_folder_that_has_changed_or_moved(image_folder, tmp_path):
    def known(data):
        return dict(data.hparams) | {"train_ids": data.images("train").ids, "classes": data.classes}

    trained = prepared(image_folder)
    assert not may_have_seen(known(trained), trained)
    moved = shutil.copytree(image_folder, tmp_path / "moved", ignore=shutil.ignore_patterns(".*"))
    assert not may_have_seen(known(trained), prepared(moved))
    assert may_have_seen(known(trained), prepared(moved, seed=1))
    shutil.copy(moved / "test/red/0.png", moved / "train/red/new.png")
    assert may_have_seen(known(trained), prepared(moved))
    shutil.copytree(moved / "test", moved / "val")
    assert not may_have_seen(known(trained), prepared(moved, val_size=None))
    earlier = dict(trained.hparams)  # of a version that did not note the images
    assert may_have_seen(earlier, prepared(image_folder, seed=1))
    assert not may_have_seen(earlier, prepared(moved, seed=1, val_size=None))
    own_val = earlier | {"root": f"{moved}/../moved"}
    assert not may_have_seen(own_val, prepared(moved, seed=1, val_size=None)), "which the seed does not change"
    shutil.rmtree(moved / "val")
    assert may_have_seen(own_val, prepared(moved, seed=1))
    other = known(prepared(moved)) | {"classes": ["another", *COLOURS]}  # whose images have other ids
    assert may_have_seen(other, prepared(moved, seed=1))


def test_copies_of_trained_images_are_not_held_out(image_folder, tmp_path):
    root = shutil.copytree(image_folder, tmp_path / "twice", ignore=shutil.ignore_patterns(".*"))
    for path in [*(root / "train").glob("*/*.png")]:
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    before = prepared(root)
    shutil.copy(root / "test/red/0.png", root / "train/red/new.png")
    after = prepared(root)
    with pytest.warns(UserWarning, match="1 added, 0 removed"):
        after.load_state_dict(before.state_dict())
    assert not torch.isin(after.images("val").ids, before.images("train").ids).any()
    assert len(after.images("val")) > 0


def test_a_root_may_be_a_path(image_folder):
    assert ImageDataModule("folder", image_folder).hparams["root"] == str(image_folder)


def test_whole_images_stay_whole_where_a_folder_takes_the_place_of_other_data():
    settings = {"dataset": "cifar10", "augmentation": "resized_crop", "crop_scale": 0.5}
    merged = as_trained({"datamodule_hyper_parameters": settings}, {"dataset": "folder", "root": "images"})
    assert merged == {"dataset": "folder", "root": "images", "augmentation": "none", "crop_scale": None}
    folder = settings | {"dataset": "folder"}
    assert as_trained({"datamodule_hyper_parameters": folder}, {"root": "x"}) == folder | {"root": "x"}


def test_a_split_holds_out_the_same_fraction_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[
        torch.randperm(100, generator=torch.Generator().manual_seed(1))
    ]
    train, val = stratified_split(labels, 10, 0, CLASSES)
    assert torch.bincount(labels[val]).tolist() == [5, 3, 2]
    assert torch.cat([train, val]).sort().values.tolist() == list(range(100))


def test_a_split_that_does_not_divide_has_the_asked_size():
    labels = torch.arange(33) % 3
    _, val = stratified_split(labels, 10, 0, CLASSES)
    assert sorted(torch.bincount(labels[val]).tolist()) == [3, 3, 4]


def test_a_split_depends_on_the_seed_alone():
    labels = torch.arange(60) % 3
    again = [stratified_split(labels, 12, seed, CLASSES)[1].tolist() for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_a_class_keeps_its_last_training_image():
    labels = torch.tensor([0] * 20 + [1] * 20 + [2])
    _, val = stratified_split(labels, 5, 0, CLASSES)  # remainders 18/41, 18/41 and 5/41
    assert torch.bincount(labels[val], minlength=3).tolist() == [3, 2, 0]
    labels = torch.tensor([0] * 20 + [1] * 19 + [2])
    train, _ = stratified_split(labels, 37, 0, CLASSES)  # remainders 20/40, 23/40 and 37/40
    assert torch.bincount(labels[train]).tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"data\.val_size=2 leaves no training image of the class cat, which has 1"):
        stratified_split(torch.arange(3), 2, 0, CLASSES)


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
    x, expected = (images[images.sum((1, 2, 3)).argsort()] for images in (x, expected))  # without their order
    assert torch.allclose(x, expected, atol=1e-5)
    assert (data.mean, data.std) == channel_statistics(data.images("train"))


@pytest.mark.slow  # and with CIFAR at hand
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifars_statistics_are_those_of_its_training_images(dataset):
    data = ImageDataModule(dataset, root=str(REPOSITORY / "data"))
    if not data.is_at_hand():
        pytest.skip("CIFAR is not at hand")
    computed = channel_statistics(load_cifar(dataset, data.root).train)
    assert [[round(value, 4) for value in values] for values in computed] == [data.mean, data.std]


def test_a_val_folder_is_used_and_not_split_again(image_folder, tmp_path):
    root = shutil.copytree(image_folder, tmp_path / "images", ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(root / "test", root / "val")
    data = ImageDataModule("folder", str(root))
    data.setup()
    assert [len(data.images(split)) for split in ("train", "val", "test")] == [93, 21, 21]
    for stage in ("fit", "test"):
        with pytest.raises(UserError, match="has its own val folder"):
            ImageDataModule("folder", str(root), val_size=5).setup(stage)
    with pytest.raises(UserError, match="has its own val folder"):
        ImageDataModule("folder", str(root), val_size=5).setup()


def test_val_size_zero_is_the_test_split(image_folder):
    data = ImageDataModule("folder", str(image_folder), val_size=0)
    with pytest.warns(UserWarning, match="selected on the test set"):
        data.setup("fit")
    assert len(data.images("train")) == 93
    assert torch.equal(data.images("val").pixels, data.images("test").pixels)


def test_a_checkpoint_brings_its_normalisation_and_rejects_other_classes(image_folder):
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
        ({"val_size": 0.1}, "val_size=0.1 must be a whole number"),
        ({"dataset": "shapes", "image_size": 4}, "image_size=4 must be at least 8"),
        ({"image_size": 64}, "image_size=64 does not fit"),
        ({"crop_scale": 0.5}, "crop_scale=0.5 needs augmentation=resized_crop, not basic"),
        ({"augmentation": "resized_crop", "crop_scale": 0.0}, "crop_scale=0.0 must be greater than 0 and at most 1"),
        ({"augmentation": "resized_crop", "crop_scale": 1.5}, "crop_scale=1.5 must be greater than 0 and at most 1"),
        ({"augmentation": "resized_crop", "crop_scale": float("nan")}, "crop_scale=nan must be"),
        ({"normalisation": "mnist"}, "normalisation='mnist' is unknown; use one of data, imagenet"),
    ],
)
def test_settings_out_of_range_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**options)


def test_too_large_a_val_size_is_rejected(image_folder):
    with pytest.raises(UserError, match="val_size=93 leaves nothing to train on; there are 93"):
        ImageDataModule("folder", str(image_folder), val_size=93).setup()


# ------------------------------------------------------------------------------------------------ resized crops


def test_resized_crop_trains_on_crops_and_evaluates_the_middle_of_a_folders_images(image_folder):
    data = prepared(image_folder, augmentation="resized_crop", image_size=56, batch_size=50, crop_scale=0.3)
    plain = prepared(image_folder, image_size=56)
    assert data.images("train").store.shape[2:] == (64, 64)
    assert (data.mean, data.std) == channel_statistics(data.images("train"))
    for split in ("train", "val"):
        assert torch.equal(data.images(split).ids, plain.images(split).ids)
    val, test = data.images("val"), data.images("test")
    assert val.pixels.shape == (9, 3, 56, 56)
    paths = sorted(image_folder.glob("test/*/*.png"))
    expected = torch.stack([decode(path, 56, in_proportion=True) for path in paths])
    assert torch.equal(test.pixels, expected)
    x = torch.cat([images for images, _ in data.test_dataloader()])
    expected = (expected / 255 - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    x, expected = (images[images.sum((1, 2, 3)).argsort()] for images in (x, expected))  # without their order
    assert torch.allclose(x, expected, atol=1e-5)
    loader = data.train_dataloader()
    assert (loader.image_size, loader.crop_scale) == (56, 0.3)
    assert [len(images) for images, _ in loader] == [50, 34]
    assert {images.shape[1:] for images, _ in loader} == {(3, 56, 56)}


def test_resized_crop_cuts_other_data_from_the_image_itself():
    data = ImageDataModule("shapes", augmentation="resized_crop", batch_size=4)
    data.setup()
    assert data.images("train").store.shape[2:] == (32, 32)
    assert data.images("val").pixels.shape[2:] == (32, 32)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 32, 32)


def test_imagenets_normalisation_takes_the_place_of_any_other(image_folder):
    expected = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert (ImageDataModule("cifar10", normalisation="imagenet").mean, expected[1]) == expected
    data = prepared(image_folder, normalisation="imagenet")
    assert (data.mean, data.std) == expected
    state = data.state_dict()
    assert (state["mean"], state["std"]) == expected


# ------------------------------------------------------------------------------- a folder that changed since


def prepared(root, **options):
    data = ImageDataModule("folder", str(root), **options)
    data.setup()
    return data


def pixels_of(data, split):
    return {pixels.numpy().tobytes() for pixels in data.images(split).pixels}


@pytest.fixture
def trained(image_folder, tmp_path):
    """A copy of the folder with an image added, one held-out image removed, and the state of the run before."""
    root = shutil.copytree(image_folder, tmp_path / "images", ignore=shutil.ignore_patterns(".*"))
    before = prepared(root)
    held_out = before.images("val").pixels[0]
    gone = next(path for path in root.glob("train/*/*.png") if torch.equal(decode(path, 32), held_out))
    gone.unlink()
    for name in ("blue", "red"):  # the first in order, so that a split by position would be another
        shutil.copy(root / "test" / name / "0.png", root / "train" / name / "-.png")
    return root, before


@pytest.mark.parametrize("set_up_first", [True, False])
def test_held_out_images_stay_held_out_where_the_folder_changed(trained, set_up_first):
    root, before = trained
    data = ImageDataModule("folder", str(root))
    if set_up_first:
        data.setup()
        assert pixels_of(data, "val") & pixels_of(before, "train")  # what this prevents
    message = r"\(2 added, 1 removed\); the 8 of 9 held-out images that are left stay held out, all others count as"
    if set_up_first:
        with pytest.warns(UserWarning, match=message):
            data.load_state_dict(before.state_dict())
    else:
        data.load_state_dict(before.state_dict())
        with pytest.warns(UserWarning, match=message):
            data.setup("test")
    assert pixels_of(data, "val") < pixels_of(before, "val")
    assert [len(data.images(split)) for split in ("train", "val", "test")] == [86, 8, 21]


def test_the_split_of_an_unchanged_folder_and_of_an_older_checkpoint_is_that_of_the_seed(trained):
    root, before = trained
    state = before.state_dict()
    data = prepared(root)
    data.load_state_dict({name: state[name] for name in ("classes", "mean", "std")})
    assert pixels_of(data, "val") == pixels_of(prepared(root), "val")
    again = prepared(root)
    again.load_state_dict(data.state_dict())
    assert torch.equal(again.images("val").pixels, data.images("val").pixels)
    assert torch.equal(again.images("train").pixels, data.images("train").pixels)


def test_the_digest_of_a_folders_images_depends_on_them_and_not_on_their_split(image_folder, tmp_path):
    def digest(data):
        return images_digest(data.images("train").ids, data.images("val").ids)

    first, other = (prepared(image_folder, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.images("val").ids, other.images("val").ids)
    assert digest(first) == digest(other)
    moved = shutil.copytree(image_folder, tmp_path / "moved", ignore=shutil.ignore_patterns(".*"))
    assert digest(prepared(moved)) == digest(first)
    shutil.copy(moved / "test/red/0.png", moved / "train/red/new.png")
    assert digest(prepared(moved)) != digest(first)
    assert images_digest(None, None) is None


def test_none_of_the_held_out_images_is_left(image_folder):
    before = prepared(image_folder, val_size=3)
    state = {**before.state_dict(), "val_ids": torch.arange(3)}
    with pytest.raises(UserError, match=r"\(3 added, 3 removed\), and none of the held-out images is left"):
        prepared(image_folder, val_size=3).load_state_dict(state)


# ---------------------------------------------------------------------------------------- epochs that are cut short


def test_a_constant_channel_is_not_divided_by_zero(tmp_path):
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    pixels[:2, 1] = 255
    mean, std = channel_statistics(Images(pixels, torch.zeros(4, dtype=torch.int64)))
    assert mean == pytest.approx([0, 0.5, 0])
    assert std == pytest.approx([1, 0.5, 1])


def test_each_process_needs_an_image_of_each_split(image_folder):
    data = ImageDataModule("folder", str(image_folder))
    data.setup()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.trainer = trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer), "world_size", 100)
        names = {"training": data.train_dataloader, "validation": data.val_dataloader, "test": data.test_dataloader}
        for name, loader in names.items():
            with pytest.raises(UserError, match=rf"^\d+ {name} images are fewer than the 100 processes; use fewer$"):
                loader()
        with pytest.raises(UserError, match="21 test images are fewer"):
            data.changed_test_dataloader(lambda pixels, indices: pixels)


class Recorder(LightningModule):
    """Keeps the images of each training batch, by epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {}

    def training_step(self, batch):
        self.seen.setdefault(self.current_epoch, []).append(batch[0])
        return self.weight * batch[0].sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(root, ckpt_path=None, augmentation="rich", **options):
    """The batches of two epochs."""
    recorder = Recorder()
    data = ImageDataModule("folder", str(root), batch_size=16, augmentation=augmentation)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **options}
    trainer = Trainer(max_epochs=2, accelerator="cpu", enable_checkpointing="callbacks" in options, **options)
    trainer.fit(recorder, data, ckpt_path=ckpt_path, weights_only=True)
    return list(recorder.seen.values())


def batches_of_epoch(root, epoch, augmentation="rich"):
    data = ImageDataModule("folder", str(root), batch_size=16, augmentation=augmentation)
    data.setup()
    loader = data.train_dataloader()
    loader.current_epoch = lambda: epoch
    return [images for images, _ in loader]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("option", "epochs"), [({"limit_train_batches": 2}, (0, 1)), ({"overfit_batches": 2}, (0, 0)), ({}, (0, 1))]
)
def test_each_epoch_starts_at_its_first_batch(image_folder, option, epochs):
    seen = fit(image_folder, **option)
    for batches, epoch in zip(seen, epochs, strict=True):
        expected = batches_of_epoch(image_folder, epoch)[: 2 if option else None]
        assert len(batches) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(batches, expected, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("augmentation", ["rich", "resized_crop"])
def test_training_resumes_at_the_next_batch_and_only_on_the_same_images(image_folder, tmp_path, augmentation):
    root = shutil.copytree(image_folder, tmp_path / "images", ignore=shutil.ignore_patterns(".*"))
    fit(
        root,
        augmentation=augmentation,
        callbacks=ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1),
    )
    for step in (2, 6, 8):  # in the first epoch, after it, in the second one
        seen = fit(root, tmp_path / f"step={step}.ckpt", augmentation)
        resumed = [images for batches in seen for images in batches]
        expected = [images for epoch in (0, 1) for images in batches_of_epoch(root, epoch, augmentation)][step:]
        assert all(torch.equal(*pair) for pair in zip(resumed, expected, strict=True))
    (root / "train" / "red" / "0.png").unlink()
    with pytest.raises(UserError, match=r"are not those of the checkpoint \(0 added, 1 removed\), so training cannot"):
        fit(root, tmp_path / "step=2.ckpt", augmentation)


def test_each_iteration_of_a_loop_without_a_trainer_is_the_next_epoch(image_folder):
    data = ImageDataModule("folder", str(image_folder), batch_size=16, augmentation="rich")
    data.setup()
    loader = data.train_dataloader()
    for epoch in range(3):
        for images, expected in zip(loader, batches_of_epoch(image_folder, epoch), strict=True):
            assert torch.equal(images[0], expected)
