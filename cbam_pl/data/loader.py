"""Batches from images in memory: order and augmentation are functions of (seed, epoch, index), so any run can resume.

torch's DataLoader works image by image in Python; here a batch is one gather, on the device where the images lie.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cbam_pl.data.augmentation import Augmentation, alternate_flips, augment, num_draws
from cbam_pl.data.images import Images
from cbam_pl.seeds import derive_seed

Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W) float32, normalised; labels (B,) int64


@dataclass(frozen=True)
class Share:
    """Which part of each epoch's images this process takes: every `world_size`-th, from `rank` on."""

    rank: int = 0
    world_size: int = 1


class Normalise:
    """(image − mean) / std per channel, in one pass.

    Args:
        mean: mean of each channel, images in [0, 1].
        std: standard deviation of each channel.
        device: where the images are.
    """

    def __init__(self, mean: list[float], std: list[float], device: torch.device) -> None:
        spread = torch.tensor(std, device=device).view(3, 1, 1)
        self._scale = 1 / spread
        self._shift = -torch.tensor(mean, device=device).view(3, 1, 1) / spread

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] → the same shape, zero mean and unit variance over the data set."""
        return torch.addcmul(self._shift, images, self._scale)


def _place(images: Images, device: torch.device) -> Images:
    """The images on the device where they fit into half of its free memory, else pinned for asynchronous copies."""
    if device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(device)
    if images.pixels.nbytes < free // 2:
        return Images(images.pixels.to(device), images.labels.to(device))
    return Images(images.pixels.pin_memory(), images.labels.pin_memory())


def _gather(images: Images, indices: Tensor, device: torch.device) -> Batch:
    """Pixels (B, 3, H, W) uint8 and labels (B,) at `indices`, on the device, without waiting for it."""
    indices = indices.to(images.labels.device, non_blocking=True)
    return (
        images.pixels[indices].to(device, non_blocking=True),
        images.labels[indices].to(device, non_blocking=True),
    )


class TrainingLoader:
    """Shuffled, augmented batches, another order and other draws in every epoch.

    Epoch e of seed s always holds the same images in the same order with the same draws, whatever ran before. In
    several processes one global order is dealt out in turn, so that their batches together are those of one process;
    the few images that do not divide among the processes are left out, other ones in every epoch.

    Args:
        images: training images, on the CPU.
        batch_size: images per batch of this process; the last batch may be smaller.
        augmentation: none, basic, alternating or rich.
        normalise: what turns images in [0, 1] into the network's input.
        device: where the batches go.
        seed: what the order and the draws depend on.
        current_epoch: gives the epoch, from 0, when an epoch is begun.
        share: which process this is, of how many.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        augmentation: Augmentation,
        normalise: Normalise,
        device: torch.device,
        seed: int,
        current_epoch: Callable[[], int],
        share: Share,
    ) -> None:
        self.images = _place(images, device)
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.normalise = normalise
        self.device = device
        self.seed = seed
        self.current_epoch = current_epoch
        self.share = share
        self._taken = 0  # batches of the epoch that were handed out

    def state_dict(self) -> dict[str, int]:
        """Where in the epoch the loader is, so that a resumed run goes on at the next batch."""
        return {"taken": self._taken % len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next epoch behind the batches that were taken already."""
        self._taken = state_dict["taken"]

    def __len__(self) -> int:
        return -(-(len(self.images) // self.share.world_size) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, self.current_epoch()))
        count = len(self.images)
        order = torch.randperm(count, generator=generator)  # (N,)
        # Row i belongs to image i, wherever it stands in the order.
        draws = torch.rand(count, num_draws(self.augmentation), generator=generator)  # (N, K)
        if self.augmentation == "alternating":  # the first draw is the image's, whatever the epoch
            first = torch.rand(count, generator=torch.Generator().manual_seed(derive_seed("flip", self.seed, 0)))
            alternate_flips(draws, first, self.current_epoch())
        dealt = order[self.share.rank : count - count % self.share.world_size : self.share.world_size]
        draws = draws[dealt].to(self.device)
        dealt = dealt.to(self.images.labels.device)
        batches = list(zip(dealt.split(self.batch_size), draws.split(self.batch_size), strict=True))
        self._taken %= len(batches)
        for indices, batch_draws in batches[self._taken :]:
            self._taken += 1
            pixels, labels = _gather(self.images, indices, self.device)
            yield self.normalise(augment(pixels, batch_draws, self.augmentation)), labels


class EvaluationLoader:
    """Each image once over all processes, in order, without padding.

    All processes get equally many batches, as every forward pass of DistributedDataParallel may synchronise.

    Args:
        images: images, on the CPU.
        batch_size: images per batch of this process, at most.
        normalise: what turns images in [0, 1] into the network's input.
        device: where the batches go.
        share: which process this is, of how many.
    """

    def __init__(
        self, images: Images, batch_size: int, normalise: Normalise, device: torch.device, share: Share
    ) -> None:
        self.images = _place(images, device)
        self.batch_size = batch_size
        self.normalise = normalise
        self.device = device
        self.share = share

    def __len__(self) -> int:
        longest_share = -(-len(self.images) // self.share.world_size)
        return -(-longest_share // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        mine = torch.arange(self.share.rank, len(self.images), self.share.world_size)
        for indices in mine.tensor_split(len(self)):
            pixels, labels = _gather(self.images, indices, self.device)
            yield self.normalise(pixels.float().div_(255)), labels
