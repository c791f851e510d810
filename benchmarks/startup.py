"""How long users wait before anything happens: python -m benchmarks.startup

Each command is run anew, in turns; the first training step includes start-up, data and network.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from benchmarks.measure import REPOSITORY, Spread, Table, machine, parser, ratio, report
from benchmarks.throughput import shapes_as_files


class StopAfterFirstStep(Callback):
    """Ends the process when the first step is done."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fetch the loss, which waits for the device, and end the process."""
        float(outputs["loss"])
        os._exit(0)  # what ending a training takes is not part of it


def _seconds(command: list[str], threads: int) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr}")
    return seconds


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", rounds=5, seconds=0)
    options.add_argument("--config", default="configs/cbam_cnn.yaml", help="the recipe (default: %(default)s)")
    given = options.parse_args()
    python = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = shapes_as_files(root / "shapes")
        first_step = ["fit", "--config", given.config, *data, "--trainer.default_root_dir", str(root),
                      "--trainer.accelerator", "gpu" if given.device == "cuda" else "cpu",
                      "--trainer.callbacks+", "benchmarks.startup.StopAfterFirstStep"]  # fmt: skip
        commands = {
            "import torch, lightning": [python, "-c", "import torch, lightning"],
            "train.py --help": [python, "train.py", "--help"],
            "train.py fit --help": [python, "train.py", "fit", "--help"],
            "train.py fit, first step done": [python, "train.py", *first_step],
        }
        for command in commands.values():
            _seconds(command, given.threads)  # reads the files into the system's cache
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(given.rounds):
            for name, command in commands.items():
                times[name].append(_seconds(command, given.threads))
    imports = times["import torch, lightning"]
    rows = [
        [
            name,
            Spread.of(seconds).text(2),
            ratio(seconds, imports).text(2),
            "≤ 1.2" if name.endswith("py --help") else "",
        ]
        for name, seconds in times.items()
    ]
    title = f"seconds: median of {given.rounds} interleaved rounds (lowest to highest)"
    table = Table(title, ["command", "seconds", "÷ import torch, lightning", "asked"], rows)
    report(machine(given.device, given.threads), [table], given.json)


if __name__ == "__main__":
    main()
