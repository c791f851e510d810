"""The accuracies on corrupted images in a report."""

import json
import shutil

import numpy as np
import pytest
from scipy import stats

from cbam_pl.commands.compare.jobs import find, jobs_of
from cbam_pl.commands.compare.robustness import add_robustness, robustness_table, with_robustness
from cbam_pl.data.corruptions import COMMON, SEVERITIES
from tests.helpers import one_line, plan_of

ACCURACIES = {  # recipe → seed → corruption → severity → accuracy
    "none": [
        {"fog": {"1": 0.8, "5": 0.4}, "snow": {"1": 0.7, "5": 0.6}, "saturate": {"1": 0.9, "5": 0.5}},
        {"fog": {"1": 0.7, "5": 0.4}, "snow": {"1": 0.7, "5": 0.5}, "saturate": {"1": 0.9, "5": 0.6}},
    ],
    "cbam": [
        {"fog": {"1": 0.9, "5": 0.5}, "snow": {"1": 0.7, "5": 0.6}, "saturate": {"1": 0.9, "5": 0.3}},
        {"fog": {"1": 0.7, "5": 0.6}, "snow": {"1": 0.8, "5": 0.6}, "saturate": {"1": 0.9, "5": 0.4}},
    ],
}


def results_of(accuracies):
    return [
        {"recipe": name, "seed": seed, "test": {"robustness": {"accuracy": one}}}
        for name, runs in accuracies.items()
        for seed, one in enumerate(runs)
    ]


def test_differences_are_paired_by_corruption_and_of_the_means():
    recipes = {name: {"label": name.upper()} for name in ACCURACIES}
    add_robustness(recipes, results_of(ACCURACIES), "none")
    fog = recipes["cbam"]["robustness"]["fog"]
    assert fog["mean"] == pytest.approx((70 + 65) / 2)
    assert fog["difference"]["mean"] == pytest.approx((10 + 10) / 2)
    mean = recipes["cbam"]["robustness"]["mean of 2 common"]
    values = np.array([[62.5, 57.5], [67.5, 67.5]])  # none and cbam, seeds 0 and 1
    assert mean["mean"] == pytest.approx(values[1].mean())
    interval = stats.ttest_rel(*values[::-1]).confidence_interval(0.95)
    assert mean["difference"]["interval"] == pytest.approx(list(interval))
    table = robustness_table(recipes, "none")
    assert table["headings"] == ["corruption", "NONE, %", "CBAM − NONE"]
    assert [row[0] for row in table["rows"]] == ["mean of 2 common", "fog", "snow", "mean of 1 extra", "saturate"]
    low, high = interval
    assert table["rows"][0][1:] == ["60.00 ± 3.54", f"+7.50 (−{-low:.2f} to +{high:.2f})"]
    assert table["rows"][4][1:] == ["72.50 ± 3.54", "−10.00"]  # in both pairs, so there is no interval


def test_only_corruptions_that_all_runs_have_are_reported():
    fewer = {**ACCURACIES, "cbam": [ACCURACIES["cbam"][0], {"snow": {"1": 0.8, "5": 0.6}, "fog": {"1": 0.7}}]}
    recipes = {name: {"label": name} for name in fewer}
    add_robustness(recipes, results_of(fewer), "none")
    assert list(recipes["none"]["robustness"]) == ["mean of 1 common", "snow"]
    recipes = {name: {"label": name} for name in fewer}
    add_robustness(recipes, results_of({**fewer, "none": [{}, {}]}), "none")
    assert robustness_table(recipes, "none") is None


def test_the_mean_is_a_measure_where_it_is_of_all_fifteen():
    accuracy = {name: {str(severity): 0.5 for severity in SEVERITIES} for name in COMMON}
    record = {"accuracy": accuracy, "mean": {"common": 0.5}}
    assert with_robustness({"measures": {"nll": 1}}, record)["measures"] == {"nll": 1, "corrupted": 0.5}
    accuracy["fog"].popitem()
    assert with_robustness({"measures": {"nll": 1}}, record)["measures"] == {"nll": 1}


@pytest.mark.slow
def test_a_finished_comparison_is_only_tested_again(compared, command, quick, recipes, tmp_path):
    root = shutil.copytree(compared[0], tmp_path / "copy")
    options = ["--configs", recipes["none"], recipes["cbam"], "--seeds", 0, 1, "--output", root / "two"]
    options += ["--trainer.default_root_dir", root, "--corruptions", "contrast", "bright"]
    jobs = jobs_of(plan_of(*options))
    assert [find(job)[0] for job in jobs] == ["tested"] * 4
    quick.clear()
    outcome = command("compare", *options, "--jobs", 1)
    assert outcome.status == 0, outcome.err
    assert [call[2] for call in quick] == ["test"] * 4
    assert [find(job)[0] for job in jobs] == ["done"] * 4
    assert "contrast" in outcome.out
    content = json.loads((root / "two/report.json").read_text())
    measured = [
        np.mean(list(json.loads((find(job)[1].logs / "robustness.json").read_text())["accuracy"]["contrast"].values()))
        for job in jobs
    ]  # none and cbam of seed 0, then of seed 1
    difference = 50 * (measured[1] - measured[0] + measured[3] - measured[2])
    assert content["recipes"]["cbam"]["robustness"]["contrast"]["difference"]["mean"] == pytest.approx(difference)
    assert "Corrupted images" in (root / "two/report.html").read_text()
    # Without them the comparison is the same, and so it is found as done.
    assert [find(job)[0] for job in jobs_of(plan_of(*options[: options.index("--corruptions")]))] == ["done"] * 4


def test_unknown_corruptions_are_rejected(recipes, command, tmp_path):
    options = ["--configs", recipes["none"], recipes["cbam"], "--output", tmp_path / "report"]
    error = one_line(command("compare", *options, "--corruptions", "forg"))
    assert error == "error: --corruptions forg is unknown; did you mean fog?"
    error = one_line(command("compare", *options, "--corruptions", "--data.image_size", 64))
    assert "--corruptions: the images are 64×64" in error
    assert not (tmp_path / "report").exists()
