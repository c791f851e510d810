import csv
import errno
import json
import os
import re
import shutil
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cbam_pl.commands.compare import page
from cbam_pl.commands.compare.controls import add_controls
from cbam_pl.commands.compare.jobs import jobs_of
from cbam_pl.commands.compare.page import write_gallery
from cbam_pl.commands.compare.plan import Control, Plan
from cbam_pl.commands.compare.report import analyse, markdown, read_results, signed
from cbam_pl.commands.compare.statistics import compare_pairs, holm, interval_over_images, seeds_needed
from cbam_pl.environment import commit, describe_environment
from tests.helpers import REPOSITORY, one_line, plan_of

COSTS = {"parameters": 1000, "flops": 2_500_000, "train_images_per_second": 1234.5, "latency_1": 1.25}
COSTS |= {"latency_256": 80.0, "memory": None}
ACCURACIES = {
    "net-kind=none": [0.80, 0.81, 0.79, 0.80, 0.82],
    "net-kind=se": [0.81, 0.80, 0.80, 0.79, 0.83],
    "net-kind=cbam": [0.83, 0.845, 0.82, 0.83, 0.85],
}


def result(name, seed, accuracy, classes=("a", "b")):
    """A run with 100 test images of each of two classes; all mistakes are made in the first."""
    right = round(200 * accuracy) - 100
    epochs = [{"epoch": 1.0, "val/acc": accuracy - 0.1}, {"epoch": 2.0, "val/acc": accuracy + 0.01}]
    environment = {"device": "cpu: abacus", "versions": "torch 0", "commit": "c0ffee", "date": "2024-05-06"}
    confusion = [[right, 100 - right], [0, 100]]
    test = {"images": 200, "classes": list(classes), "confusion": confusion}
    row = {"recipe": name, "seed": seed, "epoch": 2, "val_acc": 100 * accuracy + 1, "test_acc": 100 * accuracy}
    row |= {"test_loss": 0.5, "checkpoint": "best.ckpt", **environment}
    row |= {f"trained_{key}": value for key, value in environment.items()}
    return row | {"test": test, "epochs": epochs}


def plan_for(accuracies, unequal=(), controls=()):
    count = max(map(len, accuracies.values()))
    configs = {name: {"model.attention.kind": name.split("=")[1], "data.dataset": "shapes"} for name in accuracies}
    labels = {name: name.removeprefix("net-") for name in accuracies}
    seeds = list(range(count))
    return Plan(configs, labels, seeds, defaults={}, output=Path(), unequal=list(unequal), controls=list(controls))


def content_of(accuracies, missing=(), unequal=(), controls=()):
    results = [
        result(name, seed, value)
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
        if (name, seed) not in missing
    ]
    return analyse(plan_for(accuracies, unequal, controls), results, dict.fromkeys(accuracies, COSTS))


def test_the_differences_are_those_of_the_pairs():
    content = content_of(ACCURACIES)
    none, se, cbam = (100 * np.array(values) for values in ACCURACIES.values())
    found = content["recipes"]["net-kind=cbam"]["difference"]
    expected = compare_pairs(cbam, none)
    assert found["mean"] == pytest.approx((cbam - none).mean())
    assert found["interval"] == pytest.approx(expected.interval)
    assert found["images"] == pytest.approx((cbam - none).mean() / 100 * 200)
    assert found["seeds_needed"] == seeds_needed(0.2, expected.sd)
    adjusted = holm([compare_pairs(se, none).p, expected.p])
    assert found["p_holm"] == pytest.approx(adjusted[1])
    assert content["recipes"]["net-kind=none"]["difference"] is None
    # All mistakes are in class a, of which there are half as many images.
    classes = content["recipes"]["net-kind=cbam"]["per_class"]
    assert classes["a"]["mean"] == pytest.approx(2 * found["mean"])
    assert classes["b"] == {"mean": 0, "interval": None}
    curve = content["recipes"]["net-kind=none"]["curve"]
    assert curve["epoch"] == [1, 2]
    assert curve["mean"] == pytest.approx([none.mean() - 10, none.mean() + 1])
    assert curve["sd"] == pytest.approx([none.std(ddof=1)] * 2)


