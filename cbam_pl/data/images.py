"""What every data source becomes: uint8 images and labels in memory."""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cbam_pl.errors import UserError


@dataclass(frozen=True)
class Images:
    """Labelled images in memory."""

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


def check_memory(num_bytes: int, images: str) -> None:
    """Raise UserError where `images` do not fit into the free memory: Linux would kill the process later."""
    meminfo = Path("/proc/meminfo")  # on Linux; other systems fail at the allocation
    found = re.search(r"^MemAvailable: *(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    if found and num_bytes > 1024 * int(found[1]):
        need, free = f"{num_bytes / 1e9:,.1f} GB", f"{int(found[1]) / 1e6:,.1f} GB"
        raise UserError(f"{images} need {need} of memory, and {free} are free; lower data.image_size")
