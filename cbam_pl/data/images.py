"""What every data source becomes: uint8 images and labels in memory."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Labelled images in memory.

    Args:
        pixels: (N, 3, H, W) uint8.
        labels: (N,) int64, indices into the class names.
        masks: (N, 1, H, W) bool, True on the object, where the source knows it.
    """

    pixels: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "Images":
        """The images at `indices` (M,) int64, in that order."""
        return Images(self.pixels[indices], self.labels[indices], None if self.masks is None else self.masks[indices])


@dataclass(frozen=True)
class Source:
    """A data set as its source gives it, before any validation images are held out.

    Args:
        classes: names in label order.
        train: training images.
        test: test images.
        val: validation images where the source brings its own, else None.
    """

    classes: list[str]
    train: Images
    test: Images
    val: Images | None = None
