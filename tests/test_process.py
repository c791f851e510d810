"""What a command changes of its process, in a process of its own, since it stays so."""

import os
import platform
import subprocess
import sys

import pytest

from tests.helpers import REPOSITORY

SCRIPT = """
import ctypes, logging, os, resource, threading, warnings
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: with huge pages there are hardly any faults to count
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
import torch
from cbam_pl.process import configure_process

def page_faults():
    for step in range(20):  # of tensors of 64 MB
        if step == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10

def fail(error):
    raise error

returned = page_faults()
configure_process()
print(returned, page_faults())
print(os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK"), torch.cuda.is_available())
print("caf\\udce9")
warnings.warn("two\\nlines")
for error in (OSError("full"), KeyError("lost")):
    thread = threading.Thread(target=fail, args=[error])
    thread.start()
    thread.join()
"""


@pytest.fixture(scope="module")
def done():
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again_without_page_faults(done):
    returned, kept = map(float, done.stdout.splitlines()[0].split())
    assert returned > 1000
    assert kept < 10


def test_torch_does_not_look_for_a_gpu_that_is_not_there(done):
    assert done.stdout.splitlines()[1] in ("None False", "1 True")


def test_names_that_are_not_text_can_be_printed(done):
    assert done.stdout.splitlines()[2] == r"caf\udce9"


def test_a_warning_is_one_line_and_an_error_of_the_disk_is_not_reported_by_a_thread_too(done):
    lines = done.stderr.splitlines()
    assert "warning: two lines" in lines
    assert "full" not in done.stderr
    assert lines[-1] == "KeyError: 'lost'"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "30000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_how_long_threads_wait_awake_is_set_before_torch_reads_it(given, expected):
    script = """
import os, sys
from cbam_pl.cli import main

class Torch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Torch())
main(["test"])
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=environment | given,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"{expected}\n"
