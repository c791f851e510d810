"""A user's own images: folders of labelled images, decoded in parallel and cached in one file."""

import contextlib
import hashlib
import io
import os
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import center_crop, resize

from cbam_pl.data.images import Images, Source
from cbam_pl.environment import num_cores
from cbam_pl.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

_File = tuple[str, int, os.stat_result]  # path, label and status of an image
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_DECODER_VERSION = 2  # raise it when decode() gives other pixels, or load_folder other tensors
_MAX_WORKERS = 8
_CHUNK = 64  # images; fewer are decoded sooner than a worker process starts
_CHUNK_BYTES = 4 << 20  # at most, as all chunks under way must fit into the 64 MB of shared memory that Docker gives
_MEMORY_BYTES = 1 << 30  # more pixels than this are decoded into a file
_TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DRAFT = 2  # a JPEG is decoded at a smaller scale where it is still this many times as large as what it is resized to


def stored_size(image_size: int) -> int:
    """Height and width in which images that keep their proportions are stored, to cut image_size × image_size from."""
    return round(image_size * 256 / 224)  # the sizes of torchvision's references


def load_folder(root: str, image_size: int = 32, in_proportion: bool = False) -> Source:
    """The images in <root>/train/<class>/, <root>/test/<class>/ and, if it exists, <root>/val/<class>/.

    Files with the suffix of a JPEG, PNG, BMP or WebP image are read and resized to image_size × image_size pixels;
    hidden files and all others are ignored. The decoded images are cached in <root>/.cbam_pl_<image_size>.pt, which is
    rebuilt when a file is added, removed, replaced or changed, and mapped into memory.

    With `in_proportion` an image's shorter side becomes stored_size(image_size) pixels, the longer one is cut to that
    in the middle, and the cache is another file. What is cut off, a quarter of a photo of 4:3, is not used.
    """
    folder = Path(os.path.expanduser(root))
    classes = list_classes(root)
    names = ["train", "test"] + (["val"] if (folder / "val").is_dir() else [])
    splits = {name: _list_split(folder, name, classes) for name in names}
    size = stored_size(image_size) if in_proportion else image_size
    cache = folder / (f".cbam_pl_{image_size}_in_proportion.pt" if in_proportion else f".cbam_pl_{image_size}.pt")
    fingerprint = _fingerprint(folder, splits, f"{size} in proportion" if in_proportion else f"{size}")
    content = _read_cache(cache, fingerprint)
    if content is None:
        content = {name: _decode_split(files, size, in_proportion, folder) for name, files in splits.items()}
        _write_cache(cache, fingerprint, content)
        content = _read_cache(cache, fingerprint) or content
    images = {name: Images(part["pixels"], part["labels"], ids=part["ids"]) for name, part in content.items()}
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


def decode(path: str | Path, image_size: int, in_proportion: bool = False) -> Tensor:
    """One image file's first frame, upright, RGB, on white, resized with antialiasing, (3, H, W) uint8.

    With `in_proportion` as `load_folder` reads it, cut to its middle image_size × image_size pixels.
    """
    size = stored_size(image_size) if in_proportion else image_size
    return _middle(_decode(path, size, in_proportion)[0], image_size)


def fit_image(image: Image.Image, image_size: int, in_proportion: bool = False) -> Tensor:
    """An image of Pillow as `decode` gives a file's, (3, H, W) uint8."""
    size = stored_size(image_size) if in_proportion else image_size
    return _middle(_fit(_to_upright_rgb(image), size, in_proportion), image_size)


def fit_tensor(images: Tensor, image_size: int, in_proportion: bool = False) -> Tensor:
    """Images (B, 3, H, W), uint8 or floats, resized with antialiasing and cut as `decode` does."""
    if in_proportion:
        return center_crop(_cut(images, stored_size(image_size)), [image_size, image_size])
    return resize(images, [image_size, image_size], antialias=True)


def raise_failures(failures: Sequence[str]) -> None:
    """A UserError of the first file that could not be decoded, if any, which counts the others."""
    if failures:
        more = f" (and {len(failures) - 1} more cannot be decoded)" if len(failures) > 1 else ""
        raise UserError(failures[0] + more)


def show(path: str | Path) -> str:
    """A path for a one-line message; line breaks and other unprintable characters are escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _decode(path: str | Path, size: int, in_proportion: bool) -> tuple[np.ndarray, bytes]:
    """Pixels (size, size, 3) uint8, and the file's content."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
            raise OSError("not a regular file")
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=_FORMATS) as file:
            if in_proportion:
                file.draft(None, (_DRAFT * size, _DRAFT * size))
            image = _to_upright_rgb(file)
        pixels = _fit(image, size, in_proportion)
    # decoders of damaged files raise nearly anything: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        # Pillow's text for an unknown format names a buffer in memory
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a JPEG, PNG, BMP or WebP image" if unknown else _failure_reason(error)
        raise UserError(f"{show(path)} cannot be decoded ({reason}); replace or remove it") from error
    return pixels, content