def predicted(accuracy, images=200, shift=0):
    """Predictions of a run: the first images are right, but for the first `shift`."""
    correct = np.zeros(images, dtype=np.float32)
    correct[shift : shift + round(accuracy * images)] = 1
    numbers = np.arange(images)
    return {"image": numbers, "label": numbers % 2, "correct": correct, "nll": 1 - correct, "ece": 0 * correct}


def content_with_measures(missing=False):
    results = []
    for kind, values, shift in (("none", [0.8, 0.81, 0.79], 0), ("cbam", [0.85, 0.84, 0.86], 10)):
        for seed, accuracy in enumerate(values):
            run = result(f"k={kind}", seed, accuracy) | {"nll": 1 - accuracy, "ece": 0.1 + 100 * accuracy * seed}
            run |= {"predictions": predicted(accuracy, shift=shift), "brier": None if missing else 0.5, "top5": None}
            results.append(run)
    return analyse(plan_for({"k=none": [0] * 3, "k=cbam": [0] * 3}), results, {})


def test_each_measure_is_compared_in_pairs_with_one_correction_for_all():
    content = content_with_measures()
    none, cbam = content["recipes"].values()
    assert list(cbam["measures"]) == ["nll", "brier", "ece"]
    assert none["measures"]["nll"]["mean"] == pytest.approx(0.2)
    assert none["measures"]["nll"]["difference"] is None
    expected = {
        "acc": compare_pairs([85, 84, 86], [80, 81, 79]),
        "nll": compare_pairs([0.15, 0.16, 0.14], [0.2, 0.19, 0.21]),
        "ece": compare_pairs([0.1, 84.1, 172.1], [0.1, 81.1, 158.1]),
    }
    found = {"acc": cbam["difference"]} | {name: one["difference"] for name, one in cbam["measures"].items()}
    adjusted = holm([one.p for one in expected.values()])
    assert found.pop("brier")["p"] is None  # equal in each pair
    for (name, difference), other, p in zip(found.items(), expected.values(), adjusted, strict=True):
        assert difference["mean"] == pytest.approx(other.mean), name
        assert difference["interval"] == pytest.approx(other.interval), name
        assert difference["p_holm"] == pytest.approx(p), name
    rows = content["tables"]["measures"]["rows"]
    assert "Calibrated" not in content["tables"]["measures"]["meaning"]
    assert rows[1][:5] == ["NLL", "k=cbam", "0.1500 ± 0.0100", "−0.0500", signed_interval(expected["nll"].interval)]
    assert "brier" not in content_with_measures(missing=True)["recipes"]["k=cbam"]["measures"]


def signed_interval(interval):
    return " to ".join(signed(end, 4) for end in interval)


def test_intervals_over_images_and_the_counts_of_each_seed():
    content = content_with_measures()
    cbam = content["recipes"]["k=cbam"]
    differences = [predicted(a, shift=10)["correct"] - predicted(b)["correct"] for a, b in zip(
        (0.85, 0.84, 0.86), (0.8, 0.81, 0.79), strict=True
    )]  # fmt: skip
    low, high = interval_over_images(np.array(differences))
    assert cbam["difference"]["images_interval"] == pytest.approx([100 * low, 100 * high])
    assert cbam["measures"]["nll"]["difference"]["images_interval"] == pytest.approx([-high, -low], rel=1e-4)
    assert cbam["measures"]["brier"]["difference"]["images_interval"] is None  # not known image by image
    # Seed 0: none has images 0 to 159 right, cbam 10 to 179.
    assert cbam["mcnemar"][0] == {
        "both": 150,
        "ours": 20,
        "baseline": 10,
        "neither": 20,
        "p": pytest.approx(0.0987, abs=1e-4),
    }
    assert content["tables"]["mcnemar"]["rows"][0] == ["k=cbam", "0", "150", "20", "10", "20", "0.099"]


def test_predictions_of_other_images_are_not_paired():
    runs = [
        result(f"k={kind}", seed, 0.8) | {"predictions": predicted(0.8)} for kind in ("none", "se") for seed in (0, 1)
    ]
    runs[3]["predictions"]["label"] = 1 - runs[3]["predictions"]["label"]
    recipe = analyse(plan_for({"k=none": [0, 0], "k=se": [0, 0]}), runs, {})["recipes"]["k=se"]
    assert recipe["difference"]["images_interval"] is None
    assert recipe["mcnemar"] == {}


