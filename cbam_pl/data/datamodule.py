"""The LightningDataModule: a data source, its validation split and normalisation, and batches for every stage."""

from typing import Any, Literal, get_args

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cbam_pl.data.augmentation import Augmentation
from cbam_pl.data.cifar import download_cifar, load_cifar
from cbam_pl.data.folder import count_training_images, list_classes, load_folder
from cbam_pl.data.images import Images, Source
from cbam_pl.data.loader import EvaluationLoader, Normalise, Share, TrainingLoader
from cbam_pl.data.shapes import CLASSES as SHAPES
from cbam_pl.data.shapes import load_shapes
from cbam_pl.errors import UserError
from cbam_pl.seeds import derive_seed

_MAX_BATCH_SIZE = 1_000_000
_MAX_IMAGE_SIZE = 512  # the linear layer of the cnn has then 268 million weights

Dataset = Literal["cifar10", "cifar100", "folder", "shapes"]

# Of the 50,000 training images. The widely copied std 0.2023 0.1994 0.2010 is wrong: it averages each image's own.
_STATISTICS = {
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([0.5074, 0.4867, 0.4411], [0.2675, 0.2565, 0.2761]),
}
_NUM_TRAINING = {"cifar10": 50_000, "cifar100": 50_000, "shapes": 10_000}
_NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "shapes": len(SHAPES)}


