"""CIFAR: tiny archives in the official format, read through torchvision; the download that fails."""

import hashlib
import io
import pickle
import socket
import tarfile
import urllib.error
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
import torchvision.datasets.utils
from torchvision.datasets import CIFAR10, CIFAR100

from cbam_pl.data.cifar import load_cifar
from cbam_pl.errors import UserError

REFUSED = "http://127.0.0.1:1/archive.tar.gz"


class Python2Pickler(pickle._Pickler):
    """Writes str as Python 2 did and True as 1, so that a dtype has the official files' align=0."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_str(self, text: str) -> None:
        data = text.encode("latin1")
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(text)

    def save_bytes(self, data: bytes) -> None:
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(data)

    def save_bool(self, flag: bool) -> None:
        self.save_long(int(flag))

    dispatch[str] = save_str
    dispatch[bytes] = save_bytes
    dispatch[bool] = save_bool


def to_pickle(content: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(content)
    return file.getvalue()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


class Official:
    """A tiny CIFAR that torchvision takes for the official one: four training and two test images."""

    def __init__(self, name: Literal["cifar10", "cifar100"], root: Path, monkeypatch: pytest.MonkeyPatch):
        self.name = name
        self.dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
        self.root = root
        self.archive = root / self.dataset.filename
        self.folder = root / self.dataset.base_folder
        self.rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
        self.labels = [3, 0, 1, 2, 2, 3]
        self.classes = ["zebra", "apple", "mole", "bat"]
        key = "labels" if name == "cifar10" else "fine_labels"
        if name == "cifar10":
            batches = {"data_batch_1": [0, 1], "data_batch_2": [2, 3], "test_batch": [4, 5]}
            meta_name, meta = "batches.meta", {"label_names": self.classes}
        else:
            batches = {"train": [0, 1, 2, 3], "test": [4, 5]}
            meta_name, meta = "meta", {"fine_label_names": self.classes, "coarse_label_names": ["x"]}
        self.files = {
            batch: to_pickle({"data": self.rows[chosen], key: [self.labels[i] for i in chosen]})
            for batch, chosen in batches.items()
        }
        listed = [[batch, md5(data)] for batch, data in self.files.items()]
        self.files[meta_name] = to_pickle(meta)
        monkeypatch.setattr(self.dataset, "url", REFUSED)
        monkeypatch.setattr(self.dataset, "train_list", listed[:-1])
        monkeypatch.setattr(self.dataset, "test_list", listed[-1:])
        official_meta = {**self.dataset.meta, "md5": md5(self.files[meta_name])}
        monkeypatch.setattr(self.dataset, "meta", official_meta)
        self.monkeypatch = monkeypatch

    def write_archive(self, without: str = "") -> None:
        with tarfile.open(self.archive, "w:gz") as tar:
            for file, data in self.files.items():
                if file != without:
                    member = tarfile.TarInfo(f"{self.dataset.base_folder}/{file}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        self.monkeypatch.setattr(self.dataset, "tgz_md5", md5(self.archive.read_bytes()))

    def unpack(self) -> None:
        with tarfile.open(self.archive) as tar:
            tar.extractall(self.root, filter="data")


@pytest.fixture(params=["cifar10", "cifar100"])
def official(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Official:
    return Official(request.param, tmp_path, monkeypatch)


def test_pixels_labels_and_classes_are_those_of_the_archive(official: Official) -> None:
    official.write_archive()
    source = load_cifar(official.name, str(official.root))
    assert source.classes == ["zebra", "apple", "mole", "bat"]  # the archive's order, not the alphabet's
    assert source.val is None
    assert source.train.labels.tolist() == [3, 0, 1, 2]
    assert source.test.labels.tolist() == [2, 3]
    assert source.train.labels.dtype == torch.int64
    for images, rows in ((source.train, official.rows[:4]), (source.test, official.rows[4:])):
        assert images.pixels.dtype == torch.uint8
        assert images.pixels.is_contiguous()
        assert images.masks is None
        for n, row in enumerate(rows):
            for channel in range(3):
                for y in range(32):
                    # "the first 1024 entries contain the red channel values, ... in row-major order"
                    line = row[channel * 1024 + y * 32 : channel * 1024 + y * 32 + 32]
                    assert images.pixels[n, channel, y].tolist() == line.tolist()


def test_download_unpacks_and_a_second_call_needs_no_archive(official: Official) -> None:
    official.write_archive()
    load_cifar(official.name, str(official.root))
    official.archive.unlink()
    assert len(load_cifar(official.name, str(official.root)).train) == 4


def test_refused_download_names_archive_folder_and_other_ways(official: Official) -> None:
    timeout = socket.getdefaulttimeout()
    with pytest.raises(UserError, match=r"could not be downloaded.*refused") as caught:
        load_cifar(official.name, str(official.root))
    message = str(caught.value)
    archive = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[official.name]
    assert message.startswith(archive)
    for part in (f"into {official.root} ", "--data.dataset folder --data.root DIR", "--data.dataset shapes"):
        assert part in message
    assert "\n" not in message
    assert socket.getdefaulttimeout() == timeout


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("Name or service not known"),
        ConnectionResetError("reset by peer"),
        TimeoutError(),
        RuntimeError("File not found\nor corrupted."),
    ],
)
def test_any_failing_download_is_one_line(
    official: Official, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", fail)
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        load_cifar(official.name, str(official.root))
    assert len(str(caught.value).splitlines()) == 1


def test_truncated_archive_is_named(official: Official) -> None:
    official.write_archive()
    official.archive.write_bytes(official.archive.read_bytes()[:-100])
    with pytest.raises(UserError, match="is truncated or damaged") as caught:
        load_cifar(official.name, str(official.root))
    assert str(caught.value).startswith(str(official.archive))


def test_archive_without_a_member_names_the_member(official: Official) -> None:
    missing = list(official.files)[1]
    official.write_archive(without=missing)
    with pytest.raises(UserError, match="is missing or damaged: delete the folder") as caught:
        load_cifar(official.name, str(official.root))
    assert str(caught.value).startswith(str(official.folder / missing))


def test_damaged_batch_is_unpacked_again_from_the_archive(official: Official) -> None:
    official.write_archive()
    load_cifar(official.name, str(official.root))
    (official.folder / next(iter(official.files))).write_bytes(b"garbage")
    assert load_cifar(official.name, str(official.root)).train.labels.tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize("which", [0, -1])
def test_damaged_file_without_archive_is_named(official: Official, which: int) -> None:
    official.write_archive()
    load_cifar(official.name, str(official.root))
    official.archive.unlink()
    damaged = official.folder / list(official.files)[which]
    damaged.write_bytes(b"garbage")
    with pytest.raises(UserError, match="is missing or damaged: delete the folder") as caught:
        load_cifar(official.name, str(official.root))
    assert str(caught.value).startswith(str(damaged))


def test_root_that_is_a_file(official: Official, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=f"could not be downloaded.*into {file} "):
        load_cifar(official.name, str(file))
