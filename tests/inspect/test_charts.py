import numpy as np
import pytest

from cbam_pl.inspect.charts import draw_ablation, draw_randomisation
from cbam_pl.inspect.drawing import rasterise
from cbam_pl.inspect.tables import print_ablation, print_randomisation


def ablation():
    accuracies = {("blocks.0", "channel"): (0.9, 0.5, 0.7), ("a[1]", "spatial"): (0.8, 0.75, 0.6)}
    accuracies |= {("all", "channel"): (0.85, 0.4, 0.65), ("all", "spatial"): (0.79, 0.74, 0.59)}
    names = ("mean", "constant", "other image")
    rows = [
        {"block": block, "gate": gate, "replaced_by": name, "accuracy": value, "change": value - 0.92}
        for (block, gate), values in accuracies.items()
        for name, value in zip(names, values, strict=True)
    ]
    return {"images": 50, "accuracy": 0.92, "rows": [row | {"change_error": 0.03} for row in rows]}


def randomisation():
    spearman = {"Grad-CAM": [0.8, None, 0.1], "1.bn": [1.0, 0.25, 0.5], "0": [1.0, 1.0, -0.25]}
    return {"images": 9, "seed": 0, "layer": "1.bn", "layers": ["classifier", "1", "0"], "spearman": spearman}


def test_the_ablations_chart_has_each_accuracy_at_its_block():
    figure = draw_ablation(ablation(), "title $x$")
    channel, spatial = figure.axes
    assert [axes.get_title("left") for axes in (channel, spatial)] == ["channel gate", "spatial gate"]
    assert [label.get_text() for label in channel.get_yticklabels()] == ["blocks.0", "a[1]", "all"]
    lines = {line.get_label(): line for line in spatial.lines}
    assert lines["as trained"].get_xdata()[0] == 92
    np.testing.assert_allclose(lines["other image"].get_xdata(), [60, 59])
    assert list(lines["other image"].get_ydata()) == [1, 2]  # it has no spatial gate in blocks.0
    bars = [segment[:, 0].tolist() for bar in spatial.collections for segment in bar.get_segments()]
    assert any(bar == pytest.approx([57, 63]) for bar in bars)
    left, right = channel.get_xlim()
    assert left < 40 < 92 < right <= 102
    rasterise(figure)


def test_the_randomisations_chart_starts_at_one_and_leaves_gaps():
    figure = draw_randomisation(randomisation(), "title")
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(lines["Grad-CAM"], [1, 0.8, np.nan, 0.1])
    np.testing.assert_allclose(lines["0"], [1, 1, 1, -0.25])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["nothing", "classifier", "1", "0"]
    rasterise(figure)


def test_tables_give_accuracy_and_change_and_three_steps(capsys):
    print_ablation(ablation())
    print_randomisation(randomisation())
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    cells = ["90.0", "(-2.0", "±", "3.0)", "50.0", "(-42.0", "±", "3.0)", "70.0", "(-22.0", "±", "3.0)"]
    assert ["blocks.0", "channel", *cells] in lines
    assert any(line[:2] == ["a[1]", "spatial"] for line in lines)
    assert ["Grad-CAM", "0.80", "-", "0.10"] in lines
    assert ["1.bn", "1.00", "0.25", "0.50"] in lines
    assert ["0", "1.00", "-0.25", "-0.25"] in lines
