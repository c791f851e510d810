import subprocess
import sys
import time

import pytest
import torch

from cbam_pl.timing import time_in_turns
from tests.helpers import REPOSITORY


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
    assert time_in_turns(works, 2, 5.0, torch.device("cpu")) == {"slow": [4.0, 4.0], "fast": [2.0, 2.0]}
    # Two calls of each before, then in turns one more and as many as take five seconds: two and three.
    assert calls == ["slow"] * 2 + ["fast"] * 2 + (["slow"] * 3 + ["fast"] * 4) * 2


def test_the_peak_stays_when_memory_is_freed():
    # In a process of its own, whose peak is not far above what it holds.
    script = """
import torch
from cbam_pl.timing import peak_memory
before = peak_memory(torch.device("cpu"))
held = b"x" * (900 << 20)
del held
print(before, peak_memory(torch.device("cpu")))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    before, after = map(float, run.stdout.split())  # 2²⁰ bytes each
    assert 100 < before < 900 < after < before + 1000
