"""A user's own images: folders of labelled images, decoded in parallel and cached in one file."""

import contextlib
import hashlib
import io
import os
import sys
import uuid
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from cbam_pl.data.images import Images, Source
from cbam_pl.environment import num_cores
from cbam_pl.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

_File = tuple[str, int, os.stat_result]  # path, label and status of an image
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_DECODER_VERSION = 2  # raise it when decode() gives other pixels, or load_folder other tensors
_MAX_WORKERS = 8
_CHUNK = 64  # images; fewer are decoded sooner than a worker process starts


def load_folder(root: str, image_size: int = 32) -> Source:
    """The images in <root>/train/<class>/, <root>/test/<class>/ and, if it exists, <root>/val/<class>/.

    Files with the suffix of a JPEG, PNG, BMP or WebP image are read and resized to image_size × image_size pixels;
    hidden files and all others are ignored. The decoded images are cached in <root>/.cbam_pl_<image_size>.pt, which is
    rebuilt when a file is added, removed, replaced or changed.
    """
    folder = Path(os.path.expanduser(root))
    classes = list_classes(root)
    names = ["train", "test"] + (["val"] if (folder / "val").is_dir() else [])
    splits = {name: _list_split(folder, name, classes) for name in names}
    cache = folder / f".cbam_pl_{image_size}.pt"
    fingerprint = _fingerprint(folder, splits, image_size)
    content = _read_cache(cache, fingerprint)
    if content is None:
        content = {name: _decode_split(files, image_size) for name, files in splits.items()}
        _write_cache(cache, fingerprint, content)
    images = {name: Images(**tensors) for name, tensors in content.items()}
    return Source(classes, images["train"], images["test"], images.get("val"))


def list_classes(root: str) -> list[str]:
    """The sorted names of the folders in <root>/train, of which there must be two or more."""
    train = Path(os.path.expanduser(root)) / "train"
    if not train.is_dir():
        raise UserError(f"{show(train)} is not a folder; --data.root must hold train/<class>/ and test/<class>/")
    classes = _list_folders(train)
    if len(classes) < 2:
        found = f"only the class {show(classes[0])}" if classes else "no class"
        raise UserError(f"{show(train)} holds {found}; put images of two or more classes into {show(train)}/<class>/")
    return classes


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files in `paths`, files and folders of any depth, sorted."""
    found: set[Path] = set()
    suffixes = ", ".join(SUFFIXES)
    for path in map(Path, paths):
        if path.is_dir():
            if not (inside := _walk_images(path)):
                raise UserError(f"{show(path)} holds no image; its files must end in {suffixes}")
            found.update(map(Path, inside))
        elif not path.is_file():
            raise UserError(f"{show(path)} does not exist; give image files or folders of images")
        elif path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{show(path)} is not a supported image; its name must end in {suffixes}")
        else:
            found.add(path)
    return sorted(found)


def decode(path: str | Path, image_size: int) -> Tensor:
    """One image file's first frame, upright, RGB, on white, resized with antialiasing, (3, H, W) uint8."""
    return torch.from_numpy(_decode(path, image_size)[0]).permute(2, 0, 1).contiguous()


def show(path: str | Path) -> str:
    """A path for a one-line message; line breaks and other unprintable characters are escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _decode(path: str | Path, image_size: int) -> tuple[np.ndarray, bytes]:
    """Pixels (image_size, image_size, 3) uint8, and the file's content."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
            raise OSError("not a regular file")
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=_FORMATS) as file:
            ImageOps.exif_transpose(file, in_place=True)
            image = _to_rgb(file)
        if image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    # decoders of damaged files raise nearly anything: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        # Pillow's text for an unknown format names a buffer in memory
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a JPEG, PNG, BMP or WebP image" if unknown else _failure_reason(error)
        raise UserError(f"{show(path)} cannot be decoded ({reason}); replace or remove it") from error
    return np.array(image), content


