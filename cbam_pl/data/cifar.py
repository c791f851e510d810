"""CIFAR-10 and CIFAR-100 as torchvision downloads, checks and reads them."""

import os
import tarfile
import warnings
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from cbam_pl.data.folder import show
from cbam_pl.data.images import Images, Source
from cbam_pl.errors import UserError
from cbam_pl.process import socket_timeout

CifarName = Literal["cifar10", "cifar100"]

_DATASETS: dict[CifarName, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}

# A download, an unpacking or a checksum that fails; URLError and ConnectionError are OSErrors.
_FAILURES = (OSError, EOFError, RuntimeError, HTTPException, tarfile.TarError, zlib.error)


def load_cifar(dataset: CifarName, root: str) -> Source:
    """The images of CIFAR, of CIFAR-100 with its fine classes, read from the official archive in `root`."""
    train, test = (_read_split(dataset, root, train=train) for train in (True, False))
    return Source(list(train.classes), _to_images(train), _to_images(test))


def cifar_is_at_hand(dataset: CifarName, root: str) -> bool:
    """Whether there are files of it in `root`, so that nothing is downloaded."""
    official, folder = _DATASETS[dataset], Path(os.path.expanduser(root))
    return (folder / official.base_folder).exists() or (folder / official.filename).exists()


def _read_split(dataset: CifarName, root: str, train: bool) -> CIFAR10:
    """Read one split; torchvision compares every file's MD5 checksum before it unpickles anything."""
    official, folder = _DATASETS[dataset], Path(os.path.expanduser(root))
    if not cifar_is_at_hand(dataset, root):
        print(f"downloading {official.filename} (170 MB) into {show(folder)}", flush=True)
    try:
        with socket_timeout(seconds=30.0), warnings.catch_warnings():
            # nothing the user can fix: Python 3.12 warns of how torchvision unpacks, numpy of old pickles
            warnings.simplefilter("ignore")
            return official(root, train=train, download=True)
    except _FAILURES as error:
        raise UserError(_explain(dataset, root, error)) from error


def _explain(dataset: CifarName, root: str, error: BaseException) -> str:
    official = _DATASETS[dataset]
    archive, folder = (Path(os.path.expanduser(root)) / name for name in (official.filename, official.base_folder))
    by_hand = (
        f"put {official.filename} from {official.url} into {root} by hand, or train without a download: --data.dataset "
        "folder --data.root DIR for your own images, --data.dataset shapes for generated ones"
    )
    if archive.is_file() and not check_integrity(archive, official.tgz_md5):
        return f"{archive} is truncated or damaged (its checksum is wrong): delete it and run again, or {by_hand}"
    meta = (official.meta["filename"], official.meta["md5"])
    for name, checksum in [*official.train_list, *official.test_list, meta]:
        if folder.is_dir() and not check_integrity(folder / name, checksum):
            return f"{folder / name} is missing or damaged: delete the folder {folder} and run again, or {by_hand}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{official.filename} could not be downloaded and unpacked ({reason}): {by_hand}"


def _to_images(split: CIFAR10) -> Images:
    pixels = torch.from_numpy(np.ascontiguousarray(split.data.transpose(0, 3, 1, 2)))  # (N, 3, 32, 32)
    return Images(pixels, torch.tensor(split.targets, dtype=torch.int64))
