"""The decoded images of a folder, cached in one file that is rebuilt when the folder changes."""

import contextlib
import hashlib
import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

File = tuple[str, int, os.stat_result]  # path, label and status of an image
Content = dict[str, dict[str, Tensor]]  # split → name → tensor


def fingerprint_files(root: Path, splits: Mapping[str, Sequence[File]], decoder: str) -> str:
    """A digest of every file's name, label and status, and of the decoder.

    Size and mtime alone miss files that swap places. No program can set ctime, and a file that takes another's place
    has another inode.

    Args:
        root: folder that holds the files; only names relative to it count, so that it may move with its cache.
        splits: files of each split.
        decoder: what decides which tensors the files become.
    """
    start = len(str(root))
    files = [
        (split, path[start:], label, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        for split, members in splits.items()
        for path, label, status in members
    ]
    return hashlib.sha256(repr((decoder, files)).encode()).hexdigest()


def read_cache(path: Path, fingerprint: str) -> Content | None:
    """What the cache holds, or None where it is missing, outdated or unreadable."""
    with contextlib.suppress(Exception):  # whatever is wrong with the file, it is rebuilt
        saved: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
        if saved["fingerprint"] == fingerprint:
            return saved["content"]
    return None


def write_cache(path: Path, fingerprint: str, content: Content) -> None:
    """Write the cache in one step, so that another process never reads half of it; warn where that fails."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        torch.save({"fingerprint": fingerprint, "content": content}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = failure_reason(error)
        warnings.warn(f"the decoded images are not cached: {path} cannot be written ({reason})", stacklevel=2)
        with contextlib.suppress(OSError):  # nothing was written, on a read-only disk
            temporary.unlink()


def failure_reason(error: Exception) -> str:
    """Why something failed, in one line, without the path that some messages repeat."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
