"""The run's logger: TensorBoard events, and one row an epoch in metrics.csv."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

COLUMNS = ["epoch", "lr", "train/loss", "train/acc", "val/loss", "val/acc"]


class RunLogger(TensorBoardLogger):
    """TensorBoard scalars at the steps that the classifier names, and metrics.csv beside them.

    Args:
        folder: logs/RECIPE/version_N.
        suffix: end of the event file's name, by which a later writer finds its own again.
        purge_step: on resuming, the first optimizer step that will be written again.
    """

    def __init__(self, folder: Path, suffix: str = "", purge_step: int | None = None) -> None:
        super().__init__(
            folder.parent.parent,
            folder.parent.name,
            folder.name,
            default_hp_metric=False,
            filename_suffix=suffix,
            purge_step=purge_step,
        )
        self.folder = folder

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write scalars at `step`; an epoch's figures go to metrics.csv too."""
        super().log_metrics(metrics, step)
        if "train/loss" in metrics:
            file = self.folder / "metrics.csv"
            new = not file.exists()
            with file.open("a", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerow({"epoch": step, **metrics})
            self.experiment.flush()

    @rank_zero_only
    def save(self) -> None:
        """Nothing: scalars are flushed at each epoch, and config.yaml holds the settings."""
