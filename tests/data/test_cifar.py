"""CIFAR: tiny archives in the official format, read through torchvision; the download that fails."""

import socket
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision.datasets.utils

from cbam_pl.data.cifar import cifar_is_at_hand, load_cifar
from cbam_pl.errors import UserError
from tests.helpers import Official


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
    assert not cifar_is_at_hand(official.name, str(official.root))
    official.write_archive()
    assert cifar_is_at_hand(official.name, str(official.root))
    load_cifar(official.name, str(official.root))
    official.archive.unlink()
    assert cifar_is_at_hand(official.name, str(official.root))
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
