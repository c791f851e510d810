"""The benchmarks run and print what they promise; their figures are for a quiet machine."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from benchmarks import gpu, measure
from benchmarks.naive import NaiveCNN
from benchmarks.scaling import expected_efficiency
from cbam_pl.models import build_network
from tests.helpers import REPOSITORY


def test_the_naive_network_computes_what_ours_does():
    torch.manual_seed(0)
    naive, ours = NaiveCNN(10).eval(), build_network("cnn", 10, "cbam").eval()
    # In both, parameters come in the order of the layers.
    source, target = list(naive.parameters()), list(ours.parameters())
    assert len(source) == len(target)
    with torch.no_grad():
        for ours_parameter, naive_parameter in zip(target, source, strict=True):
            ours_parameter.copy_(naive_parameter.view_as(ours_parameter))
        images = torch.randn(3, 3, 32, 32)
        assert torch.allclose(naive(images), ours(images), atol=1e-5)


def test_the_clock_counts_whole_steps_and_leaves_out_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    ours, theirs = multiprocessing.Pipe()
    clock = measure.RoundClock(theirs, torch.device("cpu"))

    def steps():
        while True:
            now[0] += 0.01
            clock.pause()
            now[0] += 0.02
            clock.resume()
            clock.step(7)

    def work():
        with pytest.raises(measure._Finished):
            steps()

    worker = threading.Thread(target=work)
    worker.start()
    assert ours.recv() == "ready"
    ours.send(0.3)
    rate = ours.recv()
    ours.send(None)
    worker.join(10)
    assert not worker.is_alive()
    assert rate == pytest.approx(7 / 0.01)


def test_ratios_are_taken_round_by_round():
    assert measure.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == measure.Spread(2.0, 1.0, 3.0)


def test_expected_efficiency_is_the_ring_all_reduces():
    # 4 GPUs: 2 · 3/4 of 8 bytes at 4 bytes/s are 3 s, and 6 messages of 0.5 s are 3 s; 2/3 of 9 s hide 6 s of it.
    assert expected_efficiency(4, 9.0, 8.0, 4.0, 0.5) == (9 / 15, 1.0)
    assert expected_efficiency(1, 9.0, 8.0, 4.0, 0.5) == (1.0, 1.0)


def stubborn_steps(clock):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        clock.step(1)


def failing_steps(clock):
    raise ValueError("on purpose")


@pytest.mark.slow
def test_a_failing_child_ends_the_others_whatever_they_do_at_a_signal():
    variants = {"stubborn": (stubborn_steps, {}), "failing": (failing_steps, {})}
    with pytest.raises(RuntimeError, match="a benchmark's process ended with status 1"):
        measure.take_turns(variants, rounds=1, seconds=0.05, threads=1, device="cpu")
    assert not multiprocessing.active_children()


SHORT = ["--threads", "1", "--rounds", "1", "--device", "cpu"]
EAGER = ["--seconds", "0.05", "--archs", "cnn", "--modes", "eager", "--batch_size", "4"]
COMMANDS = {  # options, the beginning of a row, rows of the longest table
    "attention": ([*EAGER, "--kinds", "cbam", "se"], "cnn 32×16×16, cbam_of_timms_form eager", 15),
    "attention networks": ([*EAGER, "--part", "networks"], "cnn cbam, eager", 2),
    "scaling": (["--seconds", "0.05", "--processes", "1"], "512", 3),
    "images": (["--images", "80", "--size", "32", "--batch_size", "8"], "this program, first decoding", 3),
    "startup": ([], "train.py fit, first step done", 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_its_tables_and_writes_them_as_json(name, tmp_path):
    options, row, num_rows = COMMANDS[name]
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"benchmarks.{name.split()[0]}", *SHORT, *options, "--json", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert row in done.stdout
    assert "Warning" not in done.stderr
    figures = json.loads(path.read_text())
    assert "processor" in figures["machine"]
    assert max(len(table["rows"]) for table in figures["tables"]) == num_rows


@pytest.mark.slow
def test_the_gpu_table_is_filled_as_far_as_a_cpu_can(tmp_path):
    path = tmp_path / "gpu.md"
    options = ["--device", "cpu", "--tiny", "--minutes", "20", "--output", str(path)]
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1300)
    assert done.returncode == 0, done.stderr
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in path.read_text().splitlines() if "|" in line
    ]
    figures = {(part, what): figure for part, what, figure, _ in cells[2:]}
    assert {part for part, _ in figures} == set(gpu.PARTS) - {"compiler"}
    assert not [what for _, what in figures if what == "failed"]
    assert "Cut off" not in path.read_text()
    assert figures["resume", "float32: difference after an interruption"] == "none, bit for bit"
    assert figures["memory", "exit status"] == "2"
    assert figures["memory", "tracebacks"] == "0"
    assert figures["memory", "last line on standard error"].startswith("error: out of memory; lower data.batch_size")
    assert float(figures["loops", "fit, float32, eager ÷ plain loop, 0 workers"].split()[0]) > 0
    for part, what in figures:  # printed as they come
        assert f"{part:<10} {what}: {figures[part, what]}" in done.stdout


class SteadyChild:
    """In place of a measured process: CBAM takes twice the time and memory, and the resnet18 with it does not start."""

    def __init__(self, work, threads, device, arguments):
        if (arguments["arch"], arguments["kind"]) == ("resnet18", "cbam"):
            raise RuntimeError("a benchmark's process ended with status 1")
        self.factor = 2 if arguments["kind"] == "cbam" else 1
        self.rounds = 0

    def time(self, seconds):
        self.rounds += 1
        return 100 * self.rounds / self.factor

    def finish(self):
        return 10.0 * self.factor

    def stop(self):
        pass


def test_networks_are_reported_round_by_round_and_those_that_failed_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "Child", SteadyChild)
    rows = list(gpu.networks(gpu.Setup("cpu", False, tmp_path, [], False, False)))
    cnn = "cnn, eager, batches of 128"
    speeds = [figure for what, figure, _ in rows if what == "cnn cbam, eager, batches of 128: images/s"]
    assert speeds[0] == "50 (50 to 50)"
    assert speeds[4] == "150 (50 to 250)"
    ratios = [figure for what, figure, _ in rows if what == f"{cnn}: step with CBAM ÷ without"]
    assert ratios == ["2.00 (2.00 to 2.00)"] * 5
    found = {what: figure for what, figure, _ in rows}
    assert found[f"{cnn}: peak memory with CBAM ÷ without"] == "20 ÷ 10 MB = 2.00"
    assert found["resnet18 cbam, eager, batches of 128: images/s"] == "failed"
    assert found["resnet18 none, eager, batches of 128: images/s"] == "300 (100 to 500)"
    assert not [what for what in found if what.startswith("resnet18, ")]


def test_cublas_is_set_up_before_the_first_training_of_the_deterministic_ones_process(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is as before after this test
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen = []
    monkeypatch.setattr(gpu, "_call", lambda options: (seen.append(os.environ["CUBLAS_WORKSPACE_CONFIG"]), (1, ""))[1])
    with pytest.raises(RuntimeError, match="the whole run, float32, ended with status 1"):
        list(gpu.resume(gpu.Setup("cpu", True, tmp_path, [], False, False)))
    assert seen == [":4096:8"]


def endless_part(setup):
    yield "first", "1", ""
    time.sleep(600)


@pytest.mark.slow
def test_what_a_part_found_is_there_at_once_and_it_ends_when_its_time_is_over(tmp_path):
    setup = gpu.Setup("cpu", True, tmp_path, [], False, False)
    rows = gpu.run_bounded("endless", endless_part, setup, seconds=500)
    assert next(rows) == ("first", "1", "")
    rows.close()
    started = time.monotonic()
    assert list(gpu.run_bounded("unfinished", endless_part, setup, seconds=0.1)) == [None]
    assert time.monotonic() - started < 120  # of its 600
    assert not multiprocessing.active_children()
