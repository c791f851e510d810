"""What a figure was measured with: versions, commit, processor, device, date."""

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

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
    """One text for each key: what the environments, in their order, have of it, each once."""
    texts = {key: ", then ".join(dict.fromkeys(one[key] for one in environments)) for key in UNKNOWN}
    return {key: text or UNKNOWN[key] for key, text in texts.items()}