def test_the_sentences():
    sentences = content_of(ACCURACIES)["sentences"]
    assert sentences[0] == (
        "kind=se − kind=none: +0.20 percentage points, 95 % interval −1.16 to +1.56, n = 5: no significant difference"
    )
    assert re.fullmatch(
        r"kind=cbam − kind=none: \+3\.10 percentage points, 95 % interval \+2\.\d\d to \+3\.\d\d, n = 5: "
        "kind=cbam is better",
        sentences[1],
    )
    worse = content_of({"a=none": [0.9, 0.91, 0.9], "a=se": [0.8, 0.81, 0.801]})["sentences"]
    assert worse[0].endswith("n = 3: a=se is worse")


def test_a_difference_that_is_lost_by_the_correction_says_so():
    base = [0.80, 0.81, 0.79, 0.80]
    close = [a + d for a, d in zip(base, [0.01, 0.02, 0.005, 0.018], strict=True)]
    alone = content_of({"k=none": base, "k=se": close})
    assert alone["sentences"][0].endswith("n = 4: k=se is better")
    crowd = {f"k={index}": [a + d for a, d in zip(base, [0.01, -0.01, 0, 0], strict=True)] for index in range(4)}
    among = content_of({"k=none": base, "k=se": close} | crowd)
    assert among["sentences"][0].endswith("no significant difference after correction for 5 comparisons")


def test_one_seed_is_allowed_and_said():
    content = content_of({"k=none": [0.8], "k=se": [0.9]})
    assert content["sentences"] == [
        "k=se − k=none: +10.00 percentage points, n = 1: one pair has no interval, so its significance is unknown"
    ]
    assert content["notes"][0].startswith("One seed: there are no intervals and no significance tests")
    assert content["tables"]["accuracy"]["rows"][1] == ["k=se", "90.00", "1", "+10.00", "", "", "", "+20", ""]


def test_equal_differences_are_not_significant():
    runs = [
        result(f"k={kind}", seed, accuracy + ours) | {"predictions": predicted(accuracy + ours)}
        for kind, ours in (("none", 0), ("se", 0.05))
        for seed, accuracy in enumerate((0.8, 0.82))
    ]
    content = analyse(plan_for({"k=none": [0, 0], "k=se": [0, 0]}), runs, {})
    assert content["sentences"] == [
        "k=se − k=none: +5.00 percentage points, n = 2: equal differences have no interval, so its significance is "
        "unknown"
    ]
    row = ["k=se", "86.00 ± 1.41", "2", "+5.00", "", "", "", "+10", ""]
    assert content["tables"]["accuracy"]["rows"][1] == row


def test_each_class_is_a_share_of_that_sides_images():
    runs = [result(f"k={kind}", seed, 0.8 + 0.1 * seed) for kind in ("none", "se") for seed in (0, 1)]
    for run in runs[2:]:
        right = run["test"]["confusion"][0][0]
        run["test"]["confusion"] = [[right, 100 - right], [0, 200]]
    recipe = analyse(plan_for({"k=none": [0, 0], "k=se": [0, 0]}, ["data.root"]), runs, {})["recipes"]["k=se"]
    assert {name: one["mean"] for name, one in recipe["per_class"].items()} == {"a": 0, "b": 0}


CONTROLLED = {
    "base=none": [0.80, 0.81, 0.79, 0.80, 0.82],
    "net=cbam": [0.83, 0.845, 0.82, 0.83, 0.85],
    "wide=none": [0.81, 0.82, 0.805, 0.81, 0.83],
}
WIDE = Control("net=cbam", "time", "width", "wide=none", {"model.width": 2.0}, {"recipe": 100.0, "control": 108.0})


