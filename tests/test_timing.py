import resource
import time
from pathlib import Path

import pytest
import torch

from cbam_pl.timing import peak_memory, time_in_turns

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("threads", "clock", "other"), [(1, "process_time", "perf_counter"), (2, "perf_counter", "process_time")]
)
def test_each_work_is_timed_in_every_round(threads, clock, other, monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(time, clock, lambda: now[0])
    monkeypatch.setattr(time, other, None)

    def work(name, seconds):
        calls.append(name)
        now[0] += seconds

    works = {"slow": lambda: work("slow", 4.0), "fast": lambda: work("fast", 2.0)}
    assert time_in_turns(works, 2, 5.0, CPU) == {"slow": [4.0, 4.0], "fast": [2.0, 2.0]}
    # Two calls of each before, then in turns one more and as many as take five seconds: two and three.
    assert calls == ["slow"] * 2 + ["fast"] * 2 + (["slow"] * 3 + ["fast"] * 4) * 2


def test_the_peak_stays_when_memory_is_freed():
    before = peak_memory(CPU)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    held = bytearray(int(before * 2**20) - resident + 100_000_000)
    held[::4096] = b"x" * len(held[::4096])
    del held
    assert peak_memory(CPU) > before + 80  # 2²⁰ bytes each
