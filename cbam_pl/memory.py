"""Memory that is kept between two training steps."""

import ctypes
import platform

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
