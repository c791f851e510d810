"""`test --corruptions`: figures by hand, what is written, and what is rejected."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from cbam_pl import environment
from cbam_pl.commands import robustness
from cbam_pl.commands.robustness import decisive_options, find_corruptions, means
from cbam_pl.data.corruptions import CORRUPTIONS, corrupt
from cbam_pl.data.folder import load_folder
from cbam_pl.errors import UserError
from cbam_pl.training.classifier import Classifier
from tests.helpers import REPOSITORY, checkpoint, one_line


def test_accuracies_are_those_of_the_corrupted_images(trained, command, tmp_path, image_folder):
    root = shutil.copytree(trained[0], tmp_path / "run")
    words = ["--corruptions", "fog", "contrast", "satu", "--severities", 5, 2]
    outcome = command("test", "--trainer.default_root_dir", root, "--model.test_time_flip", "true", *words)
    assert outcome.status == 0, outcome.err
    best = checkpoint(root, "best")
    model = Classifier.load_from_checkpoint(root / "checkpoints/tiny/version_0/best.ckpt").eval()
    images = load_folder(str(image_folder)).test
    data = best["ImageDataModule"]
    expected = {}
    for name in ("fog", "contrast", "saturate"):
        for severity in (2, 5):
            pixels = corrupt(images.pixels, name, severity, range(21)) / 255
            x = (pixels - torch.tensor(data["mean"]).view(3, 1, 1)) / torch.tensor(data["std"]).view(3, 1, 1)
            with torch.no_grad():
                right = (model(x) + model(x.flip(3))).argmax(1) == images.labels
            expected.setdefault(name, {})[str(severity)] = float(right.double().mean())
    logs = root / "logs/tiny/version_0"
    record = json.loads((logs / "robustness.json").read_text())
    assert record["accuracy"] == expected
    common = [*expected["fog"].values(), *expected["contrast"].values()]
    assert record["mean"]["common"] == pytest.approx(sum(common) / 4)
    assert record["mean"]["extra"] == pytest.approx(sum(expected["saturate"].values()) / 2)
    clean = json.loads((logs / "test.json").read_text())
    assert record["test/acc"] == clean["test/acc"]
    assert (record["epoch"], record["images"], record["seed"]) == (best["epoch"] + 1, 21, 0)
    rest = ["--model.test_time_flip", "true"]
    assert record["options"] == clean["options"] == rest  # so that compare knows the test as its own
    row = [*expected["fog"].values(), sum(expected["fog"].values()) / 2]
    assert re.search("fog.*" + ".*".join(f"{100 * value:.2f}" for value in row), outcome.out)
    assert "mean of 2 common" in outcome.out
    assert "mean of 1 extra" in outcome.out
    assert (logs / "robustness.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^saturate: [\d.]+ [\d.]+ %", outcome.err, re.MULTILINE)


def test_what_was_measured_before_stays(trained, command, tmp_path, monkeypatch):
    root = shutil.copytree(trained[0], tmp_path / "run")
    logs = root / "logs/tiny/version_0"

    def measure(*words):
        outcome = command("test", "--trainer.default_root_dir", root, "--corruptions", *words)
        assert outcome.status == 0, outcome.err
        record = json.loads((logs / "robustness.json").read_text())
        return record, {name: list(row) for name, row in record["accuracy"].items()}, outcome.out

    first, _, _ = measure("saturate", "fog", "--severities", 1, 5)
    record, rows, out = measure("contrast", "--severities", 1, 5)
    assert rows == {name: ["1", "5"] for name in ("fog", "contrast", "saturate")}
    assert {**record["accuracy"], **first["accuracy"]} == record["accuracy"]
    assert record["mean"]["extra"] == first["mean"]["extra"]
    assert record["mean"] == means(record["accuracy"])
    assert record["seconds"] > first["seconds"]
    assert "saturate" not in out  # what was asked for now
    assert measure("fog", "--severities", 5)[0]["accuracy"] == record["accuracy"]
    # Not where the means would be over other severities of each, or the figures of another program.
    assert measure("jpeg", "--severities", 2)[1] == {"jpeg_compression": ["2"]}
    assert measure("jpeg", "--severities", 1)[1] == {"jpeg_compression": ["1", "2"]}
    monkeypatch.setattr(environment, "commit", lambda: "another")
    assert measure("fog", "--severities", 1, 2)[1] == {"fog": ["1", "2"]}


def test_a_measurement_that_is_stopped_leaves_the_test(trained, command, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    root = shutil.copytree(trained[0], tmp_path / "run")
    monkeypatch.setattr(robustness, "_corrupt", stop)
    outcome = command("test", "--trainer.default_root_dir", root, "--corruptions", "fog")
    assert outcome.status == 130
    assert json.loads((root / "logs/tiny/version_0/test.json").read_text())["images"] == 21
    assert "test/acc" in outcome.out


@pytest.mark.parametrize("commit", ["abc", "abc-dirty"])
def test_a_measurement_that_is_stopped_goes_on_where_it_was(commit, trained, command, tmp_path, monkeypatch):
    root, measured = shutil.copytree(trained[0], tmp_path / "run"), []
    file = root / "logs/tiny/version_0/robustness.json"
    words = ["--trainer.default_root_dir", root, "--severities", 1, 2, "--corruptions", "fog", "contrast"]
    corrupt = robustness.corrupt

    def stop_at_contrast(pixels, name, *others):
        if name == "contrast" and "contrast" not in measured:
            measured.append(name)
            raise KeyboardInterrupt
        measured.append(name)
        return corrupt(pixels, name, *others)

    monkeypatch.setattr(robustness, "corrupt", stop_at_contrast)
    monkeypatch.setattr(environment, "commit", lambda: commit)
    assert command("test", *words).status == 130
    assert not file.exists()
    measured.clear()
    measured.append("contrast")  # no stop this time
    outcome = command("test", *words)
    assert outcome.status == 0
    # A program that was changed may measure otherwise.
    assert ("fog" in measured) == commit.endswith("-dirty")
    assert ("measured before" in outcome.err) == (not commit.endswith("-dirty"))
    assert not file.with_name("robustness.partial.json").exists()
    whole = json.loads(file.read_text())
    assert {name: list(row) for name, row in whole["accuracy"].items()} == {"fog": ["1", "2"], "contrast": ["1", "2"]}
    assert whole["mean"] == means(whole["accuracy"])


def test_another_measurement_keeps_what_one_that_was_stopped_has_measured(trained, command, tmp_path, monkeypatch):
    root, measured = shutil.copytree(trained[0], tmp_path / "run"), []
    file = root / "logs/tiny/version_0/robustness.json"
    words = ["test", "--trainer.default_root_dir", root, "--severities", 1, "--corruptions"]
    corrupt = robustness.corrupt

    def stop_at_contrast(pixels, name, *others):
        if name == "contrast":
            raise KeyboardInterrupt
        measured.append(name)
        return corrupt(pixels, name, *others)

    monkeypatch.setattr(environment, "commit", lambda: "abc")
    with monkeypatch.context() as patch:
        patch.setattr(robustness, "corrupt", stop_at_contrast)
        assert command(*words, "fog", "snow", "contrast").status == 130
        assert command(*words, "frost", "contrast").status == 130, "stopped, too"
        assert command(*words, "fog").status == 0
    assert list(json.loads(file.read_text())["accuracy"]) == ["fog"]
    monkeypatch.setattr(robustness, "corrupt", lambda *given: (measured.append(given[1]), corrupt(*given))[1])
    outcome = command(*words, "fog", "snow", "frost", "contrast")
    assert outcome.status == 0, outcome.err
    assert sorted(set(measured)) == ["contrast", "fog", "frost", "snow"]
    assert len(measured) == 4 * measured.count("fog"), "each once"
    assert set(json.loads(file.read_text())["accuracy"]) == set(measured)
    assert not file.with_name("robustness.partial.json").exists()


def test_a_test_without_corruptions_measures_none(trained, command, tmp_path):
    root = shutil.copytree(trained[0], tmp_path / "run")
    assert command("test", "--trainer.default_root_dir", root).status == 0
    assert not list(root.rglob("robustness*"))


def test_short_names():
    assert find_corruptions([]) == list(CORRUPTIONS)
    assert find_corruptions(["jpeg", "fog", "gaussian_blur"]) == ["jpeg_compression", "fog", "gaussian_blur"]
    for words, message in (
        (["jepg"], "--corruptions jepg is unknown; did you mean jpeg_compression?"),
        (["gausian_noise"], "--corruptions gausian_noise is unknown; did you mean gaussian_noise?"),
        (["rain"], "--corruptions rain is unknown; use some of gaussian_noise, shot_noise, "),
        (["gaussian"], "--corruptions gaussian is ambiguous; use gaussian_noise or gaussian_blur"),
        (["fog", "fog"], "--corruptions names fog twice"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            find_corruptions(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corruptions", "forg"], "--corruptions forg is unknown; did you mean fog?"),
        (["--corruptions", "--severities", 6], "--severities 6 is unknown; use some of 1 2 3 4 5"),
        (["--corruptions", "--severities", 2, 2], "--severities names 2 twice; name each once"),
        (["--severities", 2], "--severities has no effect without --corruptions"),
        (["--corruptions", "--trainer.limit_test_batches", 1], "trainer.limit_test_batches=1 does not work with"),
        (["--corruptions", "--trainer.fast_dev_run", "true"], "trainer.fast_dev_run=True does not work with"),
    ],
)
def test_mistakes_are_rejected_before_the_test(words, message, trained, command):
    root = trained[0]
    assert message in one_line(command("test", "--trainer.default_root_dir", root, *words))
    assert not (root / "logs/tiny/version_0/test.json").exists()


def test_means_are_of_what_was_measured():
    assert means({"fog": {"1": 0.5, "5": 0.1}, "snow": {"1": 0.7, "5": 0.3}}) == {
        "common": pytest.approx(0.4),
        "extra": None,
    }


def test_options_that_decide_the_figures():
    words = [
        "--corruptions",
        "fog",
        "jpeg",
        "--trainer.precision",
        "bf16-mixed",
        "--severities",
        "1",
        "--data.root",
        "x",
    ]
    decisive = ["--trainer.precision", "bf16-mixed", "--data.root", "x"]
    assert decisive_options(words) == decisive
    assert decisive_options([*words, "--calibrate", "--trainer.accelerator", "auto"]) == decisive
    assert decisive_options(["--trainer.accelerator=cpu"]) == ["--trainer.accelerator", "cpu"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(trained, tmp_path):
    accuracies = []
    for count in (1, 2):
        root = shutil.copytree(trained[0], tmp_path / str(count))
        words = ["test", "--trainer.default_root_dir", root, "--trainer.accelerator", "cpu", "--data.batch_size", count]
        words += ["--trainer.devices", count, "--trainer.strategy", "ddp" if count > 1 else "auto"]
        words += ["--corruptions", "impulse_noise", "fog", "contrast"]
        done = subprocess.run(
            [sys.executable, "train.py", *map(str, words)], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        accuracies.append(json.loads((root / "logs/tiny/version_0/robustness.json").read_text())["accuracy"])
    assert accuracies[0] == accuracies[1]
    assert any(value < 1 for row in accuracies[0].values() for value in row.values())


def test_corruptions_are_measured_again_on_other_images(trained, command, tmp_path, monkeypatch):
    root, corrupted = shutil.copytree(trained[0], tmp_path / "run"), []
    corrupt = robustness.corrupt
    monkeypatch.setattr(robustness, "corrupt", lambda *given: (corrupted.append(given[1]), corrupt(*given))[1])
    monkeypatch.setattr(environment, "commit", lambda: "abc")
    words = ["test", "--trainer.default_root_dir", root, "--severities", 1, "--corruptions", "fog"]
    file = root / "logs/tiny/version_0/robustness.json"
    for change, measured in ({}, True), ({}, False), ({"images": 20}, True), ({"test/acc": 0.1}, True):
        if change:
            file.write_text(json.dumps(json.loads(file.read_text()) | change))
        corrupted.clear()
        assert command(*words).status == 0
        assert bool(corrupted) == measured
