"""What every data source becomes: uint8 images and labels in memory."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Labelled images."""

    pixels: Tensor  # (N, 3, H, W) uint8
    labels: Tensor  # (N,) int64, indices into the class names
    masks: Tensor | None = None  # (N, 1, H, W) bool, True on the object, where the source knows it
    ids: Tensor | None = None  # (N,) int64, a hash of each image's file and label, where a later run may find others

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "Images":
        """The images at `indices` (M,) int64, in that order."""
        tensors = (self.pixels, self.labels, self.masks, self.ids)
        return Images(*(None if tensor is None else tensor[indices] for tensor in tensors))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Source:
    """A data set as its source gives it, before any validation images are held out."""

    classes: list[str]  # names in label order
    train: Images
    test: Images
    val: Images | None = None  # where the source brings its own