def test_the_first_sentence_says_whether_attention_beats_its_strongest_control():
    itself = Control("net=cbam", "parameters", "width", "base=none", {}, {"recipe": 1000.0, "control": 990.0})
    content = content_of(CONTROLLED, controls=[WIDE, itself])
    base, net, wide = (100 * np.array(values) for values in CONTROLLED.values())
    found = compare_pairs(net, wide)
    low, high = (signed(value) for value in found.interval)
    assert content["sentences"][0] == (
        f"net=cbam beats the same cost spent otherwise: {signed(found.mean)} percentage points, 95 % interval {low} "
        f"to {high}, n = 5, against wide=none (the baseline wider, same time), the strongest of 2 controls"
    )
    # net − base is a control's comparison, too, and counted once.
    adjusted = holm([compare_pairs(net, base).p, compare_pairs(wide, base).p, found.p])
    assert content["controls"][0]["difference"]["p_holm"] == pytest.approx(adjusted[2])
    assert content["controls"][1]["difference"]["p_holm"] == pytest.approx(adjusted[0])
    rows = content["tables"]["controls"]["rows"]
    assert rows[0][:6] == ["net=cbam", "100 ms a step", "time", "wide=none", "108 ms a step", "+8.0"]
    assert rows[1][:6] == ["net=cbam", "1,000 parameters", "parameters", "base=none", "990 parameters", "−1.0"]
    assert content["notes"] == [
        "The training step of wide=none was measured 8% slower than that of net=cbam; none of the widths "
        "tried came nearer."
    ]

    equal = content_of(CONTROLLED | {"wide=none": [0.83, 0.844, 0.821, 0.83, 0.85]}, controls=[WIDE])
    assert equal["sentences"][0].startswith("net=cbam does not significantly beat the same cost spent otherwise: 0.00")
    worse = content_of(CONTROLLED | {"wide=none": [0.86, 0.87, 0.85, 0.86, 0.88]}, controls=[WIDE])
    assert worse["sentences"][0].startswith("The same cost spent otherwise beats net=cbam: −2.90 percentage points")
    one = content_of({name: values[:1] for name, values in CONTROLLED.items()}, controls=[WIDE])
    assert one["sentences"][0].startswith("Whether net=cbam beats the same cost spent otherwise is unknown: +2.00")


LONG = Control("net=cbam", "time", "epochs", "long=none", {"trainer.max_epochs": 3}, {"recipe": 9.0, "control": 6.0})


def first_finding(*, long, missing=()):
    """What is said of cbam, which beats the wider baseline, and of a control with these accuracies."""
    accuracies = CONTROLLED | {"long=none": long}
    runs = [result(name, seed, one) for name in accuracies for seed, one in enumerate(accuracies[name])]
    plan = plan_for(accuracies, controls=[WIDE, LONG])
    for settings in plan.configs.values():
        settings["trainer.max_epochs"] = 2
    return analyse(plan, [run for run in runs if run["recipe"] not in missing], {})["findings"][0]


def test_attention_beats_the_same_cost_only_if_it_beats_each_control():
    spread = [0.60, 0.99, 0.60, 0.99, 0.60]  # much lower in the mean, and it varies too much to tell
    undecided = first_finding(long=spread)
    assert undecided["sentence"].startswith("net=cbam does not significantly beat the same cost spent otherwise: +7.90")
    assert undecided["sentence"].endswith("long=none (the baseline trained for longer, same time), one of 2 controls")
    assert not undecided["significant"]
    assert first_finding(long=[0.80, 0.81, 0.79, 0.80, 0.81])["significant"]


def test_attention_does_not_beat_a_control_that_has_no_runs():
    found = first_finding(long=[0.9] * 5, missing=["long=none"])
    assert found["sentence"].startswith("Whether net=cbam beats the same cost spent otherwise is unknown: +2.00")
    assert found["sentence"].endswith("against wide=none (the baseline wider, same time); not done: long=none")
    assert not found["significant"]
    # It does not change that another control is better.
    lost = first_finding(long=[0.92, 0.93, 0.92, 0.92, 0.94], missing=["wide=none"])
    assert lost["sentence"].startswith("The same cost spent otherwise beats net=cbam: −9")
    assert lost["significant"]


def test_what_is_missing_or_unequal_is_said():
    content = content_of(
        ACCURACIES, missing=[("net-kind=se", 1), ("net-kind=none", 4)], unequal=["x is 1 in a, 2 in b"]
    )
    assert content["recipes"]["net-kind=se"]["difference"]["n"] == 3
    assert content["recipes"]["net-kind=cbam"]["difference"]["n"] == 4
    assert content["recipes"]["net-kind=cbam"]["test_acc"]["n"] == 5
    assert "With n = 4 and 2 comparisons, no p is below" in content["tables"]["accuracy"]["meaning"]
    assert "x is 1 in a, 2 in b" in content["notes"][0]
    assert "net-kind=se seed 1, net-kind=none seed 4" in content["notes"][1]


