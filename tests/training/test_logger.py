"""metrics.csv and TensorBoard's points: the same figures, each once, also after going back."""

import csv
import errno
import shutil

import pytest

from cbam_pl.training.logger import COLUMNS, RunLogger
from tests.helpers import RUN, fit, scalars


def test_metrics_csv_holds_what_tensorboard_shows(trained):
    root, _ = trained
    logged = scalars(root / "logs/tiny/version_0")
    with (root / "logs/tiny/version_0/metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc", "lr"):
        assert [float(row[tag]) for row in rows] == pytest.approx([value for _, value in logged[tag]], rel=1e-6)


@pytest.mark.slow
def test_going_back_to_an_earlier_checkpoint_leaves_no_double_point(command, recipe, tmp_path):
    whole, back = tmp_path / "whole", tmp_path / "back"
    assert command(*fit(recipe, back, "--trainer.max_epochs", 2)).status == 0
    early = shutil.copy(back / "checkpoints" / RUN / "last.ckpt", back / "checkpoints" / RUN / "early.ckpt")
    for root, options in ((back, ["--ckpt_path", "last"]), (back, ["--ckpt_path", early]), (whole, [])):
        outcome = command(*fit(recipe, root, *options))
        assert outcome.status == 0, outcome.err
    assert scalars(back / "logs" / RUN) == scalars(whole / "logs" / RUN)
    assert (back / "logs" / RUN / "metrics.csv").read_text() == (whole / "logs" / RUN / "metrics.csv").read_text()


def test_a_row_that_a_killed_process_left_incomplete_is_dropped(tmp_path):
    table = tmp_path / "logs/tiny/version_0/metrics.csv"
    table.parent.mkdir(parents=True)
    table.write_bytes((",".join(COLUMNS) + "\r\n1,0.1,2,0.3,4,0.5\r\n2,0.1,1,0.3,3,0.5\r\n3,0.1,1,0").encode())
    resumed = {"global_step": 6, "loops": {"fit_loop": {"epoch_progress": {"current": {"processed": 3}}}}}
    RunLogger(table.parent, resumed=resumed).drop_events_after_checkpoint()
    # Also with the line endings of earlier versions.
    assert table.read_bytes() == (",".join(COLUMNS) + "\n1,0.1,2,0.3,4,0.5\n2,0.1,1,0.3,3,0.5\n").encode()


def test_a_point_is_written_once(tmp_path):
    folder = tmp_path / "logs/tiny/version_0"
    logger = RunLogger(folder)
    for step, value in ((1, 0.5), (1, 0.7), (2, 0.25)):
        logger.log_metrics({"val/loss": value}, step)
    logger.finalize("success")
    assert scalars(folder) == {"val/loss": [(1, 0.5), (2, 0.25)]}


def test_a_point_that_cannot_be_written_is_reported_as_the_disk_says(tmp_path, monkeypatch):
    logger = RunLogger(tmp_path / "logs/tiny/version_0")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logger.experiment, "add_scalar", fail)
    with pytest.raises(OSError, match="No space left on device"):
        logger.log_metrics({"train/loss_step": 1.0}, 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="currently not supported"):
        logger.log_metrics({"train/loss_step": "high"}, 2)
