"""The seeds of each recipe together in TensorBoard: mean, lowest and highest by epoch, shown as bands."""

from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from cbam_pl.commands.compare.jobs import Job, begun_last, find, read_epochs
from cbam_pl.commands.compare.plan import Plan
from cbam_pl.training.run import disk_error

FIGURES = ("train/loss", "val/loss", "train/acc", "val/acc")
# Tags of their own, so that the charts of ordinary runs stay as they are.
_TAGS = {name: [f"seeds_{name}/{part}" for part in ("mean", "lowest", "highest")] for name in FIGURES}
_LAYOUT = {"mean, lowest and highest over the seeds": {name: ["Margin", tags] for name, tags in _TAGS.items()}}


class Bands:
    """Writes logs/compare/OUTPUT/RECIPE for each recipe of a comparison, while its jobs run.

    An earlier writing is replaced: the same runs give the same figures.
    """

    def __init__(self, plan: Plan, jobs: Sequence[Job]) -> None:
        self._jobs = {name: [job for job in jobs if job.name == name] for name in plan.configs}
        self._complete: dict[Job, list[dict[str, float]]] = {}  # epochs of the jobs that were done before
        self._epochs = dict.fromkeys(self._jobs, 0)  # written so far
        self._folders = {
            name: own[0].root / "logs" / "compare" / plan.output.resolve().name / name
            for name, own in self._jobs.items()
        }
        self._writers: dict[str, SummaryWriter] = {}
        for job in jobs:
            state, run = find(job)
            if state == "done" and run is not None:
                self._complete[job] = read_epochs(run)

    def update(self) -> None:
        """Write the epochs that all seeds of a recipe have by now, each once."""
        for name, jobs in self._jobs.items():
            rows = [{int(row["epoch"]): row for row in self._read(job)} for job in jobs]
            new = sorted(epoch for epoch in set.intersection(*map(set, rows)) if epoch > self._epochs[name])
            try:
                for epoch in new:
                    self._write(name, epoch, [own[epoch] for own in rows])
                if new:
                    self._writers[name].flush()
            except OSError as error:
                raise disk_error(self._folders[name], error) from error

    def close(self) -> None:
        """Write what has come since, and close the files."""
        self.update()
        for writer in self._writers.values():
            writer.close()

    def _read(self, job: Job) -> list[dict[str, float]]:
        if job in self._complete:
            return self._complete[job]
        run = begun_last(job)
        return read_epochs(run) if run else []

    def _write(self, name: str, epoch: int, rows: Sequence[dict[str, float]]) -> None:
        if name not in self._writers:
            self._writers[name] = _open(self._folders[name])
        for figure, tags in _TAGS.items():
            values = [row[figure] for row in rows if figure in row]
            if len(values) == len(rows):  # not every epoch need be validated
                parts = (sum(values) / len(values), min(values), max(values))
                for tag, value in zip(tags, parts, strict=True):
                    self._writers[name].add_scalar(tag, value, epoch)
        self._epochs[name] = epoch


def _open(folder: Path) -> SummaryWriter:
    for file in folder.glob("events.*"):
        file.unlink()
    # A TensorBoard that has read the earlier file forgets its points.
    writer = SummaryWriter(str(folder), purge_step=0)
    writer.add_custom_scalars(_LAYOUT)
    return writer