def test_a_recipe_without_runs_is_left_out_and_named():
    gone = [("net-kind=none", seed) for seed in range(5)]
    content = content_of(ACCURACIES, missing=gone)
    assert list(content["recipes"]) == ["net-kind=se", "net-kind=cbam"]
    assert content["sentences"] == []
    assert "net-kind=none seed 0" in content["notes"][0]
    markdown(content)


def test_an_epoch_without_validation_is_not_in_the_curve():
    runs = [result("k=none", seed, accuracy) for seed, accuracy in enumerate([0.7, 0.9])]
    del runs[1]["epochs"][0]["val/acc"]
    (recipe,) = analyse(plan_for({"k=none": [0.7, 0.9]}), runs, {})["recipes"].values()
    assert recipe["curve"] == {"epoch": [2], "mean": [pytest.approx(81)], "sd": [pytest.approx(200**0.5)]}


def test_signs():
    assert [signed(value) for value in (0.311, -0.1, -0.001, 0.0)] == ["+0.31", "−0.10", "0.00", "0.00"]


# The files of a real comparison


def test_the_files_agree_with_the_tests_of_the_runs(compared):
    root, _, outcome, content, _ = compared
    with (root / "report/report.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["recipe"], row["seed"]) for row in rows] == [(k, s) for s in "01" for k in ("none", "se", "cbam")]
    for row in rows:
        tested = json.loads((root / f"logs/{row['recipe']}/version_{row['seed']}/test.json").read_text())
        assert float(row["test_acc"]) == pytest.approx(100 * tested["test/acc"])
        right = sum(tested["confusion"][label][label] for label in range(3))
        assert float(row["test_acc"]) == pytest.approx(100 * right / 21)
        assert row["commit"]
        assert [row["trained_device"], row["trained_commit"]] == [row["device"], row["commit"]]
    accuracies = [[float(row["test_acc"]) for row in rows if row["recipe"] == kind] for kind in ("none", "cbam")]
    mean = np.subtract(*accuracies[::-1]).mean()
    text = (root / "report/report.md").read_text()
    for shown in (text, outcome.out):
        assert f"cbam − none: {signed(mean)} percentage points" in shown
    assert "| cbam |" in text
    assert content["recipes"]["se"]["cost"]["parameters"] == 1_147_011  # 3,591 fewer than with ten classes
    here = describe_environment(torch.device("cpu"))["device"]
    place = f"{here}, threads: {torch.get_num_threads()}, commit {commit()}"
    assert f"medians of interleaved rounds on {place}." in text


def test_accuracies_are_exact_where_a_device_has_rounded_them(compared, recipes, tmp_path):
    root = shutil.copytree(compared[0], tmp_path / "copy")
    for file in (root / "logs").glob("*/version_*/test.json"):
        tested = json.loads(file.read_text())
        file.write_text(json.dumps(tested | {"test/acc": tested["test/acc"] * (1 - 1e-7)}))  # as a float32 may be off
    words = ["--configs", *recipes.values(), "--seeds", 0, 1, "--output", root / "report"]
    results = read_results(jobs_of(plan_of(*words, "--trainer.default_root_dir", root)))
    for run in results:
        right = sum(run["test"]["confusion"][label][label] for label in range(3))
        assert run["test_acc"] == 100 * right / 21


@pytest.mark.parametrize("name", ["report.json", "report.csv", "report.md", "report.html"])
def test_a_full_disk_leaves_the_earlier_report(name, compared, command, recipes, tmp_path, monkeypatch):
    root = shutil.copytree(compared[0], tmp_path / "copy")
    file, write = root / "report" / name, os.fsync
    before = file.read_bytes()

    def fsync(number):
        if f"/.{name}." in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(number)

    monkeypatch.setattr(os, "fsync", fsync)
    options = ["--configs", *recipes.values(), "--seeds", 0, 1, "--output", root / "report", "--recompute"]
    error = one_line(command("compare", *options, "--trainer.default_root_dir", root))
    assert "cannot write the report to" in error
    assert file.read_bytes() == before
    assert not list(file.parent.glob(".*"))


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.outside, self.images, self.tags, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:")):
                self.outside.append(value)
            if name == "src" and tag == "img":
                self.images.append(value)

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_no_other_file_and_shows_everything(compared):
    root, _, _, content, _ = compared
    text = (root / "report/report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.outside == ["gallery.html"]
    assert "url(" not in re.sub(r"url\(#", "(", text)
    assert page.tags.count("svg") == 9  # differences, epochs, six costs, classes
    assert len(page.images) == 5  # Grad-CAM of three recipes, gates of two
    for image in page.images:
        pixels = np.asarray(Image.open(BytesIO(b64decode(image.split(",")[1]))).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    words = " ".join(" ".join(page.text).split())
    assert content["sentences"][1] in words
    for expected in ("trainer.max_epochs: 2", "model.attention.kind", content["runs"][0]["commit"], "torch"):
        assert expected in words
    assert len(set(re.findall(r"seed (\d), epoch", words))) == 1


def test_a_gallery_of_the_first_seeds_networks_is_beside_the_report(compared):
    root, _, _, content, _ = compared
    text = (root / "report/gallery.html").read_text("utf-8")
    shown = json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', text, re.DOTALL)[1])
    assert [network["name"] for network in shown["networks"]] == ["none", "se", "cbam"]
    for network in shown["networks"]:
        (run,) = [run for run in content["runs"] if (run["recipe"], run["seed"]) == (network["name"], 0)]
        assert network["description"].endswith(f", epoch {run['epoch']}, {run['checkpoint']}")
        right = [top[0][0] == label for top, label in zip(network["top"], shown["images"]["label"], strict=True)]
        assert 100 * np.mean(right) == pytest.approx(run["test_acc"])


def test_pictures_are_of_a_seed_whose_checkpoints_are_there(compared, command, recipes, tmp_path):
    root = shutil.copytree(compared[0], tmp_path / "copy")
    (root / "checkpoints/se/version_0/best.ckpt").unlink()
    options = ["--configs", *recipes.values(), "--seeds", 0, 1, "--output", root / "report"]
    outcome = command("compare", *options, "--trainer.default_root_dir", root, "--recompute")
    assert outcome.status == 0, outcome.err
    page = (root / "report/report.html").read_text()
    assert "no pictures" not in page
    gallery = (root / "report/gallery.html").read_text("utf-8")
    second = {("none", "1"), ("se", "1"), ("cbam", "1")}
    assert set(re.findall(r"(none|se|cbam), seed (\d), epoch", page)) == second
    assert set(re.findall(r"checkpoints/(none|se|cbam)/version_(\d)", gallery)) == second


def test_other_test_images_and_another_program_for_corrupted_ones_are_noted():
    def notes(images=200, version="1", unequal=()):
        runs = [result(f"k={kind}", seed, 0.8) for kind in ("none", "cbam") for seed in (0, 1)]
        for run in runs:
            run["predictions"] = predicted(0.8)
            run["test"]["robustness"] = {"environment": {"libraries": "pillow 1"}}
        runs[0]["predictions"] = predicted(0.8, images)
        runs[0]["test"]["robustness"]["environment"]["libraries"] = f"pillow {version}"
        return analyse(plan_for({"k=none": [0] * 2, "k=cbam": [0] * 2}, unequal), runs, {})["notes"]

    assert notes() == []
    assert notes(images=199) == ["The runs were not tested on the same images, so their figures cannot be compared."]
    assert len(notes(images=199, unequal=["data.root a and b"])) == 1, "which says so, too"
    assert len(notes(images=199, unequal=["trainer.max_epochs 1 and 2"])) == 2, "which does not explain it"
    (note,) = notes(version="2")
    assert note == (
        "The corrupted images were not tested with the same libraries: pillow 2 (k=none); pillow 1 (k=none, k=cbam)."
    )


def test_other_test_images_of_a_folder_under_the_same_names_are_not_paired():
    runs = [result(f"k={kind}", seed, 0.8) for kind in ("none", "cbam") for seed in (0, 1)]
    for run, images in zip(runs, ("a", "a", "a", "b"), strict=True):
        run["predictions"] = predicted(0.8)
        run["test"]["tested_images"] = images
    content = analyse(plan_for({"k=none": [0] * 2, "k=cbam": [0] * 2}), runs, {})
    assert content["notes"] == ["The runs were not tested on the same images, so their figures cannot be compared."]
    assert content["recipes"]["k=cbam"]["mcnemar"] == {}


def test_other_training_images_of_a_folder_are_noted():
    def notes(*digests, unequal=()):
        runs = [result("k=none", seed, 0.8) for seed in range(len(digests))]
        for run, digest in zip(runs, digests, strict=True):
            run["test"] |= {"trained_images": digest}
        return analyse(plan_for({"k=none": [0] * len(digests)}, unequal), runs, {})["notes"]

    assert notes("a", "a") == notes(None, None) == notes(None, "a") == []  # of earlier versions, it is not known
    assert notes("a", "b") == ["The runs were not trained on the same images: their folder has changed between them."]
    assert len(notes("a", "b", unequal=["data.root a and b"])) == 1, "which says so, too"
    assert len(notes("a", "b", unequal=["trainer.max_epochs 1 and 2"])) == 2, "which does not explain it"


def test_where_runs_were_trained_is_noted_where_it_differs():
    def notes(**changes):
        runs = [result(f"k={kind}", seed, 0.8) for kind in ("none", "cbam") for seed in (0, 1)]
        runs[3] |= changes
        return analyse(plan_for({"k=none": [0] * 2, "k=cbam": [0] * 2}), runs, {})["notes"]

    assert notes(trained_date="2024-05-07") == []
    assert notes(trained_commit="c0ffee, then beef") == [
        "The runs were not trained with the same commit: c0ffee (k=none, k=cbam); c0ffee, then beef (k=cbam)."
    ]
    (note,) = notes(device="cuda: A")
    assert note == "The runs were not tested with the same device: cpu: abacus (k=none, k=cbam); cuda: A (k=cbam)."
    unknown = dict.fromkeys(("trained_device", "trained_versions", "trained_commit"), "unknown")
    assert notes(**unknown) == ["Where 1 of 4 runs were trained, in part or all, was not noted."]
    both = notes(trained_device="cuda: A", device="cuda: A")
    assert both == [note.replace("tested", "trained")], "one line for both"


def test_where_the_runs_were_trained_and_tested_is_told_apart():
    def measured(**changes):
        runs = [result("k=none", 0, 0.8) | changes, result("k=none", 1, 0.8)]
        return analyse(plan_for({"k=none": [0, 0]}), runs[: 1 if "trained_device" in changes else 2], {})["measured"]

    here = "cpu: abacus, with torch 0, commit c0ffee"
    assert f"; trained and tested on: {here}; date: 2024-05-06; report: commit {commit()}, 20" in measured()
    beef = here.replace("c0ffee", "beef")
    assert f"; trained on: {beef} (1 run); or {here} (1 run); tested on: {here}; " in measured(trained_commit="beef")
    assert "; trained on: unknown; tested on: cpu: abacus" in measured(trained_device="unknown")


def test_pictures_that_cannot_be_drawn_leave_the_page(compared, command, recipes, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    root = shutil.copytree(compared[0], tmp_path / "copy")
    monkeypatch.setattr(page, "pictures_of", fail)
    options = ["--configs", *recipes.values(), "--seeds", 0, 1, "--output", root / "report", "--recompute"]
    outcome = command("compare", *options, "--trainer.default_root_dir", root)
    assert outcome.status == 0, outcome.err
    assert "none: no pictures: CUDA out of memory" in (root / "report/report.html").read_text()


def test_a_gallery_that_cannot_be_made_is_left_out_with_the_reason(tmp_path):
    path = tmp_path / "gallery.html"
    path.write_text("of an earlier report")
    results = [result("net-kind=none", 0, 0.8)]  # whose best.ckpt is not there
    assert "best.ckpt is not there" in write_gallery(path, plan_for({"net-kind=none": [0.8]}), results)
    assert not path.exists()


def test_the_same_report_again_from_the_runs(compared, command, quick, recipes, tmp_path):
    root = shutil.copytree(compared[0], tmp_path / "copy")
    options = ["--configs", *recipes.values(), "--seeds", 0, 1, "--output", root / "report"]
    options += ["--trainer.default_root_dir", root]
    before = json.loads((root / "report/report.json").read_text())
    (root / "report/report.html").unlink()
    quick.clear()
    outcome = command("compare", *options, "--recompute")
    assert outcome.status == 0, outcome.err
    assert not quick, "nothing is trained or tested"
    after = json.loads((root / "report/report.json").read_text())
    assert after["recipes"] == before["recipes"]  # the costs, too
    assert (root / "report/report.html").exists()


DAMAGE = {"environment": 5}, {"trained_on": [{}]}, {"confusion": None}, {"confusion": [[0]]}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_test_is_named(damage, compared, command, recipes, tmp_path):
    root = shutil.copytree(compared[0], tmp_path / "copy")
    file = root / "logs/none/version_0/test.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    options = ["--configs", *recipes.values(), "--seeds", 0, 1, "--output", root / "report", "--recompute"]
    error = one_line(command("compare", *options, "--trainer.default_root_dir", root))
    assert f"test.json or robustness.json in {file.parent} is damaged (" in error
    assert "; restore it, or delete it: compare then tests the run again" in error


@pytest.mark.parametrize(
    ("report", "runs"),
    [
        *(("notebooks", "notebooks"), ("notebooks-controls", "notebooks"), ("resnet18-cifar100", "resnet18-cifar100")),
        *(("resnet20-cifar100", "resnet20-cifar100"), ("resnet20-cifar100-controls", "resnet20-cifar100")),
    ],
)
def test_the_report_of_the_committed_runs_says_what_they_say(report, runs, tmp_path):
    folder, runs = (REPOSITORY / "docs/results" / name for name in (report, runs))
    with (folder / "report.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    record = folder / "comparison.json"  # only where there are controls
    controls = {one["name"] for one in json.loads(record.read_text())["controls"]} if record.exists() else set()
    recipes, seeds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("recipe", "seed"))
    given = [recipe for recipe in recipes if recipe == recipes[0] or recipe not in controls]
    configs = [folder / f"configs/{recipe}.yaml" for recipe in given]
    plan = plan_of("--configs", *configs, "--seeds", *seeds, "--output", tmp_path, "--trainer.default_root_dir", runs)
    if controls:
        shutil.copy(record, tmp_path)
        plan = add_controls(plan, ["time", "parameters"], may_choose=False)
    results = read_results(jobs_of(plan))
    assert len(results) == len(rows)
    for result, row in zip(results, rows, strict=True):
        assert (result["recipe"], str(result["seed"])) == (row["recipe"], row["seed"])
        for name in ("epoch", "val_acc", "test_acc", "test_loss", "nll", "ece", "calibrated_nll"):
            assert float(row[name]) == pytest.approx(result[name], abs=1e-4), name
    text = (folder / "report.md").read_text()
    for sentence in analyse(plan, results, {})["sentences"]:  # with the names of the files, not of a grid's values
        assert sentence.replace("resnet20-kind=", "") in text


@pytest.mark.slow
def test_odd_names_and_precisions_are_reported(recipes, command, quick, tmp_path):
    paths = {name: tmp_path / f"{name}.yaml" for name in ("a|b[v1]", "<i>*x*")}
    for path in paths.values():
        shutil.copy(recipes["cbam"], path)
    options = ["--configs", *paths.values(), "--seeds", 0, "--output", tmp_path / "report", "--jobs", 1]
    options += ["--trainer.default_root_dir", tmp_path, "--trainer.precision", "bf16-true"]
    outcome = command("compare", *options)
    assert outcome.status == 0, outcome.err
    for name, tables in zip(paths, (2, 3), strict=True):  # accuracy, images without the baseline, costs
        assert len(re.findall(rf"^│ {re.escape(name)} +│", outcome.out, re.MULTILINE)) == tables
    lines = (tmp_path / "report/report.md").read_text().splitlines()
    assert lines[0] == r"# \<i>\*x\* against a\|b\[v1\]"
    rows = [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("| ")]
    # As many columns in each row of a table: accuracy, six measures of two recipes, images, costs.
    assert rows == [10] * 4 + [8] * 14 + [8] * 3 + [8] * 4
    assert "&lt;i&gt;*x* against a|b[v1]" in (tmp_path / "report/report.html").read_text()

    def reject(word):
        raise AssertionError(f"{word} is not JSON")

    content = json.loads((tmp_path / "report/report.json").read_text(), parse_constant=reject)
    assert all(recipe["cost"]["latency_256"] > 0 for recipe in content["recipes"].values())
