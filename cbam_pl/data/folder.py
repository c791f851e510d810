"""A user's own images: folders of labelled images, decoded in parallel and cached in one file."""

import contextlib
import hashlib
import logging
import math
import os
import re
import stat
import uuid
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cbam_pl.data.images import Images, Source
from cbam_pl.errors import UserError
from cbam_pl.memory import refuse_beyond_memory

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_CACHE_VERSION = 1  # raise it when decode() gives other pixels
_MAX_WORKERS = 8
_CHUNK = 64  # images; fewer are decoded sooner than a worker process starts

_log = logging.getLogger(__name__)


def load_folder(root: str, image_size: int = 32) -> Source:
    """The images in <root>/train/<class>/, <root>/test/<class>/ and, if there, <root>/val/<class>/.

    JPEG, PNG, BMP and WebP files are read, told by suffix; hidden files and others are passed over. The
    decoded images are kept in <root>/.cbam_pl_<image_size>.pt, which is made anew when a file is added,
    removed or changed.

    Args:
        root: folder that holds train, test and perhaps val.
        image_size: height and width, in pixels, that every image is resized to.

    Raises:
        UserError: a split is missing, its classes are not those of train, a class is empty, or an image
            cannot be decoded.
    """
    folder = Path(root).expanduser()
    classes = list_classes(root)
    names = ["train", "test"] + (["val"] if (folder / "val").is_dir() else [])
    splits = {name: _list_split(folder, name, classes) for name in names}
    fingerprint = _fingerprint(folder, splits, image_size)
    cache = folder / f".cbam_pl_{image_size}.pt"
    content = _read_cache(cache, fingerprint)
    if content is None:
        content = _decode_splits(splits, image_size)
        _write_cache(cache, fingerprint, content)
    images = {name: Images(content[name]["pixels"], content[name]["labels"]) for name in names}
    return Source(classes, images["train"], images["test"], images.get("val"))


def list_classes(root: str) -> list[str]:
    """The sorted names of the folders in <root>/train.

    Raises:
        UserError: root or its train folder is missing, or holds no class.
    """
    train = Path(root).expanduser() / "train"
    if not train.parent.is_dir():
        raise UserError(f"--data.root {show(root)} is no folder; give one that holds train/<class>/ and test/<class>/")
    if not train.is_dir():
        raise UserError(f"{show(train)} is missing; put the training images into {show(train)}/<class>/")
    classes = _list_folders(train)
    if not classes:
        raise UserError(f"{show(train)} holds no class; put the training images into {show(train)}/<class>/")
    for name in classes:
        if any("\ud800" <= sign <= "\udfff" for sign in name):  # what stands for bytes that are no text
            raise UserError(f"the class folder {show(train / name)} has a name that is not UTF-8; rename it")
    return classes


def count_training_images(root: str) -> int:
    """How many images <root>/train holds, without decoding one.

    Raises:
        UserError: as `load_folder` does for what it refuses before it decodes.
    """
    return len(_list_split(Path(root).expanduser(), "train", list_classes(root)))


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """A user's own images, sorted as people count: 2.png before 10.png.

    Args:
        paths: image files, and folders that are searched at any depth.

    Raises:
        UserError: a path does not exist or is no image, or a folder has no image.
    """
    found: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            inside = [name for name, _ in _scan_images(str(path))]
            if not inside:
                raise UserError(f"{show(path)} has no image; it should hold files that end in {', '.join(SUFFIXES)}")
            found.update(map(Path, inside))
        elif not path.is_file():
            raise UserError(f"{show(path)} does not exist; give image files or folders of images")
        elif path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{show(path)} is no image; its name should end in {', '.join(SUFFIXES)}")
        else:
            found.add(path)
    return sorted(found, key=_natural_key)


