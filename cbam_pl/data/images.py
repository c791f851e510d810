"""What every data source becomes: uint8 images and labels, in memory or in a file that is mapped into it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop


@dataclass(frozen=True)
class Images:
    """Labelled images. Subsets of them share one store, which is never copied, as it may exceed memory."""

    store: Tensor  # (M, 3, H, W) uint8
    labels: Tensor  # (N,) int64, indices into the class names
    masks: Tensor | None = None  # (N, 1, H, W) bool, True on the object, where the source knows it
    ids: Tensor | None = None  # (N,) int64, a hash of each image's file and label, where a later run may find others
    rows: Tensor | None = None  # (N,) int64, each image's place in the store; by default the store's own order

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pixels(self) -> Tensor:
        """All images, (N, 3, H, W) uint8: a copy where they are a subset of the store."""
        return self.store if self.rows is None else self.store[self.rows]

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return len(self) * self.store[:1].nbytes

    def take(self, indices: Tensor) -> Tensor:
        """The pixels (M, 3, H, W) uint8 of the images at `indices` (M,) int64."""
        return self.store[indices if self.rows is None else self.rows[indices]]

    def subset(self, indices: Tensor) -> "Images":
        """The images at `indices` (M,) int64, in that order."""
        masks, ids = (None if tensor is None else tensor[indices] for tensor in (self.masks, self.ids))
        rows = indices if self.rows is None else self.rows[indices]
        return Images(self.store, self.labels[indices], masks, ids, rows)

    def copy_to(self, device: torch.device, part: int = 1024) -> "Images":
        """Pixels and labels on a device, copied by so many images at a time, as all may exceed the CPU's memory."""
        pixels = torch.empty(len(self), *self.store.shape[1:], dtype=torch.uint8, device=device)
        for to, numbers in zip(pixels.split(part), torch.arange(len(self)).split(part), strict=True):
            to.copy_(self.take(numbers))
        return Images(pixels, self.labels.to(device))

    def centre(self, size: int) -> "Images":
        """The middle size × size pixels of each image."""
        masks = None if self.masks is None else center_crop(self.masks, [size, size])
        return replace(self, store=center_crop(self.store, [size, size]), masks=masks)


@dataclass(frozen=True)
class Source:
    """A data set as its source gives it, before any validation images are held out."""

    classes: list[str]  # names in label order
    train: Images
    test: Images
    val: Images | None = None  # where the source brings its own
