"""The LightningDataModule: a data source, its validation split and normalisation, and batches for every stage."""

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cbam_pl.data.augmentation import CROP_SCALE, Augmentation, num_draws
from cbam_pl.data.cifar import cifar_is_at_hand, load_cifar
from cbam_pl.data.folder import list_classes, load_folder, show
from cbam_pl.data.images import Images, Source
from cbam_pl.data.loader import EvaluationLoader, Normalise, Shard, TrainingLoader
from cbam_pl.data.shapes import CLASSES as SHAPES
from cbam_pl.data.shapes import load_shapes
from cbam_pl.errors import UserError
from cbam_pl.seeds import derive_seed

_CHUNK = 256  # images whose pixels are counted at once
_MAX_BATCH_SIZE = 1_000_000
_MAX_IMAGE_SIZE = 512  # the linear layer of the cnn has then 268 million weights

Dataset = Literal["cifar10", "cifar100", "folder", "shapes"]
Normalisation = Literal["data", "imagenet"]

# Of the 50,000 training images. The widely copied std 0.2023 0.1994 0.2010 is wrong: it averages each image's own.
_STATISTICS = {
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
}
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # what torchvision's weights were trained with
_NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "shapes": len(SHAPES)}


def channel_statistics(images: Images) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of all images in [0, 1], two lists of 3."""
    # From the counts of the 256 values: exact, and without a copy of all images, or of any as floats.
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for indices in torch.arange(len(images)).split(_CHUNK):
        for channel, values in enumerate(images.take(indices).unbind(1)):
            counts[channel] += torch.bincount(values.flatten(), minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for weights in counts.double():
        weights /= weights.sum()
        mean.append(float((weights * values).sum()))
        # A constant channel, as in images of one colour, is not divided by 0.
        std.append(float((weights * (values - mean[-1]) ** 2).sum().sqrt()) or 1.0)
    return mean, std


def stratified_split(labels: Tensor, val_size: int, seed: int, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Hold out `val_size` images, the same fraction of every class; each class keeps at least one for training.

    Labels (N,) and seed decide the choice. Gives the indices of the training and of the validation images, ascending.
    """
    generator = torch.Generator().manual_seed(derive_seed("split", seed))
    counts = torch.bincount(labels, minlength=len(classes))
    num_held_out = counts * val_size // len(labels)
    # The largest remainders get the images that rounding down leaves over, in classes that can spare one.
    remainders = torch.where(counts - num_held_out > 1, counts * val_size % len(labels), -1)
    chosen = remainders.argsort(descending=True, stable=True)[: val_size - int(num_held_out.sum())]
    for label in chosen[remainders[chosen] < 0].tolist():
        raise UserError(
            f"data.val_size={val_size} leaves no training image of the class {classes[label]}, which has "
            f"{int(counts[label])}; add images or lower data.val_size"
        )
    num_held_out[chosen] += 1
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, num in enumerate(num_held_out.tolist()):
        members = (labels == label).nonzero()[:, 0]
        held_out[members[torch.randperm(len(members), generator=generator)[:num]]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def whole_number(name: str, value: Any) -> int:
    """An argument as Python's own int, since a checkpoint with NumPy's could not be read again."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name}={value} must be a whole number") from error


def in_proportion(settings: Mapping[str, Any]) -> bool:
    """Whether images keep their proportions, by the arguments of the ImageDataModule that a network is trained with."""
    return settings.get("dataset") == "folder" and settings.get("augmentation") == "resized_crop"


def data_for_test(checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> "ImageDataModule":
    """The data of a checkpoint for its test images, without a split for validation, which other images may not allow.

    Args:
        checkpoint: its content.
        settings: arguments of the ImageDataModule in place of the checkpoint's.
    """
    data = ImageDataModule(**{**as_trained(checkpoint, settings), "val_size": 0})
    data.load_state_dict({name: checkpoint["ImageDataModule"][name] for name in ("classes", "mean", "std")})
    return data


def as_trained(checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the ImageDataModule: those that a checkpoint was trained with, and the settings in their place."""
    trained = checkpoint["datamodule_hyper_parameters"]
    merged = {**trained, **settings}
    if in_proportion(merged) and not in_proportion(trained):  # images of a folder, given to a network of whole ones
        merged |= {"augmentation": "none", "crop_scale": None}
    return merged


def images_digest(*parts: Tensor | None) -> str | None:
    """A text that changes with a folder's images, by the ids (N,) of its parts in any order; None of fixed data."""
    ids = [part for part in parts if part is not None]
    return hashlib.sha256(torch.cat(ids).sort().values.numpy().tobytes()).hexdigest()[:16] if ids else None


def may_have_seen(trained: Mapping[str, Any], here: "ImageDataModule") -> bool:
    """Whether weights may have been trained on images that are held out for validation here.

    Args:
        trained: arguments of the ImageDataModule that they were trained with, and of a folder `train_ids`, the ids of
            those images, which depend on the `classes`; empty where nothing is known.
        here: the data here, once `setup` has run.
    """
    if here.val_size == 0 or trained.get("dataset") != here.dataset:
        return False
    train, val = (here.images(split) for split in ("train", "val"))
    if val.ids is not None and "train_ids" in trained and trained["classes"] == here.classes:
        return bool(torch.isin(val.ids, trained["train_ids"]).any())
    if here.dataset == "folder":  # as earlier versions left it, which did not note the images
        roots = [Path(str(root)).expanduser().resolve() for root in (trained.get("root"), here.root)]
        if roots[0] != roots[1] or (here.val_size is None and (roots[1] / "val").is_dir()):
            return False
    tenth = (len(train) + len(val)) // 10
    sizes = [tenth if size is None else size for size in (trained.get("val_size"), here.val_size)]
    return trained.get("seed") != here.seed or sizes[0] != sizes[1]


class ImageDataModule(LightningDataModule):
    """Images of one source, in memory or mapped from a folder's cache, as augmented and normalised batches.

    Args:
        dataset: cifar10 or cifar100 (downloaded on first use), folder (images of your own, in root/train/CLASS and
            root/test/CLASS), or shapes (generated, no files).
        root: folder of the images, or where CIFAR is stored.
        batch_size: images per step and device.
        val_size: images held out of training for validation, the same fraction of every class; by default a tenth of
            them, or the folder's own val; 0 validates on the test split, so that the best epoch is chosen on it.
        augmentation: none, basic (crop, flip), alternating (the same, but a mirrored border around the crop, and a flip
            in every other epoch), rich (crop, flip, colour jitter, rotation) or resized_crop (a part of random area and
            aspect ratio, resized, and a flip; a folder's images then keep their proportions, and are evaluated on their
            middle).
        crop_scale: smallest part of an image's area that resized_crop takes, 0.08 by default; the largest is all of it.
        normalisation: mean and standard deviation that the images are normalised by: data, those of the training
            images, or imagenet, what pretrained networks expect.
        image_size: height and width of the images in pixels; folder resizes to it, shapes draws at it.
        seed: decides the validation split, the order and the augmentation.
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
        crop_scale: float | None = None,
        normalisation: Normalisation = "data",
    ) -> None:
        super().__init__()
        if dataset not in get_args(Dataset):
            raise ValueError(f"dataset={dataset!r} is unknown; use one of {', '.join(get_args(Dataset))}")
        num_draws(augmentation)  # rejects an unknown name
        batch_size, image_size = whole_number("batch_size", batch_size), whole_number("image_size", image_size)
        val_size = None if val_size is None else whole_number("val_size", val_size)
        seed = whole_number("seed", seed)
        crop_scale = crop_scale if crop_scale is None else float(crop_scale)
        if not 1 <= batch_size <= _MAX_BATCH_SIZE:
            raise ValueError(f"batch_size={batch_size} must be at least 1 and at most {_MAX_BATCH_SIZE:,}")
        if val_size is not None and val_size < 0:
            raise ValueError(f"val_size={val_size} must be at least 0")
        if not 8 <= image_size <= _MAX_IMAGE_SIZE:
            raise ValueError(f"image_size={image_size} must be at least 8 and at most {_MAX_IMAGE_SIZE}")
        if dataset.startswith("cifar") and image_size != 32:
            raise ValueError(f"image_size={image_size} does not fit dataset={dataset}, whose images are 32×32")
        if crop_scale is not None and augmentation != "resized_crop":
            raise ValueError(f"crop_scale={crop_scale} needs augmentation=resized_crop, not {augmentation}")
        if crop_scale is not None and not 0 < crop_scale <= 1:
            raise ValueError(f"crop_scale={crop_scale} must be greater than 0 and at most 1")
        if normalisation not in get_args(Normalisation):
            known = ", ".join(get_args(Normalisation))
            raise ValueError(f"normalisation={normalisation!r} is unknown; use one of {known}")
        root = str(root)  # a checkpoint with a Path could not be read again
        self.save_hyperparameters()
        self.dataset = dataset
        self.root = root
        self.batch_size = batch_size
        self.val_size = val_size
        self.augmentation = augmentation
        self.image_size = image_size
        self.seed = seed
        self.crop_scale = CROP_SCALE if crop_scale is None else crop_scale
        self.classes: list[str] = []
        self.mean, self.std = _IMAGENET if normalisation == "imagenet" else _STATISTICS.get(dataset, ([], []))
        self._source: Source | None = None  # between prepare_data and setup
        self._images: dict[str, Images] = {}  # split → images
        self._val_is_drawn = False  # from the training images, by stratified_split
        self._trained_ids: dict[str, Tensor] = {}  # split → ids of the images that the checkpoint was trained with

    @property
    def num_classes(self) -> int:
        """Number of classes, known before the images are read."""
        return len(list_classes(self.root)) if self.dataset == "folder" else _NUM_CLASSES[self.dataset]

    def is_at_hand(self) -> bool:
        """Whether the images can be had without a download."""
        if self.dataset == "folder":
            return Path(self.root).expanduser().is_dir()
        return self.dataset == "shapes" or cifar_is_at_hand(self.dataset, self.root)

    def prepare_data(self) -> None:
        """Read the images, which downloads CIFAR or caches a folder; called in one process before all others."""
        if not self._images:
            self._source = self._load()

    def _load(self) -> Source:
        if self.dataset == "folder":
            return load_folder(self.root, self.image_size, in_proportion(self.hparams))
        if self.dataset == "shapes":
            return load_shapes(0, image_size=self.image_size)  # the same for every seed
        return load_cifar(self.dataset, self.root)

    def setup(self, stage: str | None = None) -> None:
        """Hold out the images for validation, and compute the statistics for normalisation."""
        if self._images:
            return
        source, self._source = self._source or self._load(), None
        train, val = source.train, source.val
        if self.val_size == 0:
            if stage in (None, "fit"):
                rank_zero_warn(
                    "data.val_size=0 validates on the test split: the best epoch, and with it the reported figure, "
                    "is selected on the test set"
                )
            val = source.test
        elif val is None:
            val_size = len(train) // 10 if self.val_size is None else self.val_size
            if val_size >= len(train):
                raise UserError(f"data.val_size={val_size} leaves nothing to train on; there are {len(train):,} images")
            if val_size == 0:
                raise UserError(f"{len(train)} training images are too few to hold any out; set data.val_size")
            kept, held_out = stratified_split(train.labels, val_size, self.seed, source.classes)
            train, val = train.subset(kept), train.subset(held_out)
            self._val_is_drawn = True
        elif self.val_size is not None and not self.classes:  # of a checkpoint: the folder came after its training
            raise UserError(
                f"data.val_size={self.val_size}, but {self.root} has its own val folder; give --data.val_size null"
            )
        self._set_classes(source.classes, self.classes or source.classes)
        if not self.mean:
            self.mean, self.std = channel_statistics(train)
        self._images = {"train": train, "val": val, "test": source.test}
        self._restore_split(resuming=stage == "fit")

    def images(self, split: Literal["train", "val", "test"]) -> Images:
        """The images of a split, once `setup` has run: of train before any crop, of the others at `image_size`."""
        return self._images[split] if split == "train" else self._images[split].centre(self.image_size)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) uint8 → what the network is given, float32, on their device; once `setup` has run."""
        return Normalise(self.mean, self.std, pixels.device)(pixels)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to be used without the training images, and the ids of a folder's images."""
        state: dict[str, Any] = {"classes": self.classes, "mean": self.mean, "std": self.std}
        for split in ("train", "val"):
            if self._images and self._images[split].ids is not None:
                state[f"{split}_ids"] = self._images[split].ids
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Use a checkpoint's normalisation, and its split of a folder whose images have changed since.

        Images that were held out stay held out; all others, new ones too, count as training images.
        """
        self._set_classes(self.classes or state_dict["classes"], state_dict["classes"])
        self.mean, self.std = state_dict["mean"], state_dict["std"]
        # Checkpoints of fixed data and older ones have no ids.
        if "val_ids" in state_dict:
            self._trained_ids = {split: state_dict[f"{split}_ids"] for split in ("train", "val")}
        self._restore_split(resuming=self.trainer is not None and self.trainer.training)

    def _restore_split(self, resuming: bool) -> None:
        trained = self._trained_ids
        if not self._images or not trained:
            return
        train, val = self._images["train"], self._images["val"]
        if train.ids is None or val.ids is None:
            return
        ids, before = torch.cat([train.ids, val.ids]), torch.cat([trained["train"], trained["val"]])
        if len(train) == len(trained["train"]) and torch.equal(ids, before):
            return
        added, removed = int((~torch.isin(ids, before)).sum()), int((~torch.isin(before, ids)).sum())
        change = f"{added} added, {removed} removed" if added or removed else "renamed, copied, or in another order"
        problem = f"the training and validation images in {show(self.root)} are not those of the checkpoint ({change})"
        if resuming:
            raise UserError(f"{problem}, so training cannot resume; restore the images or start a new run")
        if self._val_is_drawn:
            held_out = torch.isin(ids, trained["val"]) & ~torch.isin(ids, trained["train"])  # copies may be in both
            if not held_out.any():
                raise UserError(f"{problem}, and none of the held-out images is left; restore them, or train again")
            rows = torch.cat([train.rows, val.rows])  # type: ignore[list-item]  # both are parts of one store
            images = Images(train.store, torch.cat([train.labels, val.labels]), ids=ids, rows=rows)
            train, val = images.subset((~held_out).nonzero()[:, 0]), images.subset(held_out.nonzero()[:, 0])
            self._images |= {"train": train, "val": val}
            problem += (
                f"; the {len(val)} of {len(trained['val'])} held-out images that are left stay held out, all others "
                "count as training images"
            )
        elif (seen := torch.isin(ids[len(train) :], trained["train"])).any():  # of the validation images
            if seen.all():
                raise UserError(f"{problem}, and all validation images were trained on; restore them, or train again")
            self._images["val"] = val.subset((~seen).nonzero()[:, 0])
            problem += f"; {int(seen.sum())} of the {len(val)} validation images were trained on, and are left out"
        rank_zero_warn(problem)

    def _set_classes(self, found: list[str], trained: list[str]) -> None:
        if found != trained:
            raise UserError(
                f"the checkpoint's classes ({_short(trained)}) are not those of the data ({_short(found)}); check "
                "data.dataset and data.root"
            )
        self.classes = found

    def _placement(self) -> tuple[Normalise, torch.device, Shard]:
        trainer = self.trainer
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        shard = Shard() if trainer is None else Shard(trainer.global_rank, trainer.world_size)
        return Normalise(self.mean, self.std, device), device, shard

    def _epoch(self) -> int | None:
        """The epoch that a trainer is in; None in a loop of the user's own."""
        if self.trainer is None or not self.trainer.training:
            return None
        # overfit_batches repeats the same batches, those of the first epoch
        return 0 if self.trainer.overfit_batches else self.trainer.current_epoch  # type: ignore[attr-defined]

    def _enough_images(self, split: Literal["train", "val", "test"], shard: Shard) -> Images:
        """The images of a split, of which each process needs one."""
        images, name = self.images(split), {"train": "training", "val": "validation", "test": "test"}[split]
        if len(images) < shard.world_size:
            raise UserError(f"{len(images)} {name} images are fewer than the {shard.world_size} processes; use fewer")
        return images

    def train_dataloader(self) -> TrainingLoader:
        """Shuffled, augmented batches of `batch_size`.

        In a loop of your own, keep the loader: each iteration over it is the next epoch. A Trainer is given the data
        module itself, so that a training resumes in its epoch.
        """
        normalise, device, shard = self._placement()
        return TrainingLoader(
            self._enough_images("train", shard),
            self.batch_size,
            self.augmentation,
            normalise,
            device,
            self.seed,
            self._epoch,
            shard,
            self.image_size,
            self.crop_scale,
        )

    def _evaluation_loader(self, split: Literal["val", "test"], shuffle: bool = True) -> EvaluationLoader:
        normalise, device, shard = self._placement()
        # Without gradients four times as many images need less memory than a training step.
        images = self._enough_images(split, shard)
        return EvaluationLoader(images, 4 * self.batch_size, normalise, device, shard, shuffle)

    def val_dataloader(self) -> EvaluationLoader:
        """Every validation image once, in a fixed random order."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> EvaluationLoader:
        """Every test image once, in a fixed random order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """Every test image once, in the order of `images("test")`."""
        return self._evaluation_loader("test", shuffle=False)

    def changed_test_dataloader(self, change: Callable[[Tensor, Tensor], Tensor]) -> EvaluationLoader:
        """Every test image once, after `change` of a batch's pixels (B, 3, H, W) uint8 and indices (B,), on the CPU."""
        normalise, device, shard = self._placement()
        # Activations of more images would leave the CPU's cache and the allocator's: 256 take 1.5 times as long each.
        batch_size = min(4 * self.batch_size, 128) if device.type == "cpu" else 4 * self.batch_size
        images = self._enough_images("test", shard)
        return EvaluationLoader(images, batch_size, normalise, device, shard, shuffle=True, change=change)


def _short(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown
