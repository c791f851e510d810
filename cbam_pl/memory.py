"""Memory: what is kept between two training steps, and what cannot be had is refused before it is asked for."""

import ctypes
import platform
import re
from pathlib import Path

from cbam_pl.errors import UserError

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process, for the next step to use again.

    A training step on a CPU makes and frees the same large tensors again and again. By default glibc returns each to
    the kernel, which must then map and clear every page anew: for the cnn with batches of 256, 25,000 page faults a
    step, a tenth of its time; so `python -m benchmarks.throughput` shows. The price is a tenth more resident memory.

    Returns:
        Whether the C library took the settings; others than glibc have no such ones.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    options = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: 1 << 30, _M_TOP_PAD: 64 << 20}  # bytes
    return all(set_option(option, value) for option, value in options.items())


def refuse_beyond_memory(needed: int, what: str) -> None:
    """Refuse images that the machine's free memory cannot hold; Linux would give it, and kill the process later.

    Args:
        needed: bytes.
        what: the images, for the message.

    Raises:
        UserError: with both figures.
    """
    try:
        found = re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:  # another system, which refuses by itself
        return
    if found and needed > 1024 * int(found[1]):
        raise UserError(
            f"{what} need {needed / 1e9:,.1f} GB of memory, and {int(found[1]) / 1e6:,.1f} GB are free; lower "
            "data.image_size"
        )