def _failure_reason(error: Exception) -> str:
    # without the path that some messages repeat
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey, which convert("RGB") would clip at 255; 65535 / 257 = 255
        return Image.fromarray(np.clip(np.rint(np.asarray(image) / 257), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


def _raise_unreadable(error: OSError) -> None:
    raise UserError(f"{show(error.filename)} cannot be read ({_failure_reason(error)})") from error


def _list_folders(folder: Path) -> list[str]:
    _, names, _ = next(os.walk(folder, onerror=_raise_unreadable))
    return sorted(name for name in names if not name.startswith("."))


def _walk_images(folder: Path) -> list[str]:
    """The paths of the images in a folder, at any depth; linked folders are skipped, as they may form a loop."""
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        found += [os.path.join(parent, name) for name in images]
    return sorted(found)


def _list_split(root: Path, split: str, classes: list[str]) -> list[_File]:
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"{show(folder)} is missing; put the {split} images into {show(folder)}/<class>/")
    for name in sorted(set(classes) ^ set(_list_folders(folder))):
        here, there = (root / "train", folder) if name in classes else (folder, root / "train")
        raise UserError(f"the class {show(name)} is in {show(here)} but not in {show(there)}; both need it")
    files: list[_File] = []
    for label, name in enumerate(classes):
        paths = _walk_images(folder / name)
        if not paths:
            raise UserError(f"the class folder {show(folder / name)} holds no image ({', '.join(SUFFIXES)})")
        try:
            files += [(path, label, os.stat(path)) for path in paths]
        except OSError as error:
            _raise_unreadable(error)
    return files


def _decode_chunk(files: list[_File], image_size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Pixels and ids of many images, as an exchange per image costs more than its decoding, and their failures."""
    pixels = np.zeros((len(files), image_size, image_size, 3), np.uint8)
    ids = np.zeros(len(files), np.int64)
    failures = []
    for i, (path, label, _) in enumerate(files):
        try:
            pixels[i], content = _decode(path, image_size)
        except UserError as error:  # gathered, so that one message can count them all
            failures.append(str(error))
        else:
            digest = hashlib.blake2b(content, digest_size=8, salt=label.to_bytes(8, "big")).digest()
            ids[i] = int.from_bytes(digest, "big", signed=True)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(ids), failures


def _decode_split(files: list[_File], image_size: int) -> dict[str, Tensor]:
    chunks: DataLoader[Any] = DataLoader(
        files,  # type: ignore[arg-type]  # a list has all that DataLoader asks of a Dataset
        batch_size=_CHUNK,
        collate_fn=partial(_decode_chunk, image_size=image_size),
        # processes, because PIL holds the interpreter lock over small files: threads were slower than none
        num_workers=min(num_cores(), _MAX_WORKERS, len(files) // _CHUNK),
        generator=torch.Generator(),  # so that decoding leaves the global random state as it was
    )
    pixels = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    ids = torch.empty(len(files), dtype=torch.int64)
    failures: list[str] = []
    bar = track(chunks, "Decoding images", len(chunks), console=Console(stderr=True), disable=not sys.stderr.isatty())
    for part, part_ids, decoded in zip(pixels.split(_CHUNK), ids.split(_CHUNK), bar, strict=True):
        part.copy_(decoded[0])
        part_ids.copy_(decoded[1])
        failures += decoded[2]
    if failures:
        more = f" (and {len(failures) - 1} more cannot be decoded)" if len(failures) > 1 else ""
        raise UserError(failures[0] + more)
    return {"pixels": pixels, "labels": torch.tensor([label for _, label, _ in files]), "ids": ids}


def _fingerprint(root: Path, splits: dict[str, list[_File]], image_size: int) -> str:
    """A digest of the decoder and of every file's name below root, which may move with its cache, label and status."""
    # Size and mtime alone miss files that swap places; no program can set ctime, and another file has another inode.
    start = len(str(root))
    files = [
        (split, path[start:], label, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        for split, members in splits.items()
        for path, label, status in members
    ]
    decoder = f"decoded by {_DECODER_VERSION} at {image_size}"
    return hashlib.sha256(repr((decoder, files)).encode()).hexdigest()


def _read_cache(path: Path, fingerprint: str) -> dict[str, dict[str, Tensor]] | None:
    with contextlib.suppress(Exception):  # whatever is wrong with the file, it is rebuilt
        saved: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
        if saved["fingerprint"] == fingerprint:
            return saved["content"]
    return None


def _write_cache(path: Path, fingerprint: str, content: dict[str, dict[str, Tensor]]) -> None:
    """Write the cache in one step, so that another process never reads half of it; warn where that fails."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        torch.save({"fingerprint": fingerprint, "content": content}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = _failure_reason(error)
        warnings.warn(f"the decoded images are not cached: {path} cannot be written ({reason})", stacklevel=2)
        with contextlib.suppress(OSError):  # nothing was written, on a read-only disk
            temporary.unlink()
