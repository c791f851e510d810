import dataclasses

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from cbam_pl.inspect.curves import History, draw_curves, read_history
from cbam_pl.inspect.drawing import rasterise

HEADER = "epoch,lr,train/loss,train/acc,val/loss,val/acc\n"


def history_of(name="cbam_cnn-version_0 (cbam)", epochs=4):
    steps = np.arange(1, 101)
    axis = np.arange(1, epochs + 1)
    figures = {"train/loss": 2 / axis, "val/loss": 3 / axis, "train/acc": axis / 10, "val/acc": axis / 20}
    return History(name, steps, 2 / steps**0.5, axis, {**figures, "lr": np.full(epochs, 1e-3)})


def test_history_is_what_the_run_logged(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step, loss in ((1, 2.5), (2, 2.25), (3, 2.0)):
            writer.add_scalar("train/loss_step", loss, step)
    rows = "1,0.01,2.0,0.1,1.9,0.2\n2,0.01,9.0,0.9,9.0,0.9\n2,0.005,1.5,0.3,,\n"
    (tmp_path / "metrics.csv").write_text(HEADER + rows)
    history = read_history(tmp_path, "run")
    assert history.steps.tolist() == [1, 2, 3]
    assert history.losses.tolist() == [2.5, 2.25, 2.0]
    assert history.epochs.tolist() == [1, 2]  # of the epoch that was trained twice the last counts
    assert history.figures["train/loss"].tolist() == [2.0, 1.5]
    assert history.figures["lr"].tolist() == [0.01, 0.005]
    assert history.figures["val/loss"][0] == 1.9
    assert np.isnan(history.figures["val/loss"][1])
    assert read_history(tmp_path / "elsewhere", "run") is None


def test_history_of_a_plain_trainer_is_that_of_its_events(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("train/loss_step", 2.5, 50)
        assert read_history(tmp_path, "run") is None  # no epoch is complete
        for epoch, loss in ((1, 2.0), (2, 1.5)):
            writer.add_scalar("train/loss", loss, epoch)
        writer.add_scalar("val/acc", 0.25, 2)
    history = read_history(str(tmp_path), "run")
    assert (history.steps.tolist(), history.losses.tolist(), history.epochs.tolist()) == ([50], [2.5], [1, 2])
    assert history.figures["train/loss"].tolist() == [2.0, 1.5]
    assert np.isnan(history.figures["val/acc"][0])
    assert history.figures["val/acc"][1] == 0.25


def test_curves_are_the_runs_figures():
    history = history_of()
    by_step, loss, accuracy, rate = draw_curves([history]).axes
    raw, smoothed = by_step.lines
    assert raw.get_xydata().tolist() == np.stack([history.steps, history.losses], 1).tolist()
    assert smoothed.get_xdata().tolist() == list(range(3, 99))  # the middle of each five
    assert smoothed.get_ydata().tolist() == pytest.approx([history.losses[i : i + 5].mean() for i in range(96)])
    drawn = [line.get_ydata().tolist() for axes in (loss, accuracy, rate) for line in axes.lines]
    expected = [history.figures[name].tolist() for name in ("train/loss", "val/loss", "train/acc", "val/acc", "lr")]
    assert drawn == expected
    assert [line.get_linestyle() for line in loss.lines] == ["--", "-"]


def test_several_runs_share_one_picture_each_in_its_colour():
    histories = [history_of(f"cnn-version_{number} ({kind})") for number, kind in enumerate(("none", "se", "cbam"))]
    figure = draw_curves(histories)
    by_step, loss, accuracy, rate = figure.axes
    colours = [line.get_color() for line in loss.lines]
    assert len(set(colours)) == 3
    assert [line.get_color() for line in accuracy.lines] == colours
    assert (
        [line.get_color() for line in rate.lines] == colours[::2] == [line.get_color() for line in by_step.lines[::2]]
    )
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [*(history.name for history in histories), "by epoch: train", "by epoch: val"]
    assert sorted({line.get_linewidth() for line in rate.lines}) == [1.5, 3.0, 4.5]  # equal rates are all seen
    rasterise(figure)
    key = figure.legends[0].get_window_extent()
    assert not any(axes.get_tightbbox().overlaps(key) for axes in figure.axes)


def test_a_name_with_signs_of_mathematics_is_written_as_it_is(tmp_path):
    figure = draw_curves([history_of("r$e$c[v1]<b>|x (cbam)")])
    figure.savefig(tmp_path / "curves.svg")  # in which matplotlib notes each text
    assert "<!-- r$e$c[v1]&lt;b&gt;|x (cbam) -->" in (tmp_path / "curves.svg").read_text()


def test_a_legend_of_long_names_is_inside_the_figure():
    figure = draw_curves([history_of("a_recipe_with_a_long_name" * 3 + f"-version_{number}") for number in range(5)])
    rasterise(figure)
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_curves_are_drawn_from_little():
    one = history_of(epochs=1)
    assert [line.get_marker() for line in draw_curves([one]).axes[1].lines] == ["o", "o"]
    bare = dataclasses.replace(one, steps=np.array([]), losses=np.array([]))
    assert not draw_curves([bare]).axes[0].lines
    diverged = dataclasses.replace(one, losses=np.full(100, np.nan))
    rasterise(draw_curves([diverged]))
