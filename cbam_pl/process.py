"""What the program changes of its process, each with its reason; what must precede torch is in cli.py."""

import ctypes
import io
import logging
import os
import platform
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def configure_process() -> None:
    """Set up messages, memory and the environment for a command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes that are not text
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    # Lightning 2.6 uses what torch 2.14 deprecates.
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)
    # The folder of a resumed run is meant to hold its checkpoints.
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty", UserWarning)
    # Lightning's tips and device lists; the summary has what matters. Warnings and errors stay.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # which report so
    if not torch.cuda.is_available():
        # Lightning sets it for the sake of forked processes. With it, where there is no GPU, torch 2.14 looks for
        # NVIDIA's library at every optimizer step, which takes as long as the rest of a small network's update.
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    keep_freed_memory()
    if os.getcwd() not in sys.path:  # so that model.network finds the user's files; last, so that they hide no package
        sys.path.append(os.getcwd())
    threading.excepthook = _report


def _report(met: threading.ExceptHookArgs, report: Callable[..., Any] = threading.excepthook) -> None:
    # TensorBoard writes in a thread of its own, and raises its error in the main thread, too, at the next event.
    if not isinstance(met.exc_value, OSError):
        report(met)


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process, for the next step to use again.

    A training step on a CPU makes and frees the same large tensors again and again. By default glibc returns each to
    the kernel, which must then map and clear every page again: for the cnn with batches of 256, 25,000 page faults a
    step, a tenth of its time (benchmarks/NOTES.md). The price is a tenth more resident memory. Returns False where the
    C library is not glibc, which alone has these settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    options = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: 1 << 30, _M_TOP_PAD: 64 << 20}  # bytes
    return all(set_option(option, value) for option, value in options.items())


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """For torchvision's downloads, which have no timeout of their own: a network that drops packets would hang them."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """For TensorBoard's graph, which has no way but torch.jit.trace: deprecated, and its errors are printed as well."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", ".*torch.jit", category)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # of checks of shapes
        yield


@contextmanager
def quiet_export() -> Iterator[None]:
    """For torch.export and torch.onnx, which warn of their own code, and print the graph beside an error they raise."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """For many small operations, in which several threads would mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
