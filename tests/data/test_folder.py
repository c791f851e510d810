"""A user's own images: which files are found, which errors are raised, and when the cache is used."""

import multiprocessing
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cbam_pl.data import folder as folder_module
from cbam_pl.data.folder import decode, find_images, list_classes, load_folder
from cbam_pl.data.images import Source
from cbam_pl.errors import UserError
from tests.helpers import photo, png_bomb

CACHE = ".cbam_pl_8.pt"


def save(path: Path, colour: tuple[int, int, int], size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes; the red channel counts the images, the green channel is 10 for cat and 20 for dog."""
    count = 0
    for split, num in (("train", 3), ("test", 2)):
        for name, green in (("cat", 10), ("dog", 20)):
            for i in range(num):
                save(tmp_path / "data" / split / name / f"{i}.png", (count, green, 0))
                count += 1
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were decoded, and so did not come from the cache."""
    paths: list[str] = []
    real = folder_module._decode

    def record(path: str | Path, *settings: Any) -> tuple[np.ndarray, bytes]:
        paths.append(str(path))
        return real(path, *settings)

    monkeypatch.setattr(folder_module, "_decode", record)
    return paths


def reds(source: Source) -> tuple[list[int], list[int]]:
    return source.train.pixels[:, 0, 0, 0].tolist(), source.test.pixels[:, 0, 0, 0].tolist()


def test_images_in_proportion_are_stored_a_little_larger_in_a_cache_of_their_own(
    root: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_folder(str(root), 8)
    photo(20, 12).save(root / "train" / "cat" / "0.png")
    sources = [load_folder(str(root), 8, in_proportion=True) for _ in range(2)]
    assert len(decoded) == 20  # once each
    assert plain.train.ids is not None
    for source in sources:
        assert source.train.pixels.shape == (6, 3, 9, 9)  # 8 · 256 / 224 = 9.1
        assert torch.equal(source.train.pixels[0, :, :8, :8], decode(root / "train" / "cat" / "0.png", 8, True))
        assert source.train.ids is not None
        assert torch.equal(source.train.ids[1:], plain.train.ids[1:])  # of the files' content
    monkeypatch.setattr(folder_module, "_MEMORY_BYTES", 0)
    (root / ".cbam_pl_8_in_proportion.pt").unlink()
    large = load_folder(str(root), 8, in_proportion=True)  # decoded into a file
    assert torch.equal(large.train.pixels, sources[0].train.pixels)
    assert torch.equal(large.test.pixels, sources[0].test.pixels)
    names = [".cbam_pl_8.pt", ".cbam_pl_8_in_proportion.pt", "test", "train"]
    assert sorted(path.name for path in root.iterdir()) == names


def test_pixels_are_mapped_from_the_cache_from_the_first_run_on(root: Path) -> None:
    source = load_folder(str(root), 8)
    address = source.train.store.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            assert line.endswith(CACHE)
            return
    raise AssertionError("the pixels are nowhere")


@pytest.mark.parametrize("kind", ["empty", "text", "gif", "truncated png", "truncated jpg", "bomb", "pipe", "dangling"])
def test_undecodable_image_is_named(root: Path, kind: str) -> None:
    path = root / "train" / "dog" / "bad.jpg"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "gif":
        noise.save(path, "gif")
    elif kind.startswith("truncated"):
        noise.save(path, {"png": "png", "jpg": "jpeg"}[kind[-3:]])
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "bomb":
        path.write_bytes(png_bomb(20_000, 20_000))
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(root / "nowhere.jpg")
    for call in (lambda: load_folder(str(root), 8), lambda: decode(path, 8)):
        with pytest.raises(UserError, match=r"cannot be (decoded|read) \(.+\)") as caught:
            call()
        assert str(caught.value).startswith(str(path))
        assert len(str(caught.value).splitlines()) == 1
    assert not (root / CACHE).exists()


def test_several_bad_images_are_counted(root: Path) -> None:
    for name in ("train/dog/x.png", "train/dog/y.png", "train/cat/1.png"):
        (root / name).write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"train/cat/1\.png cannot be decoded .* \(and 2 more cannot be decoded\)"):
        load_folder(str(root), 8)


# ----------------------------------------------------------------------------------------- load_folder


def test_pixels_labels_and_classes(root: Path) -> None:
    source = load_folder(str(root), 8)
    assert source.classes == ["cat", "dog"]
    assert source.val is None
    assert source.train.pixels.shape == (6, 3, 8, 8)
    assert source.train.pixels.dtype == torch.uint8
    assert source.train.labels.dtype == torch.int64
    assert reds(source) == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.test.labels.tolist() == [0, 0, 1, 1]
    for images in (source.train, source.test):
        assert images.pixels[:, 1, 7, 7].tolist() == [10 + 10 * label for label in images.labels.tolist()]


def test_val_is_read_where_it_is(root: Path) -> None:
    save(root / "val" / "dog" / "a.png", (99, 20, 0))
    save(root / "val" / "cat" / "a.png", (98, 10, 0))
    source = load_folder(str(root), 8)
    assert source.val is not None
    assert source.val.pixels[:, 0, 0, 0].tolist() == [98, 99]
    assert source.val.labels.tolist() == [0, 1]


def test_many_images_are_decoded_in_order_by_workers(tmp_path: Path) -> None:
    for i in range(300):
        save(tmp_path / "train" / str(i // 150) / f"{i:03}.png", (i % 256, i // 256, 0), size=2)
    for name in "01":
        save(tmp_path / "test" / name / "a.png", (7, 0, 0), size=2)
    before = torch.random.get_rng_state()
    pixels = load_folder(str(tmp_path), 2).train.pixels
    assert torch.equal(before, torch.random.get_rng_state())
    assert (pixels[:, 0, 0, 0].int() + 256 * pixels[:, 1, 0, 0].int()).tolist() == list(range(300))


def test_hidden_and_other_files_are_ignored(root: Path) -> None:
    (root / "train" / "cat" / "._0.png").write_bytes(b"resource fork")
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"")
    (root / "train" / ".git").mkdir()
    (root / "train" / "readme.txt").touch()
    assert reds(load_folder(str(root), 8))[0] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("odd", ["with space", "狗狗", "line\nbreak"])
def test_odd_names(root: Path, odd: str) -> None:
    for split in ("train", "test"):
        save(root / split / odd / f"{odd}.png", (200, 0, 0))
    for _ in range(2):  # decoded, then from the cache
        source = load_folder(str(root), 8)
        assert odd in source.classes
        assert (source.train.labels == source.classes.index(odd)).sum() == 1
    bad = root / "train" / odd / f"{odd}.png"
    bad.write_bytes(b"garbage")
    with pytest.raises(UserError, match="cannot be decoded") as caught:
        load_folder(str(root), 8)
    assert len(str(caught.value).splitlines()) == 1
    assert odd.replace("\n", "\\n") in str(caught.value)


def test_linked_images_and_folders_count_and_loops_do_not_hang(root: Path, tmp_path: Path) -> None:
    (root / "train" / "cat" / "9.png").symlink_to(root / "test" / "cat" / "0.png")
    (root / "train" / "cat" / "loop").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "loop.png").symlink_to(root / "train")
    assert reds(load_folder(str(root), 8))[0] == [0, 1, 2, 6, 3, 4, 5]
    shutil.copytree(root / "test" / "cat", tmp_path / "more")
    (root / "train" / "cat" / "more").symlink_to(tmp_path / "more")
    assert len(load_folder(str(root), 8).train) == 7 + len([*(tmp_path / "more").iterdir()])
    itself = root / "train" / "cat" / "self.png"
    itself.symlink_to(itself)
    with pytest.raises(UserError, match=r"self\.png cannot be read \(Too many levels of symbolic links\)"):
        load_folder(str(root), 8)


def test_missing_root_split_class_and_images(root: Path) -> None:
    with pytest.raises(UserError, match=r"/none/train is not a folder; --data\.root must hold train/<class>/"):
        load_folder(str(root / "none"), 8)
    shutil.rmtree(root / "test" / "dog")
    with pytest.raises(UserError, match=r"the class dog is in .*/train but not in .*/test"):
        load_folder(str(root), 8)
    (root / "test" / "dog").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*/test/dog holds no image"):
        load_folder(str(root), 8)
    save(root / "test" / "dog" / "a.png", (0, 0, 0))
    save(root / "test" / "emu" / "a.png", (0, 0, 0))
    with pytest.raises(UserError, match=r"the class emu is in .*/test but not in .*/train"):
        load_folder(str(root), 8)
    shutil.rmtree(root / "test" / "emu")
    save(root / "val" / "cat" / "a.png", (0, 0, 0))
    with pytest.raises(UserError, match=r"the class dog is in .*/train but not in .*/val"):
        load_folder(str(root), 8)
    shutil.rmtree(root / "test")
    with pytest.raises(UserError, match="/test is missing; put the test images into"):
        load_folder(str(root), 8)


def test_list_classes(root: Path) -> None:
    save(root / "train" / "Ape" / "a.png", (0, 0, 0))
    assert list_classes(str(root)) == ["Ape", "cat", "dog"]
    for name in ("Ape", "cat"):
        shutil.rmtree(root / "train" / name)
    with pytest.raises(UserError, match="/train holds only the class dog; put images of two or more classes"):
        list_classes(str(root))
    shutil.rmtree(root / "train" / "dog")
    with pytest.raises(UserError, match="/train holds no class"):
        list_classes(str(root))


def test_the_home_folder_of_an_unknown_user_is_named() -> None:
    with pytest.raises(UserError, match=r"~nouser/x/train is not a folder"):
        list_classes("~nouser/x")


# ---------------------------------------------------------------------------------------------- cache


def test_second_load_decodes_nothing(root: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_folder(str(root), 8)
    assert len(decoded) == 10
    decoded.clear()
    monkeypatch.chdir(root.parent)
    for spelling in (str(root), "data", "./data/"):
        again = load_folder(spelling, 8)
        assert reds(again) == reds(first)
        assert again.train.labels.tolist() == first.train.labels.tolist()
        assert again.classes == first.classes
    assert decoded == []
    assert sorted(path.name for path in root.iterdir()) == [CACHE, "test", "train"]


def change_pixels(root: Path) -> None:
    path = root / "train" / "cat" / "1.png"
    status = path.stat()
    save(path, (101, 0, 0))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def add_image(root: Path) -> None:
    save(root / "train" / "dog" / "9.png", (101, 0, 0))


def remove_image(root: Path) -> None:
    (root / "train" / "dog" / "0.png").unlink()


def rename_class(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "emu")


def change_pixels_only(root: Path) -> None:
    path = root / "train" / "cat" / "1.png"
    status = path.stat()
    save(path, (101, 10, 0))
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(root: Path, names: tuple[str, str]) -> None:
    """Swap two images or folders; all images have the same size and mtime."""
    first, second = (root / "train" / name for name in names)
    first.rename(root / "other")
    second.rename(first)
    (root / "other").rename(second)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_pixels, [0, 101, 2, 3, 4, 5]),
        (change_pixels_only, [0, 101, 2, 3, 4, 5]),
        (add_image, [0, 1, 2, 3, 4, 5, 101]),
        (remove_image, [0, 1, 2, 4, 5]),
        (rename_class, [3, 4, 5, 0, 1, 2]),
        (partial(swap, names=("cat/0.png", "dog/0.png")), [3, 1, 2, 0, 4, 5]),
        (partial(swap, names=("cat", "dog")), [3, 4, 5, 0, 1, 2]),
    ],
)
def test_a_change_rebuilds_the_cache(root: Path, change: Callable[[Path], None], expected: list[int]) -> None:
    for path in root.rglob("*.png"):
        os.utime(path, (1_700_000_000,) * 2)  # as unzipping does
    assert len({path.stat().st_size for path in root.rglob("*.png")}) == 1
    load_folder(str(root), 8)
    change(root)
    assert reds(load_folder(str(root), 8))[0] == expected


