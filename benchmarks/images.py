"""Training images per second at 224 pixels, and the first decoding, beside torchvision: python -m benchmarks.images

10,000 JPEGs of 500 × 375, made here; about a minute and 5 GB of disk on two cores. Both sides give a random resized
crop, a flip and normalisation: ImageFolder decodes every image in every epoch, in two worker processes of a DataLoader;
this program decodes each once, into a cache, and crops from that.
"""

import argparse
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import write_jpeg

from benchmarks.measure import Spread, Table, machine, parser, ratio, report
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.data.folder import load_folder
from cbam_pl.process import keep_freed_memory

_CLASSES = ("one", "two")
_DISTINCT = 100  # pictures, of which the files are copies: the time does not depend on it
_WORKERS = 2
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _picture(generator: torch.Generator, height: int, width: int) -> Tensor:
    """Clouds of noise, finer ones fainter, as in photos, and some grain: (3, height, width) uint8."""
    image = torch.zeros(1, 3, height, width)
    for cells in (2, 4, 8, 16, 32, 64, 128):
        noise = torch.randn(1, 3, cells, cells, generator=generator) * 0.4 / cells**0.7
        image += F.interpolate(noise, (height, width), mode="bicubic", align_corners=False)
    image += 0.04 * torch.randn(1, 3, height, width, generator=generator)
    return ((image[0] + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def make_photos(root: Path, count: int, height: int = 375, width: int = 500) -> None:
    """Write `count` JPEGs of quality 90 into root/train/CLASS, and a few into root/test/CLASS."""
    generator = torch.Generator().manual_seed(0)
    for split, images in (("train", count), ("test", len(_CLASSES))):
        paths = [root / split / _CLASSES[index % len(_CLASSES)] / f"{index}.jpg" for index in range(images)]
        for index, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            if index < _DISTINCT:
                write_jpeg(_picture(generator, height, width), str(path), quality=90)
            else:
                shutil.copy(paths[index % _DISTINCT], path)


def _torchvision_loader(root: str, size: int, batch_size: int) -> DataLoader[Any]:
    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    dataset = ImageFolder(f"{root}/train", transforms.Compose([*steps, transforms.Normalize(_MEAN, _STD)]))
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=_WORKERS)


def _our_loader(root: str, size: int, batch_size: int) -> Any:
    data = ImageDataModule(
        "folder", root, batch_size, 2, augmentation="resized_crop", image_size=size, normalisation="imagenet"
    )
    data.setup()
    return data.train_dataloader()


def _read(loader: Any) -> None:
    for _ in loader:
        pass


def _processor_seconds() -> float:
    """Of this process and of its ended children, which other processes of a busy machine hardly change."""
    return sum(os.times()[:4])


def _measure(root: Path, given: argparse.Namespace) -> dict[str, tuple[list[float], list[float]]]:
    """Images per second, and milliseconds of processor time per image, of each work, round by round."""
    settings = (str(root), given.size, given.batch_size)

    def decode() -> None:
        for cache in root.glob(".cbam_pl_*"):
            cache.unlink()
        load_folder(str(root), given.size, in_proportion=True)

    decode()
    ours = _our_loader(*settings)
    works: dict[str, Callable[[], None]] = {
        "torchvision": lambda: _read(_torchvision_loader(*settings)),
        "this program, first decoding": decode,
        "this program": lambda: _read(ours),
    }
    measured: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in works}
    for _ in range(given.rounds):
        for name, work in works.items():
            started, used = time.perf_counter(), _processor_seconds()
            work()
            gc.collect()  # ends the workers, so that their time counts
            measured[name][0].append(given.images / (time.perf_counter() - started))
            measured[name][1].append(1000 * (_processor_seconds() - used) / given.images)
    return measured


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", rounds=3, seconds=0)
    options.add_argument("--images", type=int, default=10_000, help="JPEGs to make (default: %(default)s)")
    options.add_argument("--size", type=int, default=224, help="height and width of a crop (default: %(default)s)")
    options.add_argument("--batch_size", type=int, default=64, help="images per batch (default: %(default)s)")
    options.add_argument("--folder", help="where the images and their cache go, for as long as this runs")
    given = options.parse_args()
    keep_freed_memory()  # as `fit` does
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder)
        make_photos(root, given.images)
        kilobytes = sum(path.stat().st_size for path in root.glob("train/*/*")) / given.images / 1000
        header = machine(given.device, given.threads)
        header["data"] = f"{given.images:,} JPEGs of 500 × 375, {kilobytes:.0f} kB on average, crops of {given.size}"
        measured = _measure(root, given)
    title = f"an epoch each: median of {given.rounds} interleaved rounds (lowest to highest)"
    rows = [[name, Spread.of(rates), Spread.of(used).text(2)] for name, (rates, used) in measured.items()]
    theirs, decoding, ours = measured.values()
    ratios = [
        [label, ratio(one[0], theirs[0]).text(2), ratio(theirs[1], one[1]).text(2), asked]
        for label, one, asked in (
            ("this program ÷ torchvision", ours, "≥ 2"),
            ("first decoding ÷ torchvision", decoding, ""),
        )
    ]
    tables = [
        Table(title, ["loader", "images/s", "processor ms per image"], rows),
        Table(
            "how many times as fast, round by round", ["ratio", "by the clock", "by processor time", "asked"], ratios
        ),
    ]
    report(header, tables, given.json)


if __name__ == "__main__":
    main()