def _fit(image: Image.Image, size: int, in_proportion: bool) -> np.ndarray:
    """Pixels (size, size, 3) uint8 of an RGB image."""
    if in_proportion:
        # of tensors, as this takes a third of Pillow's time for the same pixels
        return _cut(torch.from_numpy(np.array(image)).permute(2, 0, 1), size).permute(1, 2, 0).numpy()
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def _cut(pixels: Tensor, size: int) -> Tensor:
    """Resize the shorter side of (…, H, W) to `size`, and cut the middle of the longer one to it."""
    height, width = pixels.shape[-2:]
    # a strip of few pixels, in proportion, could exceed memory
    pixels = center_crop(pixels, [min(height, 8 * width), min(width, 8 * height)])
    return center_crop(resize(pixels, [size], antialias=True), [size, size])


def _middle(pixels: np.ndarray, size: int) -> Tensor:
    """The middle (3, size, size) of pixels (H, W, 3)."""
    return center_crop(torch.from_numpy(pixels).permute(2, 0, 1), [size, size]).contiguous()


def _failure_reason(error: Exception) -> str:
    # without the path that some messages repeat
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = None
    # Not by ImageOps.exif_transpose, which writes the metadata again, and fails where a tag has an odd type.
    with contextlib.suppress(Exception):  # missing or damaged metadata are no reason to reject an image
        turn = _TURNS[image.getexif()[ExifTags.Base.Orientation]]
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


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
    """The paths of the images in a folder, at any depth; links to what is above it, or found already, are skipped."""
    found, seen, top = [], set(), os.path.realpath(folder)
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen or top.startswith(os.path.join(place, "")):
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
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


def _decode_chunk(files: list[_File], size: int, in_proportion: bool) -> tuple[Tensor, Tensor, list[str]]:
    """Pixels and ids of many images, as an exchange per image costs more than its decoding, and their failures."""
    pixels = np.zeros((len(files), size, size, 3), np.uint8)
    ids = np.zeros(len(files), np.int64)
    failures = []
    for i, (path, label, _) in enumerate(files):
        try:
            pixels[i], content = _decode(path, size, in_proportion)
        except UserError as error:  # gathered, so that one message can count them all
            failures.append(str(error))
        else:
            digest = hashlib.blake2b(content, digest_size=8, salt=label.to_bytes(8, "big")).digest()
            ids[i] = int.from_bytes(digest, "big", signed=True)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(ids), failures


def _decode_split(files: list[_File], size: int, in_proportion: bool, folder: Path) -> dict[str, Tensor]:
    chunk = max(1, min(_CHUNK, _CHUNK_BYTES // (3 * size**2)))
    chunks: DataLoader[Any] = DataLoader(
        files,  # type: ignore[arg-type]  # a list has all that DataLoader asks of a Dataset
        batch_size=chunk,
        collate_fn=partial(_decode_chunk, size=size, in_proportion=in_proportion),
        # processes, because PIL holds the interpreter lock over small files: threads were slower than none
        num_workers=min(num_cores(), _MAX_WORKERS, len(files) // _CHUNK),
        generator=torch.Generator(),  # so that decoding leaves the global random state as it was
    )
    pixels = _allocate(3 * size**2 * len(files), folder)
    # the channels of a pixel side by side, where images are resized again
    pixels = pixels.view(-1, size, size, 3).permute(0, 3, 1, 2) if in_proportion else pixels.view(-1, 3, size, size)
    ids = torch.empty(len(files), dtype=torch.int64)
    failures: list[str] = []
    bar = track(chunks, "Decoding images", len(chunks), console=Console(stderr=True), disable=not sys.stderr.isatty())
    for part, part_ids, decoded in zip(pixels.split(chunk), ids.split(chunk), bar, strict=True):
        part.copy_(decoded[0])
        part_ids.copy_(decoded[1])
        failures += decoded[2]
    raise_failures(failures)
    return {"pixels": pixels, "labels": torch.tensor([label for _, label, _ in files]), "ids": ids}


def _allocate(num_bytes: int, folder: Path) -> Tensor:
    """A uint8 tensor; a large one in an unnamed file of the folder, if that has space, as it may exceed memory."""
    if num_bytes > _MEMORY_BYTES:
        unavailable = contextlib.suppress(OSError, AttributeError)  # macOS has no posix_fallocate
        with unavailable, tempfile.NamedTemporaryFile(dir=folder, prefix=".cbam_pl_") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # a mapping cannot report that the disk is full
            return torch.from_file(file.name, shared=True, size=num_bytes, dtype=torch.uint8)
    return torch.empty(num_bytes, dtype=torch.uint8)


def _fingerprint(root: Path, splits: dict[str, list[_File]], size: str) -> str:
    """A digest of the decoder and of every file's name below root, which may move with its cache, label and status."""
    # Size and mtime alone miss files that swap places; no program can set ctime, and another file has another inode.
    files = [
        (
            split,
            path[len(str(root / split)) :],
            label,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
        )
        for split, members in splits.items()
        for path, label, status in members
    ]
    decoder = f"decoded by {_DECODER_VERSION} at {size}"
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
    finally:  # also after Ctrl-C
        with contextlib.suppress(OSError):  # nothing is left, or was written, on a read-only disk
            temporary.unlink()
