"""Several processes: measured images/s of 1 and 2, and what to expect of many GPUs: python -m benchmarks.scaling

Both measurements are `train.py fit` with DistributedDataParallel. The expectation is arithmetic, with its assumptions
printed beside it: each step computes for `--step_ms` (by default the measured time of one process), then the
gradients are summed by a ring all-reduce, whose volume follows from the number of parameters.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from benchmarks.measure import REPOSITORY, Spread, Table, machine, parser, report
from benchmarks.throughput import shapes_as_files
from cbam_pl.timing import synchronise

_GPUS = (8, 64, 512)
_WARM_UP = 5  # steps


class Rate(Callback):
    """Times the training steps of the first process, over all processes' images, and ends the training.

    Args:
        path: the JSON file to write: seconds per step, images per step of one process, parameters.
        seconds: to measure for.
    """

    def __init__(self, path: str, seconds: float) -> None:
        self.path = Path(path)
        self.seconds = seconds
        self._steps = 0
        self._started = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step; all processes end together, each by itself."""
        self._steps += 1
        if self._steps == _WARM_UP:
            synchronise(pl_module.device)
            self._started = time.perf_counter()
        if self._steps <= _WARM_UP:
            return
        elapsed = time.perf_counter() - self._started
        # One process's clock decides for all; a step more would leave the others waiting for its gradients.
        if not trainer.strategy.broadcast(elapsed >= self.seconds):
            return
        synchronise(pl_module.device)
        if trainer.is_global_zero:
            figures = {
                "step": (time.perf_counter() - self._started) / (self._steps - _WARM_UP),
                "images": trainer.datamodule.batch_size,  # type: ignore[attr-defined]
                "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
            }
            self.path.write_text(json.dumps(figures))
        os._exit(0)  # at the same step in every process


def _measure(
    options: list[str], processes: int, device: str, threads: int, seconds: float, root: Path
) -> dict[str, Any]:
    path = root / "rate.json"
    path.unlink(missing_ok=True)
    callback = {"class_path": "benchmarks.scaling.Rate", "init_args": {"path": str(path), "seconds": seconds}}
    command = [sys.executable, "train.py", "fit", *options, "--trainer.devices", str(processes),
               "--trainer.accelerator", "gpu" if device == "cuda" else "cpu", "--trainer.default_root_dir", str(root),
               "--trainer.max_epochs", "1000000", "--trainer.limit_val_batches", "0",
               "--trainer.enable_checkpointing", "false", "--trainer.callbacks+", json.dumps(callback)]  # fmt: skip
    if processes > 1:
        command += ["--trainer.strategy", "ddp"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    if not path.exists():
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr}")
    return json.loads(path.read_text())


def expected_efficiency(gpus: int, step: float, volume: float, bandwidth: float, latency: float) -> tuple[float, float]:
    """Images/s of `gpus` GPUs over `gpus` times those of one, where nothing and where everything possible overlaps.

    A ring all-reduce sends 2 (N − 1) / N of the volume through each link, in 2 (N − 1) messages one after another.
    The backward pass, two thirds of the step, can hide it but for the last bucket, which is not modelled.

    Args:
        gpus: N.
        step: seconds of one GPU's step.
        volume: bytes of gradients.
        bandwidth: bytes per second of the slowest link.
        latency: seconds per message.

    Returns:
        The two efficiencies, each at most 1.
    """
    reduction = 2 * (gpus - 1) / gpus * volume / bandwidth + 2 * (gpus - 1) * latency
    exposed = max(0.0, reduction - step * 2 / 3)
    return step / (step + reduction), step / (step + exposed)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", rounds=2, seconds=8.0)
    options.add_argument("--config", default="configs/cbam_cnn.yaml", help="the recipe (default: %(default)s)")
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    options.add_argument("--step_ms", type=float, help="of one GPU, for the expectation (default: as measured here)")
    options.add_argument(
        "--bandwidth", type=float, default=50.0, help="GB/s of the slowest link (default: %(default)s)"
    )
    options.add_argument("--latency", type=float, default=5.0, help="µs per message (default: %(default)s)")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        recipe = ["--config", given.config, *shapes_as_files(root / "shapes")]
        measured: dict[int, list[dict[str, Any]]] = {count: [] for count in given.processes}
        for _ in range(given.rounds):
            for count in given.processes:
                # On a CPU the processes share the cores.
                threads = max(1, given.threads // count)
                measured[count].append(_measure(recipe, count, given.device, threads, given.seconds, root))
    rates = {count: [count * one["images"] / one["step"] for one in figures] for count, figures in measured.items()}
    alone = Spread.of(rates[min(rates)]).median
    rows = [[count, Spread.of(values), f"{Spread.of(values).median / alone:.2f}"] for count, values in rates.items()]
    shared = "cores shared by the processes" if given.device == "cpu" else "a GPU each"
    first = measured[min(measured)][0]
    step = given.step_ms / 1e3 if given.step_ms else Spread.of([one["step"] for one in measured[min(measured)]]).median
    volume = 4 * first["parameters"]  # gradients are float32
    expected = []
    for gpus in _GPUS:
        bare, overlapped = expected_efficiency(gpus, step, volume, given.bandwidth * 1e9, given.latency / 1e6)
        expected.append([gpus, f"{bare:.3f}", f"{overlapped:.3f}"])
    source = "given" if given.step_ms else f"measured here, on {given.device}"
    title = (
        f"on paper: {first['images']} images per GPU, steps of {1e3 * step:.1f} ms ({source}), "
        f"{volume / 1e6:.1f} MB of gradients, {given.bandwidth} GB/s, {given.latency} µs per message"
    )
    tables = [
        Table(f"measured, {shared}", ["processes", "images/s", "÷ one"], rows),
        Table(title, ["GPUs", "efficiency, nothing overlaps", "overlapped with backward"], expected),
    ]
    report(machine(given.device, given.threads) | {"recipe": given.config}, tables, given.json)


if __name__ == "__main__":
    main()
