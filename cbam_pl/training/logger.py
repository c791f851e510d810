"""The run's logger: TensorBoard events, and one row an epoch in metrics.csv."""

import csv
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from cbam_pl.training.run import cannot_write, epochs_of, written_whole

COLUMNS = ["epoch", "lr", "train/loss", "train/acc", "val/loss", "val/acc"]


class RunLogger(TensorBoardLogger):
    """TensorBoard scalars at the steps that the classifier names, and metrics.csv beside them.

    Args:
        folder: logs/RECIPE/version_N.
        suffix: end of the event file's name, by which a later writer finds its own again.
        resumed: the checkpoint from which a training is resumed.
    """

    def __init__(self, folder: Path, suffix: str = "", resumed: dict[str, Any] | None = None) -> None:
        super().__init__(
            folder.parent.parent, folder.parent.name, folder.name, default_hp_metric=False, filename_suffix=suffix
        )
        self.table = folder / "metrics.csv"
        self._resumed = resumed
        self._earlier = [path for path in folder.glob("events*") if ".test-epoch" not in path.name]

    @rank_zero_only
    def go_on(self) -> None:
        """Drop what was written after the checkpoint that is resumed from, since it will be written again."""
        if self._resumed is None:
            return
        if "saved_at" in self._resumed:
            for events in self._earlier:
                _cut_off(events, self._resumed["saved_at"])
        # So that a TensorBoard which has read it already forgets it, too.
        start = SessionLog(status=SessionLog.START)
        self.experiment._get_file_writer().add_event(Event(session_log=start), step=self._resumed["global_step"] + 1)
        if self.table.exists():
            header = ",".join(COLUMNS) + "\n"
            rows = self.table.read_text().splitlines(keepends=True)[1:]
            # A row that was broken off is of an epoch that the checkpoint has not seen.
            kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= epochs_of(self._resumed)]
            with written_whole(self.table) as stream:
                stream.write("".join([header, *kept]).encode())

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write scalars at `step`; an epoch's figures go to metrics.csv too.

        Raises:
            UserError: metrics.csv cannot be written.
        """
        super().log_metrics(metrics, step)
        if "train/loss" in metrics:
            new = not self.table.exists()
            try:
                with self.table.open("a", newline="") as stream:
                    writer = csv.DictWriter(stream, COLUMNS)
                    if new:
                        writer.writeheader()
                    writer.writerow({"epoch": step, **metrics})
            except OSError as error:
                raise cannot_write(self.table, str(error.strerror)) from error
            self.experiment.flush()

    @rank_zero_only
    def save(self) -> None:
        """Nothing: scalars are flushed at each epoch, and config.yaml holds the settings."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the event file; where an error ended the training, that one is told, not a full disk after it."""
        try:
            super().finalize(status)
        except OSError:
            if status == "success":
                raise


def _cut_off(events: Path, until: float) -> None:
    """Cut an event file off behind the last complete event of a time, and remove it where no event is left.

    Args:
        events: a TensorBoard file.
        until: seconds since 1970.
    """
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
