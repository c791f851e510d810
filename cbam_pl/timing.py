"""How long a call takes and how much memory a process holds, on a CPU and on a GPU."""

import platform
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

Key = TypeVar("Key")


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in MB: on the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss there may be that of the parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, such as that of a compilation, on a GPU; a CPU's cannot be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def time_in_turns(
    works: Mapping[Key, Callable[[], Any]], rounds: int, seconds: float, device: torch.device
) -> dict[Key, list[float]]:
    """Seconds per call of each work, round by round, in turns; each is called twice before.

    On a CPU with one thread it is CPU time of this process, which other programs affect less than the wall-clock time.
    """
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    for work in works.values():
        work()
        work()
    times: dict[Key, list[float]] = {key: [] for key in works}
    for _ in range(rounds):
        for key, work in works.items():
            work()  # brings back into the caches what the others drove out
            synchronise(device)
            calls, started = 0, clock()
            while not calls or clock() - started < seconds:
                work()
                calls += 1
                if calls % 10 == 0:
                    synchronise(device)  # a queue of steps takes no time to fill
            synchronise(device)
            times[key].append((clock() - started) / calls)
    return times
