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
        resumed: epochs and optimizer steps that the checkpoint had done, where a training is resumed; what was
            written after them is dropped, since it will be written again.
    """

    def __init__(self, folder: Path, suffix: str = "", resumed: tuple[int, int] | None = None) -> None:
        super().__init__(
            folder.parent.parent,
            folder.parent.name,
            folder.name,
            default_hp_metric=False,
            filename_suffix=suffix,
            # TensorBoard then hides what a killed run wrote beyond its checkpoint.
            purge_step=None if resumed is None else resumed[1] + 1,
        )
        self.table = folder / "metrics.csv"
        if resumed is not None:
            self._drop_rows_after(resumed[0])

    @rank_zero_only
    def _drop_rows_after(self, epoch: int) -> None:
        if not self.table.exists():
            return
        header, *rows = self.table.read_text().splitlines(keepends=True)
        self.table.write_text("".join([header, *(row for row in rows if int(row.split(",")[0]) <= epoch)]))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write scalars at `step`; an epoch's figures go to metrics.csv too."""
        super().log_metrics(metrics, step)
        if "train/loss" in metrics:
            new = not self.table.exists()
            with self.table.open("a", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerow({"epoch": step, **metrics})
            self.experiment.flush()

    @rank_zero_only
    def save(self) -> None:
        """Nothing: scalars are flushed at each epoch, and config.yaml holds the settings."""
