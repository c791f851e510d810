"""`test` and `validate`: figures by hand, where they are written, and of how many images they are."""

import errno
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cbam_pl.data.folder import load_folder
from cbam_pl.training.classifier import Classifier
from tests.helpers import callbacks, checkpoint, fit, one_line, scalars


class Send(Callback):
    """Sends a signal after the first batch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_test(number, trained, command, tmp_path):
    root = shutil.copytree(trained[0], tmp_path / "run")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background lacks
    try:
        outcome = command("test", "--trainer.default_root_dir", root, *callbacks(Send, number=int(number)))
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning ignores from then on
    assert outcome.status == 128 + number
    assert not (root / "logs/tiny/version_0/test.json").exists()


def test_results_that_cannot_be_written_are_named(trained, command, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    root = shutil.copytree(trained[0], tmp_path / "run")
    monkeypatch.setattr(np, "savez_compressed", full)
    error = one_line(command("test", "--trainer.default_root_dir", root))
    assert error.startswith(f"error: cannot write {root}/logs/tiny/version_0 (No space left on device); "), error


def test_test_measures_the_newest_best_and_logs_it_once_at_its_epoch(trained, command, tmp_path, image_folder):
    root = shutil.copytree(trained[0], tmp_path / "run")
    for _ in range(2):
        outcome = command("test", "--trainer.default_root_dir", root)
        assert outcome.status == 0, outcome.err
    best = checkpoint(root, "best")
    printed = dict(re.findall(r"^(test/\w+)  ([\d.]+)$", outcome.out, re.MULTILINE))
    logged = scalars(root / "logs/tiny/version_0")
    for tag in ("test/loss", "test/acc"):
        ((step, value),) = logged[tag]
        assert step == best["epoch"] + 1
        assert float(printed[tag]) == pytest.approx(value, abs=1e-4)

    # By hand: every test image through the network of best.ckpt.
    model = Classifier.load_from_checkpoint(root / "checkpoints/tiny/version_0/best.ckpt").eval()
    images = load_folder(str(image_folder)).test
    data = best["ImageDataModule"]
    x = (images.pixels / 255 - torch.tensor(data["mean"]).view(3, 1, 1)) / torch.tensor(data["std"]).view(3, 1, 1)
    with torch.no_grad():
        logits = model(x)
    loss = torch.nn.functional.cross_entropy(logits, images.labels)
    assert logged["test/loss"][0][1] == pytest.approx(float(loss), abs=1e-5)
    assert logged["test/acc"][0][1] == pytest.approx(float((logits.argmax(1) == images.labels).double().mean()))
    record = json.loads((root / "logs/tiny/version_0/test.json").read_text())
    counts = [[0] * 3 for _ in range(3)]
    for true, predicted in zip(images.labels.tolist(), logits.argmax(1).tolist(), strict=True):
        counts[true][predicted] += 1
    assert record["confusion"] == counts  # of one test, though two were made
    assert (record["epoch"], record["images"], record["classes"]) == (best["epoch"] + 1, 21, ["blue", "green", "red"])
    assert record["step"] == best["global_step"]
    assert record["test/acc"] == pytest.approx(sum(counts[label][label] for label in range(3)) / 21)
    assert record["options"] == []  # that decide the figures
    assert record["class_accuracy"] == {
        name: pytest.approx(counts[label][label] / 7) for label, name in enumerate(record["classes"])
    }
    nll = float(torch.nn.functional.cross_entropy(logits, images.labels))
    probabilities = logits.softmax(1)
    brier = float((probabilities - torch.eye(3)[images.labels]).square().sum(1).mean())
    assert record["measures"]["nll"] == pytest.approx(nll, abs=1e-6)
    assert record["measures"]["brier"] == pytest.approx(brier, abs=1e-6)
    assert f"nll  {nll:.4f}\nbrier  {brier:.4f}\nece  {record['measures']['ece']:.4f}\n" in outcome.out
    assert f"red  {counts[2][2] / 7:.4f}" in outcome.out

    # One row for each image, in the order of the data.
    with np.load(root / "logs/tiny/version_0/test.npz") as file:
        arrays = dict(file)
    assert arrays["image"].tolist() == list(range(21))
    assert arrays["label"].tolist() == images.labels.tolist()
    assert arrays["predicted"].tolist() == logits.argmax(1).tolist()
    assert arrays["probabilities"].dtype == np.float16
    assert arrays["probabilities"] == pytest.approx(probabilities.numpy(), abs=1e-3)
    for name in ("nll", "brier", "ece"):
        assert arrays[name].mean() == pytest.approx(record["measures"][name], abs=1e-6)


def test_calibration_is_of_the_validation_images(trained, command, tmp_path, image_folder):
    root = shutil.copytree(trained[0], tmp_path / "run")
    place = ("--trainer.default_root_dir", root)
    assert command("test", *place).status == 0
    before = json.loads((root / "logs/tiny/version_0/test.json").read_text())
    outcome = command("test", *place, "--calibrate")
    assert outcome.status == 0, outcome.err
    record = json.loads((root / "logs/tiny/version_0/test.json").read_text())
    calibration = record.pop("calibration")
    for changed in ("environment", "test/loss"):
        del before[changed], record[changed]
    assert record == before  # with the same options, so that compare does not test again
    temperature = calibration["temperature"]
    assert calibration["images"] == 9
    assert f"temperature  {temperature:.4f}, fitted on 9 validation images" in outcome.out

    # By hand: the temperature of the 9 validation images, on the test images.
    model = Classifier.load_from_checkpoint(root / "checkpoints/tiny/version_0/best.ckpt").eval()
    state = checkpoint(root, "best")["ImageDataModule"]
    source = load_folder(str(image_folder))
    held_out = source.train.subset(torch.isin(source.train.ids, state["val_ids"]).nonzero()[:, 0])
    mean, std = (torch.tensor(state[name]).view(3, 1, 1) for name in ("mean", "std"))

    def nll(images, value):
        with torch.no_grad():
            logits = model((images.pixels / 255 - mean) / std).double()
        return float(torch.nn.functional.cross_entropy(logits / value, images.labels))

    grid = [0.05 * 1.02**step for step in range(303)]
    assert nll(held_out, temperature) <= min(nll(held_out, value) for value in grid) + 1e-6
    assert calibration["measures"]["nll"] == pytest.approx(nll(source.test, temperature), rel=1e-4, abs=1e-6)
    with np.load(root / "logs/tiny/version_0/test.npz") as arrays:
        for name in ("nll", "brier", "ece"):
            assert arrays[f"calibrated_{name}"].mean() == pytest.approx(calibration["measures"][name], abs=1e-6)


def test_calibration_needs_validation_images(trained, command, tmp_path):
    root = shutil.copytree(trained[0], tmp_path / "run")
    path = root / "checkpoints/tiny/version_0/best.ckpt"
    content = torch.load(path, weights_only=True)
    content["datamodule_hyper_parameters"]["val_size"] = 0
    torch.save(content, path)
    error = one_line(command("test", "--calibrate", "--trainer.default_root_dir", root))
    assert "--calibrate: " in error
    assert "was trained with data.val_size=0" in error
    assert not (root / "logs/tiny/version_0/test.json").exists()
    with pytest.warns(UserWarning, match="are not those of the checkpoint"):  # which had others held out
        outcome = command("validate", "--trainer.default_root_dir", root)
    assert outcome.status == 0, outcome.err
    assert "test images, as data.val_size=0, of folder:" in outcome.out


def test_validate_gives_the_figures_of_training(trained, command):
    root, _ = trained
    outcome = command("validate", "--trainer.default_root_dir", root, "--ckpt_path", "last")
    assert outcome.status == 0, outcome.err
    figures = checkpoint(root)["figures"]
    assert f"val/loss  {figures['val/loss']:.4f}" in outcome.out
    assert f"val/acc  {figures['val/acc']:.4f}" in outcome.out


def test_testing_again_replaces_the_point_and_a_rejected_test_keeps_it(trained, command, tmp_path):
    root = shutil.copytree(trained[0], tmp_path / "run")
    test = ("test", "--trainer.default_root_dir", root)

    def points():
        return list((root / "logs/tiny/version_0").glob("events*.test-epoch*"))

    assert command(*test).status == 0
    (first,) = points()
    assert command(*test, "--data.root", tmp_path / "nowhere").status == 2
    assert points() == [first]
    assert command(*test).status == 0
    (second,) = points()
    assert second != first


def test_figures_of_a_part_say_of_how_many_images_they_are(trained, command, tmp_path):
    root = shutil.copytree(trained[0], tmp_path / "run")
    options = ["--trainer.default_root_dir", root, "--data.batch_size", 3]
    # Evaluation takes up to four times as many at once, here 11 and 10.
    outcome = command("test", *options, "--trainer.limit_test_batches", 1)
    assert outcome.status == 0, outcome.err
    assert re.search(r"epoch \d, on 11 of 21 test images of folder:", outcome.out), outcome.out
    record = json.loads((root / "logs/tiny/version_0/test.json").read_text())
    assert record["images"] == 11 == sum(map(sum, record["confusion"]))
    # Every part of a split is of all its classes, not of the first ones.
    assert all(sum(row) for row in record["confusion"])
    outcome = command("validate", *options, "--trainer.limit_val_batches", 1, "--data.batch_size", 1)
    assert re.search(r"epoch \d, on 3 of 9 val images of folder:", outcome.out), outcome.out


def test_a_dry_run_writes_nothing(trained, command, tmp_path):
    root = shutil.copytree(trained[0], tmp_path / "run")
    before = {path: path.lstat().st_mtime_ns for path in root.rglob("*")}
    outcome = command("test", "--trainer.default_root_dir", root, "--trainer.fast_dev_run", "true")
    assert outcome.status == 0, outcome.err
    assert {path: path.lstat().st_mtime_ns for path in root.rglob("*")} == before


def test_images_of_other_classes_are_rejected(trained, command):
    best = trained[0] / "checkpoints/tiny/version_0/best.ckpt"
    error = one_line(command("test", "--data.dataset", "shapes", "--ckpt_path", best))
    assert "(blue, green, red) are not those" in error


@pytest.mark.parametrize(
    ("which", "stage"), [("test", "val"), ("validate", "test"), ("predict", "test"), ("predict", "predict")]
)
def test_limits_of_other_stages_are_not_offered(which, stage, command):
    outcome = command(which, f"--trainer.limit_{stage}_batches", 2)
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: unknown key trainer.limit_{stage}_batches")


@pytest.mark.parametrize(("which", "limit"), [("test", "limit_test_batches"), ("validate", "limit_val_batches")])
def test_no_images_are_rejected(which, limit, trained, command):
    error = one_line(command(which, "--trainer.default_root_dir", trained[0], f"--trainer.{limit}", 0))
    assert f"trainer.{limit}=0 evaluates no image; leave it out" in error


def test_a_callback_that_changes_the_batches_is_rejected(trained, command):
    words = ["--trainer.default_root_dir", trained[0], "--trainer.callbacks", "BatchSizeFinder"]
    assert "BatchSizeFinder does not work here; give data.batch_size instead" in one_line(command("test", *words))


def test_a_test_needs_no_validation_images(trained, command, tmp_path, image_folder):
    root, other = shutil.copytree(trained[0], tmp_path / "run"), tmp_path / "other"
    shutil.copytree(image_folder / "test", other / "test")
    for name in ("blue", "green", "red"):  # of which nothing could be held out
        (other / "train" / name).mkdir(parents=True)
        shutil.copy(image_folder / "test" / name / "0.png", other / "train" / name)
    whole = command("test", "--trainer.default_root_dir", root)
    options = ["--trainer.default_root_dir", root, "--data.root", other]
    outcome = command("test", *options)
    assert outcome.status == 0, outcome.err
    assert (outcome.out, outcome.err) == (whole.out, whole.err)
    assert "too few to hold any out" in one_line(command("validate", *options))
    assert "too few to hold any out" in one_line(command("test", *options, "--calibrate"))


def test_a_checkpoint_in_no_run_is_tested_and_the_program_says_that_nothing_is_written(trained, command, tmp_path):
    loose = shutil.copy(trained[0] / "checkpoints/tiny/version_0/best.ckpt", tmp_path / "loose.ckpt")
    outcome = command("test", "--ckpt_path", loose)
    assert outcome.status == 0, outcome.err
    assert f"nothing is written, as {loose} is in no folder checkpoints/RECIPE/version_N of a run" in outcome.out
    assert [*tmp_path.iterdir()] == [loose]
    outcome = command("validate", "--ckpt_path", loose)
    assert outcome.status == 0
    assert "nothing is written" not in outcome.out


def test_validation_images_that_were_trained_on_are_left_out(trained, command, tmp_path, image_folder):
    root, moved = shutil.copytree(trained[0], tmp_path / "run"), tmp_path / "moved"
    shutil.copytree(image_folder, moved, ignore=shutil.ignore_patterns(".*"))
    source = load_folder(str(image_folder)).train
    held_out = torch.isin(source.ids, checkpoint(root, "best")["ImageDataModule"]["val_ids"])
    files = sorted((moved / "train").glob("*/*.png"))  # in the order of the ids

    def move(index):
        (moved / "val" / files[index].parent.name).mkdir(parents=True, exist_ok=True)
        files[index].rename(moved / "val" / files[index].parent.name / files[index].name)

    seen = (~held_out).nonzero()[:, 0].tolist()
    for name in ("blue", "green", "red"):
        move(next(index for index in seen if files[index].parent.name == name))
    options = ["--trainer.default_root_dir", root, "--data.root", moved]
    assert "and all validation images were trained on; restore them" in one_line(command("validate", *options))
    move(int(held_out.nonzero()[0]))
    with pytest.warns(UserWarning, match="; 3 of the 4 validation images were trained on, and are left out"):
        outcome = command("validate", *options)
    assert outcome.status == 0, outcome.err
    assert "on 1 val images of folder:" in outcome.out


def test_a_val_folder_may_come_after_a_training_with_a_val_size(command, recipe, tmp_path, image_folder):
    moved = shutil.copytree(image_folder, tmp_path / "moved", ignore=shutil.ignore_patterns(".*"))
    options = ["--data.root", moved, "--trainer.max_epochs", 1]
    assert command(*fit(recipe, tmp_path, *options)).status == 0
    for name in ("blue", "green", "red"):
        (moved / "val" / name).mkdir(parents=True)
        shutil.copy(moved / "test" / name / "0.png", moved / "val" / name)
    with pytest.warns(UserWarning, match="are not those of the checkpoint"):
        outcome = command("validate", "--trainer.default_root_dir", tmp_path)
    assert outcome.status == 0, outcome.err
    assert "on 3 val images of folder:" in outcome.out
    assert "has its own val folder; give --data.val_size null" in one_line(
        command(*fit(recipe, tmp_path / "new", *options))
    )


def test_weights_are_tested_without_a_logger(trained, command, tmp_path):
    place = ["--trainer.default_root_dir", tmp_path]
    export = ["--format", "safetensors", "--output", tmp_path / "mine"]
    outcome = command("export", "--trainer.default_root_dir", trained[0], *export)
    assert outcome.status == 0, outcome.err
    outcome = command("test", *place, "--ckpt_path", tmp_path / "mine", "--trainer.logger", "false")
    assert outcome.status == 0, outcome.err
    tested = json.loads((tmp_path / "logs/weights/mine/test.json").read_text())
    assert tested["saved_at"] == checkpoint(trained[0], "best")["saved_at"]


def test_predictions_are_of_the_mirror_image_too_where_that_was_chosen(trained, command, tmp_path, image_folder):
    root = shutil.copytree(trained[0], tmp_path / "run")
    outcome = command("test", "--trainer.default_root_dir", root, "--model.test_time_flip", "true")
    assert outcome.status == 0, outcome.err
    model = Classifier.load_from_checkpoint(root / "checkpoints/tiny/version_0/best.ckpt").eval()
    state, images = checkpoint(root, "best")["ImageDataModule"], load_folder(str(image_folder)).test
    mean, std = (torch.tensor(state[name]).view(3, 1, 1) for name in ("mean", "std"))
    x = (images.pixels / 255 - mean) / std
    with torch.no_grad():
        logits = (model(x) + model(x.flip(3))) / 2
    with np.load(root / "logs/tiny/version_0/test.npz") as file:
        losses = torch.nn.functional.cross_entropy(logits, images.labels, reduction="none")
        assert file["nll"] == pytest.approx(losses.numpy(), abs=1e-5)