def channel_statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel. Pixels (N, 3, H, W) uint8 → two lists of 3, for images in [0, 1]."""
    # From the counts of the 256 values: exact, and without a float copy of the images.
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        weights = torch.bincount(pixels[:, channel].flatten(), minlength=256).double()
        weights /= weights.sum()
        mean.append(float((weights * values).sum()))
        std.append(float((weights * (values - mean[-1]) ** 2).sum().sqrt()))
    return mean, std


def stratified_split(labels: Tensor, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out `val_size` images, from every class its share.

    Args:
        labels: (N,) int64.
        val_size: images to hold out.
        seed: what the choice depends on, besides the labels.

    Returns:
        Indices of the training and of the validation images, each in ascending order.
    """
    generator = torch.Generator().manual_seed(derive_seed("split", seed))
    counts = torch.bincount(labels)
    shares = counts * val_size // len(labels)
    # Largest remainders get the images that whole shares leave over.
    remainders = counts * val_size % len(labels)
    shares[remainders.argsort(descending=True, stable=True)[: val_size - int(shares.sum())]] += 1
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        members = (labels == label).nonzero()[:, 0]
        held_out[members[torch.randperm(len(members), generator=generator)[:share]]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


class ImageDataModule(LightningDataModule):
    """Images of one source, all in memory, as augmented and normalised batches.

    Args:
        dataset: cifar10 or cifar100 (downloaded on first use), folder (images of your own: root/train/CLASS/* and
            root/test/CLASS/*), or shapes (generated, no files).
        root: folder of the images, or where CIFAR is kept.
        batch_size: images per step and device.
        val_size: images held out of training for validation, the same share of every class; by default a tenth of
            them, or the folder's own val; 0 validates on the test split, so that the best epoch is chosen on it.
        augmentation: none, basic (crop, flip), alternating (the same, but a mirrored border around the crop, and a flip
            in every other epoch) or rich (crop, flip, colour jitter, rotation).
        image_size: height and width of the images in pixels; folder resizes to it, shapes draws at it.
        seed: what the validation split, the order, the augmentation and the shapes depend on.

    Raises:
        ValueError: a setting out of its range.
        UserError: the data cannot be read.
    """

    def __init__(
        self,
        dataset: Dataset = "cifar10",
        root: str = "data",
        batch_size: int = 64,
        val_size: int | None = None,
        augmentation: Augmentation = "basic",
        image_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dataset not in get_args(Dataset):
            raise ValueError(f"dataset={dataset!r} is unknown; use one of {', '.join(get_args(Dataset))}")
        if augmentation not in get_args(Augmentation):
            known = ", ".join(get_args(Augmentation))
            raise ValueError(f"augmentation={augmentation!r} is unknown; use one of {known}")
        if not 1 <= batch_size <= _MAX_BATCH_SIZE:
            raise ValueError(f"batch_size={batch_size} must be at least 1 and at most {_MAX_BATCH_SIZE:,}")
        if val_size is not None and val_size < 0:
            raise ValueError(f"val_size={val_size} must be at least 0")
        if not 8 <= image_size <= _MAX_IMAGE_SIZE:
            raise ValueError(f"image_size={image_size} must be at least 8 and at most {_MAX_IMAGE_SIZE}")
        if dataset.startswith("cifar") and image_size != 32:
            raise ValueError(f"image_size={image_size} does not fit dataset={dataset}, whose images are 32×32")
        if val_size is not None and dataset in _NUM_TRAINING:
            _check_val_size(val_size, _NUM_TRAINING[dataset])
        self.save_hyperparameters()
        self.dataset = dataset
        self.root = root
        self.batch_size = batch_size
        self.val_size = val_size
        self.augmentation = augmentation
        self.image_size = image_size
        self.seed = seed
        self.classes: list[str] = []
        self.mean, self.std = _STATISTICS.get(dataset, ([], []))
        self._images: dict[str, Images] = {}  # stage → images

    @property
    def num_classes(self) -> int:
        """Number of classes, known before the images are read."""
        return len(list_classes(self.root)) if self.dataset == "folder" else _NUM_CLASSES[self.dataset]

    def prepare_data(self) -> None:
        """Download CIFAR where it is missing, or decode the folder into its cache; in one process alone."""
        if self._images:
            return
        if self.dataset == "cifar10" or self.dataset == "cifar100":
            download_cifar(self.dataset, self.root)
        elif self.dataset == "folder":
            if self.val_size is not None:
                _check_val_size(self.val_size, count_training_images(self.root))
            load_folder(self.root, self.image_size)
        elif self.image_size > 64:  # smaller ones take seconds
            print(f"drawing 12,000 shapes of {self.image_size}×{self.image_size}", flush=True)

    def _load(self) -> Source:
        if self.dataset == "folder":
            return load_folder(self.root, self.image_size)
        if self.dataset == "shapes":
            # The data set is one fixed thing; the seed decides what is made of it.
            return load_shapes(0, image_size=self.image_size)
        return load_cifar(self.dataset, self.root)

    def setup(self, stage: str | None = None) -> None:
        """Read the images, hold out those for validation, and take the statistics for normalisation."""
        if self._images:
            return
        source = self._load()
        train, val = source.train, source.val
        if self.val_size == 0:
            if stage in (None, "fit"):
                rank_zero_warn(
                    "data.val_size=0 validates on the test split: the best epoch, and with it the reported figure, "
                    "is selected on the test set"
                )
            val = source.test
        elif val is None or self.val_size is not None:
            if val is not None:
                raise UserError(
                    f"data.val_size={self.val_size}, but {self.root} brings its own val folder; leave val_size out"
                )
            val_size = len(train) // 10 if self.val_size is None else self.val_size
            _check_val_size(val_size, len(train))
            if val_size == 0:
                raise UserError(f"{len(train)} training images are too few to hold any out; set data.val_size")
            kept, held_out = stratified_split(train.labels, val_size, self.seed)
            train, val = train.subset(kept), train.subset(held_out)
        self._take_classes(source.classes, self.classes or source.classes)
        if not self.mean:
            self.mean, self.std = channel_statistics(train.pixels)
        self._images = {"train": train, "val": val, "test": source.test}

    def images(self, split: Literal["train", "val", "test"]) -> Images:
        """The images of a split, once `setup` has run."""
        return self._images[split]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to be used without the training images."""
        return {"classes": self.classes, "mean": self.mean, "std": self.std}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's normalisation.

        Raises:
            UserError: the checkpoint was trained on other classes.
        """
        self._take_classes(self.classes or state_dict["classes"], state_dict["classes"])
        self.mean, self.std = state_dict["mean"], state_dict["std"]

    def _take_classes(self, found: list[str], trained: list[str]) -> None:
        if found != trained:
            raise UserError(
                f"the checkpoint's classes ({_short(trained)}) are not those of the data ({_short(found)}); check "
                "data.dataset and data.root"
            )
        self.classes = found

    def _device_and_share(self) -> tuple[torch.device, Share]:
        if self.trainer is None:
            return torch.device("cpu"), Share()
        return self.trainer.strategy.root_device, Share(self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> TrainingLoader:
        """Shuffled, augmented batches of `batch_size`."""
        device, share = self._device_and_share()
        images = self._images["train"]
        if len(images) < share.world_size:
            raise UserError(f"{len(images)} training images are fewer than the {share.world_size} processes")
        return TrainingLoader(
            images,
            self.batch_size,
            self.augmentation,
            Normalise(self.mean, self.std, device),
            device,
            self.seed,
            lambda: self.trainer.current_epoch if self.trainer else 0,
            share,
        )

    def _evaluation_loader(self, split: str) -> EvaluationLoader:
        device, share = self._device_and_share()
        # Without gradients four times as many images need less memory than a training step.
        return EvaluationLoader(
            self._images[split], 4 * self.batch_size, Normalise(self.mean, self.std, device), device, share
        )

    def val_dataloader(self) -> EvaluationLoader:
        """Every validation image once."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> EvaluationLoader:
        """Every test image once."""
        return self._evaluation_loader("test")


def _check_val_size(val_size: int, num_training: int) -> None:
    if val_size >= num_training:
        raise UserError(
            f"data.val_size={val_size} leaves nothing to train on; there are {num_training:,} training images"
        )


def _short(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown
