"""The run's logger: TensorBoard events, and one row an epoch in metrics.csv."""

import csv
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event

from cbam_pl.training.run import disk_error, write_text
from cbam_pl.training.schema import completed_epochs

COLUMNS = ["epoch", "lr", "train/loss", "train/acc", "val/loss", "val/acc"]


class RunLogger(TensorBoardLogger):
    """TensorBoard scalars at the steps that the classifier names, and metrics.csv with the same figures.

    `folder` is logs/RECIPE/version_N, `suffix` the end of the event file's name, by which a later writer finds its own.
    """

    def __init__(self, folder: Path, suffix: str = "", resumed: dict[str, Any] | None = None) -> None:
        # A TensorBoard that has read the events already forgets what was logged after the checkpoint.
        purge_step = None if resumed is None else resumed["global_step"] + 1
        names = (folder.parents[1], folder.parent.name, folder.name)
        super().__init__(*names, default_hp_metric=False, filename_suffix=suffix, purge_step=purge_step)
        self.table = folder / "metrics.csv"
        self._resumed = resumed
        self._earlier = [path for path in folder.glob("events*") if ".test-epoch" not in path.name]
        self._written: dict[str, int | None] = {}  # last step of each scalar

    @rank_zero_only
    def drop_events_after_checkpoint(self) -> None:
        """Drop what was written after the checkpoint that is resumed from, since it will be written again."""
        if self._resumed is None:
            return
        if "saved_at" in self._resumed:
            for events in self._earlier:
                _truncate(events, self._resumed["saved_at"])
        if self.table.exists():
            with self.table.open(newline="") as stream:
                rows = stream.read().splitlines(keepends=True)[1:]
            # A row that is incomplete is of an epoch that the checkpoint has not seen.
            epochs = completed_epochs(self._resumed)
            kept = [row.rstrip() for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= epochs]
            write_text(self.table, "\n".join([",".join(COLUMNS), *kept, ""]))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write scalars at `step`, each once; an epoch's figures go to metrics.csv too."""
        new = {name: value for name, value in metrics.items() if self._written.get(name) != step}
        self._written |= dict.fromkeys(new, step)
        try:
            super().log_metrics(new, step)
        except ValueError as error:
            if isinstance(error.__cause__, OSError):  # such as of a full disk, for which Lightning blames the value
                raise error.__cause__ from None
            raise
        if "train/loss" in new:
            is_new = not self.table.exists()
            try:
                with self.table.open("a", newline="") as stream:
                    writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
                    if is_new:
                        writer.writeheader()
                    writer.writerow({"epoch": step, **new})
            except OSError as error:
                raise disk_error(self.table, error) from error
            self.experiment.flush()

    @rank_zero_only
    def save(self) -> None:
        """Write all scalars to the disk; the settings are in config.yaml."""
        self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the event file; where an error ended the training, that one is reported, not a full disk after it."""
        try:
            super().finalize(status)
        except OSError:
            if status == "success":
                raise


def _truncate(events: Path, until: float) -> None:
    """Cut an event file after its last complete event up to a Unix time; remove it where none is left."""
    kept, size = 0, events.stat().st_size
    with events.open("rb") as stream:
        # Of each event: its length (8 bytes), a checksum (4), itself, a checksum (4).
        while len(header := stream.read(12)) == 12:
            (length,) = struct.unpack("<Q", header[:8])
            if stream.tell() + length + 4 > size or Event.FromString(stream.read(length)).wall_time > until:
                break
            kept = stream.seek(4, os.SEEK_CUR)
    if kept:
        os.truncate(events, kept)
    else:
        events.unlink()