def test_an_unreadable_cache_is_rebuilt(root: Path, decoded: list[str]) -> None:
    load_folder(str(root), 8)
    data = (root / CACHE).read_bytes()
    (root / CACHE).unlink()  # the one that is open stays as it is
    (root / CACHE).write_bytes(data[: len(data) // 2])
    assert reds(load_folder(str(root), 8)) == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])
    assert len(decoded) == 20
    load_folder(str(root), 8)
    assert len(decoded) == 20


def test_cache_never_runs_code(root: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save(Evil(), root / CACHE)
    load_folder(str(root), 8)
    assert not (tmp_path / "evil").exists()


def test_each_image_size_has_its_own_cache(root: Path) -> None:
    assert load_folder(str(root), 8).train.pixels.shape == (6, 3, 8, 8)
    assert load_folder(str(root), 4).train.pixels.shape == (6, 3, 4, 4)
    assert (root / CACHE).is_file()
    assert (root / ".cbam_pl_4.pt").is_file()


@pytest.mark.parametrize("function", ["torch.save", "os.replace"])
def test_root_that_cannot_be_written_warns_in_one_line(
    root: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(function, deny)
    with pytest.warns(UserWarning, match=CACHE) as warned:
        assert reds(load_folder(str(root), 8))[0] == [0, 1, 2, 3, 4, 5]
    assert [str(warning.message) for warning in warned] == [
        f"the decoded images are not cached: {root / CACHE} cannot be written (Permission denied)"
    ]
    assert sorted(path.name for path in root.iterdir()) == ["test", "train"]


def load_in_process(root: str) -> list[int]:
    return reds(load_folder(root, 8))[0]


def test_ctrl_c_while_the_cache_is_written_leaves_no_part_of_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(content: object, path: Path) -> None:
        path.write_text("half of it")
        raise KeyboardInterrupt

    before = {*root.iterdir()}
    monkeypatch.setattr(torch, "save", write)
    with pytest.raises(KeyboardInterrupt):
        load_folder(str(root), 8)
    assert {*root.iterdir()} == before


def test_processes_that_load_at_once(root: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(load_in_process, [str(root)] * 12, chunksize=1)
    assert results == [[0, 1, 2, 3, 4, 5]] * 12
    assert sorted(path.name for path in root.iterdir()) == [CACHE, "test", "train"]


def test_ids_depend_on_content_and_label(root: Path) -> None:
    first = load_folder(str(root), 8).train.ids
    assert first is not None
    assert len(first.unique()) == 6
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / "9.png")
    renamed = load_folder(str(root), 8).train.ids
    assert renamed.tolist() == first[[1, 2, 0, 3, 4, 5]].tolist()
    (root / "train" / "cat" / "9.png").rename(root / "train" / "dog" / "9.png")
    relabelled = load_folder(str(root), 8).train.ids
    assert relabelled[:-1].tolist() == first[1:].tolist()
    assert relabelled[-1] not in first


# ----------------------------------------------------------------------------------------- find_images


def test_find_images_sorts_at_any_depth(tmp_path: Path) -> None:
    for name in ("10.png", "9.JPG", "1.webp", "b/2.bmp", "b/.hidden.png", "b/notes.txt", "b/x10y3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "x9y20.png").touch()
    expected = ["1.webp", "10.png", "9.JPG", "b/2.bmp", "b/x10y3.png", "b/x9y20.png"]
    assert find_images([tmp_path]) == [tmp_path / name for name in expected]
    twice = [str(tmp_path / "b"), tmp_path / "b" / "2.bmp", tmp_path / "9.JPG"]
    assert find_images(twice) == [tmp_path / name for name in ["9.JPG", *expected[3:]]]


def test_find_images_rejects_other_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/none\.png does not exist"):
        find_images([tmp_path / "none.png"])
    with pytest.raises(UserError, match="holds no image; its files must end in"):
        find_images([tmp_path])
    (tmp_path / "a\n.txt").touch()
    with pytest.raises(UserError, match=r"a\\n\.txt' is not a supported image") as caught:
        find_images([tmp_path / "a\n.txt"])
    assert "\n" not in str(caught.value)