def decode(path: str | Path, image_size: int) -> Tensor:
    """Decode one image: upright, RGB, resized with antialiasing; of an animation the first frame.

    Args:
        path: a JPEG, PNG, BMP or WebP file.
        image_size: height and width of the result in pixels.

    Shape:
        (3, image_size, image_size) uint8.

    Raises:
        UserError: the file is no whole image of these formats.
    """
    try:
        pixels = _decode(path, image_size)
    # decoders of damaged files raise nearly anything: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise UserError(f"{show(path)} cannot be decoded ({_reason(error)}); replace it or remove it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def show(path: str | Path) -> str:
    """A path for a message of one line, with escapes where it has a line break or another unprintable."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _decode(path: str | Path, image_size: int) -> np.ndarray:
    """(image_size, image_size, 3) uint8."""
    with Image.open(path, formats=_FORMATS) as file:
        ImageOps.exif_transpose(file, in_place=True)
        image: Image.Image = file
        if image.mode.startswith("I"):
            # 16-bit grey, which convert("RGB") would clip at 255; 65535 / 257 = 255
            grey = np.clip(np.rint(np.asarray(image) / 257), 0, 255).astype(np.uint8)
            image = Image.fromarray(grey)
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # PIL warns when such a palette turns into RGB at once
        image = image.convert("RGB")
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(image)


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, UnidentifiedImageError):  # its own text only repeats the path
        text = "not a JPEG, PNG, BMP or WebP image"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    return " ".join(text.split()) or type(error).__name__


def _natural_key(path: Path) -> list[tuple[int, int, str]]:
    # [0-9], not \d: int() knows only some of the signs that \d matches
    parts = re.split(r"([0-9]+)", str(path))
    return [(0, int(part), part) if part.isdecimal() and part.isascii() else (1, 0, part) for part in parts]


def _list_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _scan(folder) if entry.is_dir())


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds, without hidden entries."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{show(folder)} cannot be read ({_reason(error)}); mend its permissions") from error


def _scan_images(folder: str) -> list[tuple[str, os.stat_result | None]]:
    """Path and file status of each image in a folder, at any depth; None for a dangling link.

    Linked folders inside are not entered, because they may form a loop.
    """
    found: list[tuple[str, os.stat_result | None]] = []
    folders = [folder]
    while folders:
        for entry in _scan(folders.pop()):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.name.lower().endswith(SUFFIXES):
                try:
                    status = entry.stat()
                except OSError:
                    found.append((entry.path, None))
                else:
                    if stat.S_ISREG(status.st_mode):  # opening a pipe would hang, a linked folder is no image
                        found.append((entry.path, status))
    return sorted(found, key=lambda item: item[0])


def _list_split(root: Path, split: str, classes: list[str]) -> list[tuple[str, int, os.stat_result]]:
    """Path, label and status of each image of a split, after a check that its classes are those of train."""
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"{show(folder)} is missing; put the {split} images into {show(folder)}/<class>/")
    others = _list_folders(folder)
    for name in sorted(set(classes) ^ set(others)):
        here, there = ("train", split) if name in classes else (split, "train")
        raise UserError(
            f"the class {show(name)} is in {show(root / here)} but not in {show(root / there)}; "
            f"both need the same class folders"
        )
    images = []
    dangling = []
    for label, name in enumerate(classes):
        found = _scan_images(str(folder / name))
        if not found:
            raise UserError(
                f"the class folder {show(folder / name)} has no image; put images there ("
                f"{', '.join(SUFFIXES)}) or remove the class from every split"
            )
        for path, status in found:
            if status is None:
                dangling.append((path, "a link that leads nowhere"))
            else:
                images.append((path, label, status))
    _raise_bad(dangling)
    return images


def _raise_bad(bad: list[tuple[str, str]]) -> None:
    """Raise for images (path, reason) that cannot be decoded, if there are any."""
    if bad:
        path, reason = bad[0]
        more = f", and {len(bad) - 1} more like it" if len(bad) > 1 else ""
        raise UserError(f"{show(path)} cannot be decoded ({reason}){more}; replace or remove what is damaged")


class _Chunks(Dataset[tuple[Tensor, list[tuple[int, str]]]]):
    """Decoded images, many at once, and the number and reason of each that could not be decoded.

    What is handed over once per image, between processes above all, costs more than decoding a small one.
    """

    def __init__(self, paths: list[str], image_size: int) -> None:
        self.paths = paths
        self.image_size = image_size

    def __len__(self) -> int:
        return math.ceil(len(self.paths) / _CHUNK)

    def __getitem__(self, index: int) -> tuple[Tensor, list[tuple[int, str]]]:
        paths = self.paths[index * _CHUNK : (index + 1) * _CHUNK]
        pixels = np.zeros((len(paths), self.image_size, self.image_size, 3), np.uint8)
        bad = []
        for i, path in enumerate(paths):
            try:
                pixels[i] = _decode(path, self.image_size)
            except Exception as error:  # as in decode(); gathered, so that one message can count them all
                bad.append((index * _CHUNK + i, _reason(error)))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), bad


def _count_cores() -> int:
    # the cores that this process may use, where the system tells; DataLoader warns of more workers than that
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode_splits(
    splits: dict[str, list[tuple[str, int, os.stat_result]]], image_size: int
) -> dict[str, dict[str, Tensor]]:
    """Decode every image of every split, in worker processes where there are many."""
    paths = [path for images in splits.values() for path, _, _ in images]
    # processes, because PIL holds the interpreter lock over small files: threads were slower than none
    num_workers = min(_count_cores(), _MAX_WORKERS, len(paths) // _CHUNK)
    # a generator of its own, so that decoding leaves the global random state as it was
    loader = DataLoader(
        _Chunks(paths, image_size), batch_size=None, num_workers=num_workers, generator=torch.Generator()
    )
    if num_workers:
        print(f"decoding {len(paths):,} images, once", flush=True)
    # Twice, as each split is copied out of them.
    refuse_beyond_memory(2 * len(paths) * 3 * image_size**2, f"{len(paths):,} images of {image_size}×{image_size}")
    pixels = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    bad: list[tuple[str, str]] = []
    console = Console(stderr=True)
    done = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Decoding images (once)", total=len(paths))
        for chunk, unreadable in loader:
            pixels[done : done + len(chunk)] = chunk
            bad += [(paths[i], reason) for i, reason in unreadable]
            done += len(chunk)
            progress.update(task, completed=done)
    _raise_bad(bad)
    labels = [torch.tensor([label for _, label, _ in images]) for images in splits.values()]
    parts = pixels.split([len(part) for part in labels])
    return {
        # clone, because torch.save would write the whole storage under each part
        name: {"pixels": part.clone(), "labels": label}
        for name, part, label in zip(splits, parts, labels, strict=True)
    }


def _fingerprint(root: Path, splits: dict[str, list[tuple[str, int, os.stat_result]]], image_size: int) -> str:
    """A digest of every file's name, size and time of change, and of what decides how they are decoded."""
    lines = [f"{_CACHE_VERSION} {image_size} {list(splits)}"]
    for split, images in splits.items():
        start = len(str(root / split))  # relative names, so that the folder may move together with its cache
        lines += [f"{path[start:]!r} {label} {s.st_size} {s.st_mtime_ns}" for path, label, s in images]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _checksum(content: dict[str, dict[str, Tensor]]) -> int:
    checksum = 0
    for part in content.values():
        for tensor in part.values():
            checksum = zlib.crc32(tensor.contiguous().numpy().data.cast("B"), checksum)
    return checksum


def _read_cache(cache: Path, fingerprint: str) -> dict[str, dict[str, Tensor]] | None:
    """What the cache holds, or None where it is missing, outdated or damaged in any way."""
    if not cache.is_file():
        return None
    try:
        saved: dict[str, Any] = torch.load(cache, mmap=True, weights_only=True)
        if saved["fingerprint"] == fingerprint and saved["checksum"] == _checksum(saved["content"]):
            return saved["content"]
    except Exception:  # whatever is wrong with the file, it is made anew
        _log.debug("unreadable cache %s", cache, exc_info=True)
    return None


def _write_cache(cache: Path, fingerprint: str, content: dict[str, dict[str, Tensor]]) -> None:
    """Write the cache in one step, so that another process never reads half of it."""
    saved = {"fingerprint": fingerprint, "checksum": _checksum(content), "content": content}
    temporary = cache.with_name(f"{cache.name}.{uuid.uuid4().hex}")
    try:
        torch.save(saved, temporary)
        os.replace(temporary, cache)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = _reason(error)
        warnings.warn(f"the decoded images are not cached: {show(cache)} cannot be written ({reason})", stacklevel=2)
    finally:
        with contextlib.suppress(OSError):  # already moved, or on a read-only disk
            temporary.unlink()
