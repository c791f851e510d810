"""Batches of images: order and augmentation are functions of (seed, epoch, index), so any run can resume.

torch's DataLoader works image by image in Python; here a batch is one gather, on the device that holds the images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cbam_pl.data.augmentation import CROP_SCALE, Augmentation, alternate_flips, augment, num_draws
from cbam_pl.data.images import Images
from cbam_pl.seeds import derive_seed

Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W) float32, normalised; labels (B,) int64


@dataclass(frozen=True)
class Shard:
    """The part of the images that this process reads: every `world_size`-th, starting at `rank`."""

    rank: int = 0
    world_size: int = 1


class Normalise:
    """(image − mean) / std per channel of images in [0, 1] on `device`."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device) -> None:
        spread = torch.tensor(std, device=device).view(3, 1, 1)
        self._scale = 1 / spread
        self._shift = -torch.tensor(mean, device=device).view(3, 1, 1) / spread

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), floats in [0, 1] or uint8, which is divided by 255 → the same shape, floats."""
        if not images.is_floating_point():
            images = images.float() / 255
        return torch.addcmul(self._shift, images, self._scale)


def _place(images: Images, device: torch.device) -> Images:
    """The images, on the device where they fit into half of its free memory."""
    if device.type != "cuda" or images.store.is_cuda or images.nbytes >= torch.cuda.mem_get_info(device)[0] // 2:
        return images
    try:
        return images.copy_to(device)
    except torch.OutOfMemoryError:  # another process took the memory meanwhile
        torch.cuda.empty_cache()
        return images


def _gather(images: Images, indices: Tensor, device: torch.device) -> Batch:
    """Pixels (B, 3, H, W) uint8 and labels (B,) at `indices`, on the device, without waiting for it."""
    indices = indices.to(images.labels.device, non_blocking=True)
    batch = images.take(indices), images.labels[indices]
    if device.type == "cuda" and images.labels.device.type == "cpu":  # an asynchronous copy starts in pinned memory
        batch = batch[0].pin_memory(), batch[1].pin_memory()
    return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)


@dataclass(eq=False)
class TrainingLoader:
    """Augmented batches, in a new order and with new draws in every epoch, which depend on seed and epoch alone.

    Several processes read the images of one global order in turn, so that their batches together are those of one
    process; the remainder is left out, other images in every epoch. Each iteration starts at the epoch's first batch,
    even if the previous one was cut short; only the first one after `load_state_dict` starts in the middle.
    """

    images: Images
    batch_size: int  # images per batch of this process; the last batch may be smaller
    augmentation: Augmentation
    normalise: Normalise
    device: torch.device  # where the batches go
    seed: int  # decides the order and the draws, together with the epoch
    current_epoch: Callable[[], int | None]  # from 0; called when an iteration starts; None: each is the next epoch
    shard: Shard
    image_size: int | None = None  # of resized_crop: height and width of the batches; by default the images' own
    crop_scale: float = CROP_SCALE  # of resized_crop: smallest part of the area

    def __post_init__(self) -> None:
        self._placed: Images | None = None  # where batches are taken from, once one is asked for
        self._start = 0  # the first batch of the next iteration
        self._batches_done = 0  # in the current iteration
        self._iterations = 0  # begun so far

    def state_dict(self) -> dict[str, int]:
        """The number of batches done in the current iteration, 0 after the last one."""
        return {"batches_done": self._batches_done % len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start the next iteration after the batches that are done."""
        self._start = self._batches_done = state_dict["batches_done"] % len(self)

    def __len__(self) -> int:
        return -(-(len(self.images) // self.shard.world_size) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self._batches_done = self._start
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        # Not in __iter__: Lightning may call that twice before it asks for the first batch.
        start, self._start = self._start, 0
        epoch = self.current_epoch()
        epoch = self._iterations if epoch is None else epoch
        self._iterations += 1
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
        count, world_size = len(self.images), self.shard.world_size
        order = torch.randperm(count, generator=generator)  # (N,)
        # Row i belongs to image i, wherever it is in the order.
        draws = torch.rand(count, num_draws(self.augmentation), generator=generator)  # (N, K)
        if self.augmentation == "alternating":  # the first draw depends on the image alone, not on the epoch
            first = torch.rand(count, generator=torch.Generator().manual_seed(derive_seed("flip", self.seed, 0)))
            alternate_flips(draws, first, epoch)
        order = order[self.shard.rank : count - count % world_size : world_size]
        draws = draws[order].to(self.device)
        # Only now: Lightning makes loaders of which it asks the length alone.
        images = self._placed = self._placed or _place(self.images, self.device)
        order = order.to(images.labels.device)
        batches = list(zip(order.split(self.batch_size), draws.split(self.batch_size), strict=True))
        for index in range(start, len(batches)):
            self._batches_done = index + 1
            indices, batch_draws = batches[index]
            pixels, labels = _gather(images, indices, self.device)
            augmented = augment(pixels, batch_draws, self.augmentation, self.image_size, self.crop_scale)
            yield self.normalise(augmented), labels


@dataclass(eq=False)
class EvaluationLoader:
    """Each image once over all processes, without padding.

    All processes get the same number of batches, as every forward pass of DistributedDataParallel may synchronise.
    """

    images: Images  # on the CPU
    batch_size: int  # images per batch of this process, at most
    normalise: Normalise
    device: torch.device  # where the batches go
    shard: Shard
    shuffle: bool = False  # one fixed random order, as folders list their images class by class
    change: Callable[[Tensor, Tensor], Tensor] | None = None  # of pixels (B, 3, H, W) uint8 and their indices, on a CPU

    def __post_init__(self) -> None:
        self._placed: Images | None = None  # where batches are taken from, once one is asked for
        generator = torch.Generator().manual_seed(derive_seed("evaluation", 0))
        count = len(self.images)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        self._order = order[self.shard.rank :: self.shard.world_size]

    def __len__(self) -> int:
        largest_shard = -(-len(self.images) // self.shard.world_size)
        return -(-largest_shard // self.batch_size)

    def indices(self) -> tuple[Tensor, ...]:
        """The numbers (B,) of the images in each batch of this process."""
        return self._order.tensor_split(len(self))

    def __iter__(self) -> Iterator[Batch]:
        source = self.device if self.change is None else torch.device("cpu")
        images = self._placed = self._placed or _place(self.images, source)
        for indices in self.indices():
            pixels, labels = _gather(images, indices, source)
            if self.change is not None:
                pixels = self.change(pixels, indices)
            yield self.normalise(pixels.to(self.device)), labels.to(self.device)
