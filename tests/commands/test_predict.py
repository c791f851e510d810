"""`predict`: its table, its CSV, and files with any name."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image

from cbam_pl.commands import predict as predict_module
from cbam_pl.commands.visualize.pictures import LoadedCheckpoint, pictures_of
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.data.folder import decode
from cbam_pl.data.loader import EvaluationLoader
from cbam_pl.training.classifier import Classifier
from tests.helpers import COLOURS, REPOSITORY, TEST_PER_CLASS, checkpoint, one_line, png_bomb


def test_predict_prints_and_saves_the_top_classes(trained, command, image_folder, tmp_path):
    root, _ = trained
    images = [image_folder / "test/red/0.png", image_folder / "test/blue"]
    output = tmp_path / "out.csv"
    outcome = command(
        "predict", "--trainer.default_root_dir", root, "--images", *images, "--output", output, "--top", 2
    )
    assert outcome.status == 0, outcome.err
    with output.open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 1 + TEST_PER_CLASS
    assert list(rows[0]) == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert {row["image"] for row in rows} == {str(images[0]), *(str(path) for path in images[1].iterdir())}
    for row in rows:
        assert 1 > float(row["probability_1"]) >= float(row["probability_2"]) > 0
        assert {row["class_1"], row["class_2"]} < set(COLOURS)
    assert rows[0]["class_1"] in outcome.out


def test_an_image_is_never_overwritten(trained, command, tmp_path, image_folder):
    image = shutil.copy(image_folder / "test/red/0.png", tmp_path)
    before = Path(image).read_bytes()
    words = ["--trainer.default_root_dir", trained[0], "--images", tmp_path, "--output", tmp_path / "." / "0.png"]
    assert "0.png is one of the images; name another file" in one_line(command("predict", *words))
    assert Path(image).read_bytes() == before


def test_the_table_shows_whole_names_on_a_narrow_screen(trained, command, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    words = ["--trainer.default_root_dir", trained[0], "--images", image_folder / "test/red"]
    outcome = command("predict", *words, "--output", tmp_path / "out.csv", "--top", 3)
    assert "…" not in outcome.out
    assert "".join(re.findall(r"^│ (\S+) ", outcome.out, re.MULTILINE)).count("6.png") == 1


def test_as_many_images_are_predicted_at_once_as_are_tested(trained, command, image_folder, tmp_path, monkeypatch):
    sizes = []

    def loader(images, batch_size, *more):
        sizes.append(batch_size)
        return EvaluationLoader(images, batch_size, *more)

    monkeypatch.setattr(predict_module, "EvaluationLoader", loader)
    words = ["--trainer.default_root_dir", trained[0], "--images", image_folder / "test/red"]
    assert command("predict", *words, "--output", tmp_path / "out.csv").status == 0
    assert sizes == [4 * 16]


def test_several_processes_are_rejected(trained, command, image_folder):
    words = ["--trainer.default_root_dir", trained[0], "--images", image_folder / "test/red"]
    several = ["--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp"]
    assert "predict works in one process; leave trainer.devices" in one_line(command("predict", *words, *several))


def test_too_little_memory_names_an_option_of_its_own(trained, command, image_folder, monkeypatch):
    def predict(self, model, loader):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "predict", predict)
    words = ["--trainer.default_root_dir", trained[0], "--images", image_folder / "test/red"]
    assert one_line(command("predict", *words)) == "error: out of memory; give fewer --images at once"


def test_images_are_decoded_a_part_at_a_time(trained, command, image_folder, tmp_path, monkeypatch):
    words = ["predict", "--trainer.default_root_dir", trained[0], "--images", image_folder / "test/red"]
    assert command(*words, "--output", tmp_path / "whole.csv").status == 0
    monkeypatch.setattr(predict_module, "_MAX_DECODED", 3)  # of seven
    assert command(*words, "--output", tmp_path / "parts.csv").status == 0
    assert (tmp_path / "parts.csv").read_text() == (tmp_path / "whole.csv").read_text()


@pytest.mark.slow
def test_images_of_fixed_size_are_not_enlarged_by_resized_crops(command, tmp_path):
    config = tmp_path / "shapes.yaml"
    config.write_text(
        "model: {arch: cnn, attention: {kind: none}}\n"
        "data: {dataset: shapes, augmentation: resized_crop, batch_size: 50, image_size: 16}\n"
        "trainer: {max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1, accelerator: cpu}\n"
    )
    root = ("--trainer.default_root_dir", tmp_path)
    assert command("fit", "--config", config, *root).status == 0
    data = ImageDataModule("shapes", image_size=16)
    data.setup("test")
    for number, pixels in enumerate(data.images("test").pixels[:20]):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{number:02}.png")
    assert command("test", *root).status == 0
    output = tmp_path / "out.csv"
    outcome = command("predict", *root, "--images", *sorted(tmp_path.glob("*.png")), "--output", output, "--top", 1)
    assert outcome.status == 0, outcome.err
    with output.open() as stream:
        found = [float(row["probability_1"]) for row in csv.DictReader(stream)]
    with np.load(tmp_path / "logs/shapes/version_0/test.npz") as file:
        assert found == pytest.approx(file["probabilities"][:20].max(1), abs=1e-3)


def test_a_part_of_the_images_is_not_offered(command):
    assert "unknown key trainer.fast_dev_run" in one_line(command("predict", "--trainer.fast_dev_run", "true"))


def test_images_keep_their_proportions_where_the_network_was_trained_on_resized_crops(trained, command, tmp_path):
    image = tmp_path / "wide.png"
    colours = Image.new("RGB", (110, 60), (40, 60, 200))
    colours.paste((220, 40, 40), (0, 0, 40, 60))  # mostly beside the middle
    colours.save(image)
    content = checkpoint(trained[0], "best")
    model = Classifier.load_from_checkpoint(trained[0] / "checkpoints/tiny/version_0/best.ckpt").eval()
    mean, std = (torch.tensor(content["ImageDataModule"][name]).view(3, 1, 1) for name in ("mean", "std"))
    found = []
    for augmentation in ("rich", "resized_crop"):
        content["datamodule_hyper_parameters"]["augmentation"] = augmentation
        torch.save(content, tmp_path / "a.ckpt")
        output = tmp_path / "out.csv"
        files = ("--images", image, "--output", output, "--top", 1)
        outcome = command("predict", "--ckpt_path", tmp_path / "a.ckpt", *files)
        assert outcome.status == 0, outcome.err
        pixels = decode(image, 32, in_proportion=augmentation == "resized_crop")
        with torch.no_grad():
            expected = model(((pixels / 255 - mean) / std).unsqueeze(0)).softmax(1).max()
        with output.open() as stream:
            found.append(float(next(csv.DictReader(stream))["probability_1"]))
        assert found[-1] == pytest.approx(float(expected), abs=1e-4)
        loaded = LoadedCheckpoint(tmp_path / "a.ckpt", content, {})
        shown = pictures_of(loaded, "", images=[str(image)])["features"].args[0]
        assert torch.equal(shown.pixels[0], pixels)
    assert abs(found[0] - found[1]) > 0.01


def test_predict_takes_names_that_look_like_markup_or_no_text(trained, command, image_folder, tmp_path, monkeypatch):
    names = [b"a[/red].png", b"[bold]x.png", b"line\nbreak.png", b"caf\xe9.png"]
    (tmp_path / "images/a[").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "images")
    for name in names:
        with open(name, "wb") as stream:
            stream.write((image_folder / "test/red/0.png").read_bytes())
    outcome = command(
        "predict", "--trainer.default_root_dir", trained[0], "--images", ".", "--output", tmp_path / "out.csv"
    )
    assert outcome.status == 0, outcome.err
    with (tmp_path / "out.csv").open(newline="", errors="surrogateescape") as stream:
        assert sorted(os.fsencode(row["image"]) for row in csv.DictReader(stream)) == sorted(names)
    assert "[bold]x.png" in outcome.out


def test_images_that_cannot_be_classified_are_named(trained, command, recipe, tmp_path):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_bomb(20_000, 20_000))
    output = tmp_path / "predictions.csv"
    predict = ("predict", "--trainer.default_root_dir", trained[0], "--output", output, "--images")
    assert "bomb.png cannot be decoded (" in one_line(command(*predict, bomb))  # not: memory is filled
    assert f"{recipe} is not a supported image" in one_line(command(*predict, recipe))
    assert not output.exists()


def test_images_that_can_be_decoded_are_classified_beside_others(trained, command, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_module, "_MAX_DECODED", 2)
    for name in "abfg":
        (tmp_path / f"{name}.png").write_text("no image")
    for name in "cde":
        shutil.copy(image_folder / "test/red/0.png", tmp_path / f"{name}.png")
    predict = ("predict", "--trainer.default_root_dir", trained[0], "--output", tmp_path / "out.csv", "--images")
    error = one_line(command(*predict, tmp_path))
    assert error.startswith(f"error: {tmp_path / 'a.png'} cannot be decoded (")
    assert error.endswith("replace or remove it (and 3 more cannot be decoded)")
    with (tmp_path / "out.csv").open() as stream:
        assert [row["image"] for row in csv.DictReader(stream)] == [str(tmp_path / f"{name}.png") for name in "cde"]


def test_an_output_that_cannot_be_written_is_named_before_anything_is_decoded(trained, command, image_folder, tmp_path):
    predict = ("predict", "--trainer.default_root_dir", trained[0], "--images", image_folder / "test/red", "--output")
    for output, reason in ((tmp_path, "Is a directory"), (tmp_path / "none/out.csv", "No such file or directory")):
        outcome = command(*predict, output)
        assert one_line(outcome) == f"error: cannot write {output} ({reason}); name another file with --output"
        assert "decoding" not in outcome.out


@pytest.mark.slow
def test_the_csv_is_complete_where_the_reader_of_the_table_leaves(trained, image_folder, tmp_path):
    output = tmp_path / "out.csv"
    words = ["--images", image_folder / "test", "--trainer.default_root_dir", trained[0], "--output", output]
    script = [sys.executable, "train.py", "predict", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(script, cwd=REPOSITORY, env=environment, **pipes) as process:
        assert process.stdout.readline() == "decoding 21 images\n"
        process.stdout.close()  # as `| head -1` does
        assert process.stderr.read() == ""
    with output.open() as stream:
        assert len(list(csv.DictReader(stream))) == len(COLOURS) * TEST_PER_CLASS
