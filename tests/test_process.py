"""What a command changes of its process, in a process of its own, since it stays so."""

import platform
import subprocess
import sys

import pytest

from tests.helpers import REPOSITORY

SCRIPT = """
import logging, os, resource, threading, warnings
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
