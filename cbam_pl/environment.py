"""What a figure was measured with: versions, commit, processor, device, date; and what is missing to compile."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_default_scheme, get_path

import torch

UNKNOWN = dict.fromkeys(("device", "versions", "commit", "date"), "unknown")  # of what was measured before it was noted


def processor_name() -> str:
    """The processor as it calls itself."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].split(":")[1].strip()
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores that this process may use, where the system knows."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """The commit of this program, with -dirty where its files were changed; unknown outside a clone."""
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists():
        return "unknown"  # installed, maybe inside another project's clone
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def describe_environment(device: torch.device) -> dict[str, str]:
    """The device that computes, versions, commit and date, as plain texts."""
    versions = [f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning")]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "device": f"{device.type}: {name}",
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def environments_by_key(environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """For each key, the distinct values of the environments, in their order, as one text."""
    texts = {key: ", then ".join(dict.fromkeys(one[key] for one in environments)) for key in UNKNOWN}
    return {key: text or UNKNOWN[key] for key, text in texts.items()}


def missing_to_compile(device: str) -> str:
    """What torch.compile needs on this kind of device and does not find, with the way to install it; else empty."""
    if device == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks
        return "" if shutil.which(compiler) else f"a C++ compiler on a CPU: install {compiler}"
    if device != "cuda":
        return ""
    if find_spec("triton") is None:
        return "Triton on a GPU: pip install triton"
    if sys.platform == "win32":  # where it brings its compiler
        return ""
    # Triton compiles its link to the driver.
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"a C compiler on a GPU: install {' or '.join(compilers)}"
    scheme = get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton looks, for Debian's Python
    return "" if Path(get_path("include", scheme), "Python.h").is_file() else "Python.h on a GPU: install python3-dev"
