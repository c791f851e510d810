import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cbam_pl.commands.visualize import _evenly


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A copy of the finished run, to write pictures into."""
    return shutil.copytree(trained[0], tmp_path_factory.mktemp("visualized") / "run")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, command, recipe):
    """A run of one epoch without attention."""
    root = tmp_path_factory.mktemp("plain")
    options = ("--model.attention.kind", "none", "--trainer.max_epochs", 1, "--pictures_every", 0)
    outcome = command("fit", "--config", recipe, "--trainer.default_root_dir", root, *options)
    assert outcome.status == 0, outcome.err
    return root


def visualize(command, root, *options):
    return command("visualize", "--trainer.default_root_dir", root, *options)


def assert_refused(outcome, *parts):
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("error: ")
    for part in parts:
        assert part in outcome.err


def test_it_writes_every_picture_beside_the_logs_and_prints_the_paths(command, run):
    outcome = visualize(command, run)
    assert outcome.status == 0, outcome.err
    folder = run / "logs/tiny/version_0/pictures"
    names = ["features", "heat_maps", "attention", "grad_cam", "curves"]
    assert outcome.out.splitlines() == [str(folder / f"{name}.png") for name in names]
    for name in names:
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
        assert len(np.unique(pixels.astype(int) @ [65536, 256, 1])) > 100


def test_images_are_spread_over_the_classes_unless_they_are_chosen(command, run, tmp_path, image_folder):
    def first_column(*options):
        outcome = visualize(command, run, "--output", tmp_path / "out", *options)
        assert outcome.status == 0, outcome.err
        pixels = np.asarray(Image.open(tmp_path / "out/attention.png").convert("RGB"))
        rows = round((pixels.shape[0] - 124) / 198)
        return [pixels[104 + 198 * row :][:128, 20:148][2::4, 2::4] for row in range(rows)]

    def test_image(name, index):
        return np.asarray(Image.open(image_folder / f"test/{name}/{index}.png"))

    def same(shown, expected):
        return len(shown) == len(expected) and all(map(np.array_equal, shown, expected))

    three = [test_image("blue", 0), test_image("green", 0), test_image("red", 0)]
    assert same(first_column(), three)
    assert same(first_column("--indices", 20, 0), [test_image("red", 6), test_image("blue", 0)])
    green = [test_image("green", index) for index in range(2)]
    assert same(first_column("--class_name", "green", "--num_images", 2), green)
    assert len(first_column("--num_images", 5)) == 5
    own = image_folder / "test/red/3.png"
    assert same(first_column("--images", own), [test_image("red", 3)])


def test_evenly_spread_indices():
    assert _evenly(10, 3) == [0, 3, 6]
    assert _evenly(2, 3) == [0, 1]
    assert len(set(_evenly(10_000, 1000))) == 1000


@pytest.mark.parametrize("file_format", ["svg", "pdf"])
def test_other_formats(command, run, tmp_path, file_format):
    outcome = visualize(command, run, "--output", tmp_path, "--format", file_format)
    assert outcome.status == 0, outcome.err
    assert {path.suffix for path in tmp_path.iterdir()} == {f".{file_format}"}
    text = (tmp_path / f"curves.{file_format}").read_bytes()
    assert text.startswith(b"%PDF" if file_format == "pdf" else b"<?xml")


def test_several_runs_share_the_curves(command, run, plain, tmp_path):
    both, output = shutil.copytree(run, tmp_path / "both"), tmp_path / "out"
    for kind in ("checkpoints", "logs"):
        shutil.copytree(plain / kind / "tiny/version_0", both / kind / "tiny/version_1")
    paths = [both / f"checkpoints/tiny/version_{version}/best.ckpt" for version in (0, 1)]
    outcome = visualize(command, both, "--ckpt_path", *paths, "--output", output, "--format", "svg")
    assert outcome.status == 0, outcome.err
    names = sorted(path.name for path in output.iterdir())
    first = [f"tiny-version_0-{name}.svg" for name in ("attention", "features", "grad_cam", "heat_maps")]
    second = [f"tiny-version_1-{name}.svg" for name in ("features", "grad_cam", "heat_maps")]
    assert names == ["curves.svg", *first, *second]
    svg = (output / "curves.svg").read_text()
    assert "tiny-version_0 (cbam)" in svg  # in the legend; matplotlib keeps the text as a comment
    assert "tiny-version_1 (none)" in svg


def test_a_network_without_attention_says_that_it_has_no_gates(command, plain):
    outcome = visualize(command, plain, "--measure")
    assert outcome.status == 0, outcome.err
    written = [line.rsplit("/", 1)[1] for line in outcome.out.splitlines() if line.startswith("/")]
    assert written == ["features.png", "heat_maps.png", "grad_cam.png", "curves.png", "measures.csv"]
    assert "this network has no gates, so there is no picture of them" in outcome.out


def test_measure_prints_the_table_and_saves_it(command, run, tmp_path):
    outcome = visualize(command, run, "--measure", "--measure_images", 21, "--output", tmp_path)
    assert outcome.status == 0, outcome.err
    with (tmp_path / "measures.csv").open() as stream:
        rows = {row["map"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["blocks.0", "blocks.1", "blocks.2", "Grad-CAM", "uniform"]
    tested = command("test", "--ckpt_path", run / "checkpoints/tiny/version_0/best.ckpt")
    accuracy = float(tested.out.split("test/acc")[1].split()[0])
    for name, row in rows.items():
        assert float(row["accuracy_without_0_percent"]) == pytest.approx(accuracy, abs=1e-4)
        assert row["inside"] == ""  # nobody knows where the objects are
        assert f"{100 * float(row['accuracy_without_50_percent']):.1f}" in next(
            line for line in outcome.out.splitlines() if f" {name} " in line
        )
    assert "21 test images" in outcome.out


def test_measure_on_shapes_knows_where_the_object_is(command, tmp_path):
    config = tmp_path / "shapes.yaml"
    config.write_text(
        "model: {arch: cnn}\ndata: {dataset: shapes, batch_size: 100, image_size: 16}\n"
        "trainer: {max_epochs: 1, limit_train_batches: 40, limit_val_batches: 1, accelerator: cpu}\n"
    )
    assert command("fit", "--config", config, "--trainer.default_root_dir", tmp_path).status == 0
    outcome = visualize(command, tmp_path, "--measure", "--measure_images", 50)
    assert outcome.status == 0, outcome.err
    with (tmp_path / "logs/shapes/version_0/pictures/measures.csv").open() as stream:
        rows = {row["map"]: row for row in csv.DictReader(stream)}
    uniform = float(rows["uniform"]["inside"])
    assert 0.1 < uniform < 0.2  # the object covers 110 to 200 of 1024 parts
    assert float(rows["uniform"]["pointing"]) == pytest.approx(uniform)
    assert all(0 < float(row["inside"]) < 1 for row in rows.values())
    assert "inside: share of the map's mass" in outcome.out


def test_no_run_yet(command, tmp_path):
    assert_refused(visualize(command, tmp_path), "no best.ckpt under", "train first")


def test_a_checkpoint_without_network_settings(command, run, tmp_path):
    checkpoint = torch.load(run / "checkpoints/tiny/version_0/best.ckpt", weights_only=True)
    path = tmp_path / "bare.ckpt"
    torch.save({**checkpoint, "hyper_parameters": {}}, path)
    assert_refused(visualize(command, run, "--ckpt_path", path), str(path), "does not hold the settings of its network")
    torch.save({"state_dict": checkpoint["state_dict"]}, path)
    assert_refused(visualize(command, run, "--ckpt_path", path), str(path), "is not a checkpoint of this program")
    changed = {**checkpoint["hyper_parameters"], "arch": "resnet18"}
    torch.save({**checkpoint, "hyper_parameters": changed}, path)
    assert_refused(visualize(command, run, "--ckpt_path", path), str(path), "the weights of another network")


def test_an_index_outside_the_data(command, run):
    assert_refused(visualize(command, run, "--indices", 3, 21), "--indices 21 is outside the test split; use 0 to 20")
    assert_refused(visualize(command, run, "--indices", -1), "--indices -1 is outside the test split")


def test_an_unreadable_image(command, run, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")
    assert_refused(visualize(command, run, "--images", path), str(path), "cannot be decoded")
    assert_refused(visualize(command, run, "--images", tmp_path / "missing.png"), "missing.png does not exist")


def test_an_output_folder_that_cannot_be_written(command, run, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = visualize(command, run, "--output", tmp_path / "file")
    assert_refused(outcome, f"cannot write {tmp_path / 'file'}", "--output")
    assert_refused(visualize(command, run, "--output", "/proc/nowhere"), "cannot write /proc/nowhere", "--output")


def test_options_that_make_no_sense(command, run):
    assert_refused(
        visualize(command, run, "--class_name", "gren"), "--class_name gren is no class", "did you mean green?"
    )
    assert_refused(visualize(command, run, "--indices", 1, "--class_name", "red"), "exclude one another")
    assert_refused(visualize(command, run, "--indices", 1, "--num_images", 2), "--num_images has no effect")
    assert_refused(visualize(command, run, "--num_images", 0), "num_images=0 must be at least 1")
    assert_refused(visualize(command, run, "--measure_images", 9), "no effect without --measure")
    assert_refused(visualize(command, run, "--images", "x.png", "--measure"), "leave --images out")
    assert_refused(visualize(command, run, "--format", "gif"), "gif")
    assert_refused(visualize(command, run, "--formt", "png"), "formt")


def test_a_diverged_network_gets_no_pictures(command, run, tmp_path):
    checkpoint = torch.load(run / "checkpoints/tiny/version_0/best.ckpt", weights_only=True)
    checkpoint["state_dict"]["network.blocks.1.attention.spatial.conv.weight"].fill_(float("nan"))
    path = tmp_path / "diverged.ckpt"
    torch.save(checkpoint, path)
    outcome = visualize(command, run, "--ckpt_path", path, "--output", tmp_path / "out")
    assert_refused(outcome, "no attention.png: the spatial gate of blocks.1 holds NaN or infinity", "no features.png")
    assert not any((tmp_path / "out").iterdir())


def test_a_blank_gate_does_not_keep_the_other_pictures_away(command, run, tmp_path):
    checkpoint = torch.load(run / "checkpoints/tiny/version_0/best.ckpt", weights_only=True)
    checkpoint["state_dict"]["network.blocks.1.attention.spatial.conv.weight"].zero_()
    path = tmp_path / "blank.ckpt"
    torch.save(checkpoint, path)
    outcome = visualize(command, run, "--ckpt_path", path, "--output", tmp_path / "out")
    assert_refused(outcome, "no attention.png: the spatial gate of blocks.1 is 0.500 everywhere in every image")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["features.png", "heat_maps.png"]
