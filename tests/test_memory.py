import platform
import subprocess
import sys

import pytest

# In a process of its own, since the setting stays. Each tensor of 64 MB is mapped anew without it.
SCRIPT = """
import resource, sys, torch
from cbam_pl.process import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for step in range(30):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    faults = {
        name: float(subprocess.run([sys.executable, "-c", SCRIPT, name], capture_output=True, check=True).stdout)
        for name in ("kept", "returned")
    }
    assert faults["returned"] > 1000
    assert faults["kept"] < 10
