import csv
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cbam_pl.commands.visualize.command import unique_names
from cbam_pl.commands.visualize.pictures import LoadedCheckpoint, evenly, pictures_of
from cbam_pl.inspect import drawing
from cbam_pl.training.checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory, command):
    """A copy of the finished run, tested, to write pictures into."""
    root = shutil.copytree(trained[0], tmp_path_factory.mktemp("visualized") / "run")
    assert command("test", "--trainer.default_root_dir", root, "--calibrate").status == 0
    return root


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


def assert_rejected(outcome, *parts):
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("error: ")
    for part in parts:
        assert part in outcome.err


def test_it_writes_every_picture_beside_the_logs_and_prints_the_paths(command, run):
    outcome = visualize(command, run)
    assert outcome.status == 0, outcome.err
    folder = run / "logs/tiny/version_0/pictures"
    names = ["features", "heat_maps", "attention", "grad_cam", "reliability", "curves"]
    assert outcome.out.splitlines() == [str(folder / f"{name}.png") for name in names]
    for name in names:
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
        assert len(np.unique(pixels.astype(int) @ [65536, 256, 1])) > 100


@pytest.mark.slow
def test_images_are_spread_over_the_classes_unless_they_are_chosen(command, run, tmp_path, image_folder):
    def first_column(*options):
        outcome = visualize(command, run, "--output", tmp_path / "out", *options)
        assert outcome.status == 0, outcome.err
        pixels = np.asarray(Image.open(tmp_path / "out/attention.png").convert("RGB"))
        count = (len(pixels) - 40) // 142  # below the title, and 40 pixels above the lower edge
        tops = [len(pixels) - 40 - (count - row) * 142 for row in range(count)]
        return [pixels[top:][:128, 160:288][2::4, 2::4] for top in tops]

    def stored_image(name, index):
        return np.asarray(Image.open(image_folder / f"test/{name}/{index}.png"))

    def same(shown, expected):
        return len(shown) == len(expected) and all(map(np.array_equal, shown, expected))

    three = [stored_image("blue", 0), stored_image("green", 0), stored_image("red", 0)]
    assert same(first_column(), three)
    assert same(first_column("--indices", 20, 0), [stored_image("red", 6), stored_image("blue", 0)])
    green = [stored_image("green", index) for index in range(2)]
    assert same(first_column("--class_name", "green", "--num_images", 2), green)
    assert len(first_column("--num_images", 5)) == 5
    own = image_folder / "test/red/3.png"
    assert same(first_column("--images", own), [stored_image("red", 3)])


def test_the_reliability_diagram_is_of_the_checkpoint_that_was_tested(command, run, tmp_path):
    root = shutil.copytree(run, tmp_path / "copy")
    file = root / "logs/tiny/version_0/test.json"
    tested = json.loads(file.read_text())
    ece = [one["measures"]["ece"] for one in (tested, tested["calibration"])]
    options = ("--output", tmp_path / "out", "--format", "svg", "--indices", 0)
    assert visualize(command, root, *options).status == 0
    title = (
        f"21 test images: ECE {ece[0]:.4f}; {ece[1]:.4f} with temperature {tested['calibration']['temperature']:.3f}"
    )
    assert title in (tmp_path / "out/reliability.svg").read_text()
    file.write_text(json.dumps(tested | {"epoch": 9}))
    (tmp_path / "out/reliability.svg").unlink()
    assert "there is no test of it, so there is no reliability diagram" in visualize(command, root, *options).out
    assert not (tmp_path / "out/reliability.svg").exists()


def test_evenly_spread_indices():
    assert evenly(10, 3) == [0, 3, 6]
    assert evenly(2, 3) == [0, 1]
    assert len(set(evenly(10_000, 1000))) == 1000


def test_pdf(command, run, tmp_path):
    outcome = visualize(command, run, "--output", tmp_path, "--format", "pdf")
    assert outcome.status == 0, outcome.err
    assert {path.suffix for path in tmp_path.iterdir()} == {".pdf"}
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


def test_several_runs_share_the_curves(command, run, plain, tmp_path):
    both, output = shutil.copytree(run, tmp_path / "both"), tmp_path / "out"
    for kind in ("checkpoints", "logs"):
        shutil.copytree(plain / kind / "tiny/version_0", both / kind / "tiny/version_1")
    paths = [both / f"checkpoints/tiny/version_{version}/best.ckpt" for version in (0, 1)]
    outcome = visualize(command, both, "--ckpt_path", *paths, "--output", output, "--format", "svg")
    assert outcome.status == 0, outcome.err
    names = sorted(path.name for path in output.iterdir())
    first = [f"tiny-version_0-{name}.svg" for name in ("attention", "features", "grad_cam", "heat_maps", "reliability")]
    second = [f"tiny-version_1-{name}.svg" for name in ("features", "grad_cam", "heat_maps")]
    assert names == ["curves.svg", *first, *second]
    svg = (output / "curves.svg").read_text()
    assert "tiny-version_0 (cbam)" in svg  # in the legend; matplotlib keeps the text as a comment
    assert "tiny-version_1 (none)" in svg


def names_of(outcome, folder):
    assert outcome.status == 0, outcome.err
    names = sorted(path.name for path in folder.iterdir())
    lines = [line for line in outcome.out.splitlines() if "no reliability diagram" not in line]
    assert sorted(lines) == [str(folder / name) for name in names]  # each is printed once
    return names


@pytest.mark.slow
def test_two_checkpoints_of_one_run_have_files_of_their_own_and_one_curve(command, run, tmp_path):
    paths = [run / f"checkpoints/tiny/version_0/{name}.ckpt" for name in ("best", "last")]
    outcome = visualize(command, run, "--ckpt_path", *paths, "--output", tmp_path, "--format", "svg")
    kinds = ("attention", "features", "grad_cam", "heat_maps")
    both = [f"tiny-version_0-{stem}-{kind}.svg" for stem in ("best", "last") for kind in kinds]
    names = names_of(outcome, tmp_path)
    assert [name for name in names if "reliability" not in name] == ["curves.svg", *both]
    assert (tmp_path / "curves.svg").read_text().count("tiny-version_0 (cbam)") == 1


@pytest.mark.slow
def test_runs_of_the_same_name_have_files_and_curves_of_their_own(command, run, plain, tmp_path):
    paths = [root / "checkpoints/tiny/version_0/best.ckpt" for root in (run, plain)]
    options = ("--output", tmp_path, "--format", "svg", "--measure", "--measure_images", 5)
    outcome = visualize(command, run, "--ckpt_path", *paths, *options)
    assert outcome.status == 0, outcome.err
    names = {path.name for path in tmp_path.iterdir()}
    for kind in ("features.svg", "heat_maps.svg", "grad_cam.svg", "measures.csv", "randomisation.svg"):
        assert {f"tiny-version_0-best-{kind}", f"tiny-version_0-best-2-{kind}"} <= names
    assert "(cnn, attention none, epoch 1)" in (tmp_path / "tiny-version_0-best-2-features.svg").read_text()
    curves = (tmp_path / "curves.svg").read_text()
    assert "tiny-version_0 (cbam)" in curves
    assert "tiny-version_0-2 (none)" in curves


def test_names_are_unique_whatever_the_files_are_called():
    paths = [Path(path) for path in ("a/x.ckpt", "b/x.ckpt", "x-2.ckpt", "r/checkpoints/x/version_1/best.ckpt")]
    assert unique_names(paths) == ["x", "x-2", "x-2-2", "x-version_1"]
    assert unique_names(paths[:1]) == ["x"]


@pytest.mark.slow
def test_a_recipes_name_may_hold_any_sign(command, run, tmp_path):
    name = "a[v1]|<b>$x$"
    for kind in ("checkpoints", "logs"):
        shutil.copytree(run / kind / "tiny", tmp_path / kind / name)
    outcome = visualize(command, tmp_path, "--format", "svg", "--measure", "--measure_images", 5)
    assert outcome.status == 0, outcome.err
    folder = tmp_path / "logs" / name / "version_0/pictures"
    assert str(folder / "curves.svg") in outcome.out
    assert f"{name}-version_0 (cnn, attention cbam, epoch" in outcome.out  # above the table
    assert "a[v1]|&lt;b&gt;$x$-version_0 (cnn, attention cbam" in (folder / "attention.svg").read_text()
    assert "a[v1]|&lt;b&gt;$x$-version_0 (cbam)" in (folder / "curves.svg").read_text()


def test_a_network_without_attention_says_that_it_has_no_gates(command, plain):
    outcome = visualize(command, plain, "--measure")
    assert outcome.status == 0, outcome.err
    written = [line.rsplit("/", 1)[1] for line in outcome.out.splitlines() if line.startswith("/")]
    pictures = ["features.png", "heat_maps.png", "grad_cam.png", "curves.png"]
    assert written == [*pictures, "measures.csv", "randomisation.json", "randomisation.png"]
    assert "this network has no gates, so there is no picture of them" in outcome.out
    assert "this network has no gates, so there is no ablation of them" in outcome.out


def test_gates_that_cannot_be_replaced_do_not_end_the_measurement(command, run, tmp_path, monkeypatch):
    def reject(*arguments):
        raise ValueError("the attention of blocks.0 does not give its input times its gates")

    monkeypatch.setattr("cbam_pl.commands.visualize.command.ablate_gates", reject)
    outcome = visualize(command, run, "--measure", "--measure_images", 5, "--output", tmp_path)
    assert outcome.status == 2
    assert "error: no ablation.json: the attention of blocks.0 does not give its input" in outcome.err
    assert (tmp_path / "randomisation.json").exists()
    assert not (tmp_path / "ablation.json").exists()


def test_measure_prints_the_table_and_saves_it(command, run, tmp_path):
    outcome = visualize(command, run, "--measure", "--measure_images", 21, "--output", tmp_path)
    assert outcome.status == 0, outcome.err
    with (tmp_path / "measures.csv").open() as stream:
        rows = {row["map"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["blocks.0", "blocks.1", "blocks.2", "Grad-CAM", "uniform"]
    tested = command("test", "--ckpt_path", run / "checkpoints/tiny/version_0/best.ckpt", "--calibrate")
    accuracy = float(tested.out.split("test/acc")[1].split()[0])
    for name, row in rows.items():
        assert float(row["accuracy_without_0_percent"]) == pytest.approx(accuracy, abs=1e-4)
        assert row["inside"] == ""  # nobody knows where the objects are
        assert f"{100 * float(row['accuracy_without_50_percent']):.1f}" in next(
            line for line in outcome.out.splitlines() if f" {name} " in line
        )
    assert "21 test images" in outcome.out
    ablation = json.loads((tmp_path / "ablation.json").read_text())
    assert ablation["network"].startswith("tiny-version_0 (cnn, attention cbam")
    assert ablation["images"] == 21
    assert ablation["accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert len(ablation["rows"]) == 4 * 3 * 3  # three blocks and all, channel, spatial and both, three replacements
    randomisation = json.loads((tmp_path / "randomisation.json").read_text())
    assert randomisation["images"] == 6  # every fourth
    assert "Layers randomised, tiny-version_0" in outcome.out
    assert (tmp_path / "ablation.png").is_file()
    assert (tmp_path / "randomisation.png").is_file()


@pytest.mark.slow
def test_measures_are_of_the_layer_that_is_drawn(command, run, tmp_path):
    found = {}
    for layer in ("blocks.0", "blocks.2.relu", None):  # the last is the default's
        output = tmp_path / str(layer)
        options = () if layer is None else ("--layer", layer)
        outcome = visualize(command, run, "--measure", "--measure_images", 8, "--output", output, *options)
        assert outcome.status == 0, outcome.err
        with (output / "measures.csv").open() as stream:
            rows = {row["map"]: row for row in csv.DictReader(stream)}
        randomisation = json.loads((output / "randomisation.json").read_text())
        name = "Grad-CAM" if layer is None else f"Grad-CAM of {layer}"
        found[layer] = {**rows[name], "map": ""}, randomisation["spearman"]["Grad-CAM"]
    assert found["blocks.2.relu"] == found[None]
    assert found["blocks.0"][0] != found[None][0]
    assert found["blocks.0"][1] != found[None][1]


PROBE = """
import torch
from torch import nn

class Probe(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x.mean((2, 3)))
"""


def test_pictures_that_need_no_gradient_are_drawn_where_there_is_none(command, image_folder, tmp_path, monkeypatch):
    (tmp_path / "probe_net.py").write_text(PROBE)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "model: {network: probe_net.Probe, attention: {kind: none}}\n"
        f"data: {{dataset: folder, root: {image_folder}, batch_size: 16}}\n"
        "trainer: {max_epochs: 1, accelerator: cpu}\n"
    )
    outcome = command("fit", "--config", recipe, "--trainer.default_root_dir", tmp_path)
    assert outcome.status == 0, outcome.err
    reason = "no gradient of the classes reaches the last map; name another with --layer"
    outcome = visualize(command, tmp_path, "--trust", "probe_net")
    assert outcome.err == f"error: no grad_cam.png: {reason}\n"
    pictures = tmp_path / "logs/tiny/version_0/pictures"
    assert (pictures / "features.png").is_file()
    assert (pictures / "heat_maps.png").is_file()
    assert_rejected(visualize(command, tmp_path, "--trust", "probe_net", "--page"), reason)


@pytest.mark.slow
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
    assert "inside: fraction of the map's energy" in outcome.out


def gallery(path):
    text = path.read_text("utf-8")
    return json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_has_the_predictions_of_the_test(command, run, plain):
    paths = [root / "checkpoints/tiny/version_0/best.ckpt" for root in (run, plain)]
    outcome = visualize(command, run, "--ckpt_path", *paths, "--page")
    assert outcome.status == 0, outcome.err
    path = run / "logs/tiny/version_0/pictures/gallery.html"
    assert outcome.out == f"{path}\n"
    content = gallery(path)
    with np.load(run / "logs/tiny/version_0/test.npz") as file:
        tested = {name: file[name] for name in ("image", "label", "predicted", "nll")}
    order = tested["image"].argsort()
    assert content["images"]["number"] == list(range(21))
    assert content["images"]["label"] == tested["label"][order].tolist()
    cbam, none = content["networks"]
    assert [top[0][0] for top in cbam["top"]] == tested["predicted"][order].tolist()
    assert cbam["loss"] == pytest.approx(tested["nll"][order].tolist(), abs=1e-3)
    assert [one["name"] for one in (cbam, none)] == ["tiny-version_0-best", "tiny-version_0-best-2"]
    assert cbam["description"].startswith("cnn, attention cbam, epoch")
    assert none["blocks"] == []


def test_the_page_shows_the_images_that_are_chosen(command, run, tmp_path):
    for options, numbers in (
        (("--class_name", "green", "--num_images", 2), [7, 8]),
        (("--indices", 20, 0), [20, 0]),
        (("--num_images", 3), [0, 7, 14]),
    ):
        outcome = visualize(command, run, "--page", "--output", tmp_path, *options)
        assert outcome.status == 0, outcome.err
        content = gallery(tmp_path / "gallery.html")
        assert content["images"]["number"] == numbers
        assert content["networks"][0]["name"] == "tiny"


@pytest.mark.parametrize("other", ["classes", "test images"])
def test_the_networks_of_a_page_have_the_same_data(command, run, tmp_path, image_folder, other):
    root = shutil.copytree(image_folder, tmp_path / "data", ignore=lambda *_: {".cache"})
    path = run / "checkpoints/tiny/version_0/best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["datamodule_hyper_parameters"]["root"] = str(root)
    if other == "classes":
        for split in ("train", "test"):
            (root / split / "red").rename(root / split / "rot")
        checkpoint["ImageDataModule"]["classes"][2] = "rot"
    else:
        shutil.copy(root / "test/red/0.png", root / "test/red/1.png")
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with warnings.catch_warnings(action="ignore"):  # the images have changed since the training
        outcome = visualize(command, run, "--page", "--output", tmp_path, "--ckpt_path", path, tmp_path / "other.ckpt")
    assert_rejected(outcome, f"other and tiny do not have the same {other}; make a page for each")
    assert not (tmp_path / "gallery.html").exists()


def test_no_run_yet(command, tmp_path):
    assert_rejected(visualize(command, tmp_path), "no best.ckpt under", "train first")


def test_an_index_outside_the_data(command, run):
    assert_rejected(visualize(command, run, "--indices", 3, 21), "--indices 21 is outside the test split; use 0 to 20")
    assert_rejected(visualize(command, run, "--indices", -1), "--indices -1 is outside the test split")


def test_an_unreadable_image(command, run, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")
    assert_rejected(visualize(command, run, "--images", path), str(path), "cannot be decoded")
    assert_rejected(visualize(command, run, "--images", tmp_path / "missing.png"), "missing.png does not exist")


def test_an_output_folder_that_cannot_be_written(command, run, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = visualize(command, run, "--output", tmp_path / "file")
    assert_rejected(outcome, f"cannot write {tmp_path / 'file'}", "--output")
    assert_rejected(visualize(command, run, "--output", "/proc/nowhere"), "cannot write /proc/nowhere", "--output")


def test_options_that_make_no_sense(command, run):
    assert_rejected(
        visualize(command, run, "--class_name", "gren"), "--class_name gren is not a class", "did you mean green?"
    )
    assert_rejected(visualize(command, run, "--indices", 1, "--class_name", "red"), "exclude one another")
    assert_rejected(visualize(command, run, "--indices", 1, "--num_images", 2), "--num_images has no effect")
    assert_rejected(visualize(command, run, "--num_images", 0), '"num_images": 0 does not conform to restriction v>0')
    assert_rejected(visualize(command, run, "--measure_images", 9), "no effect without --measure")
    assert_rejected(visualize(command, run, "--measure", "--measure_images", 1), "no other image", "use at least 2")
    assert_rejected(visualize(command, run, "--images", "x.png", "--measure"), "leave --images out")
    assert_rejected(visualize(command, run, "--page", "--images", "x.png"), "whose classes are known", "leave --images")
    assert_rejected(visualize(command, run, "--page", "--format", "svg"), "--format has no effect with --page")
    assert_rejected(visualize(command, run, "--page", "--measure"), "--measure has no effect with --page")
    assert_rejected(visualize(command, run, "--page", "--layer", "x"), "--layer x is not a module")
    assert_rejected(visualize(command, run, "--format", "gif"), "gif")
    assert_rejected(visualize(command, run, "--formt", "png"), "formt")


def test_a_diverged_network_gets_no_pictures(command, run, tmp_path):
    checkpoint = torch.load(run / "checkpoints/tiny/version_0/best.ckpt", weights_only=True)
    checkpoint["state_dict"]["network.blocks.1.attention.spatial.conv.weight"].fill_(float("nan"))
    path = tmp_path / "diverged.ckpt"
    torch.save(checkpoint, path)
    outcome = visualize(command, run, "--ckpt_path", path, "--output", tmp_path / "out")
    assert_rejected(outcome, "no attention.png: the spatial gate of blocks.1 holds NaN or infinity", "no features.png")
    assert not any((tmp_path / "out").iterdir())
    outcome = visualize(command, run, "--ckpt_path", path, "--output", tmp_path / "out", "--page")
    assert_rejected(outcome, "the output of diverged holds NaN or infinity")


def test_a_blank_gate_does_not_keep_the_other_pictures_away(command, run, tmp_path):
    checkpoint = torch.load(run / "checkpoints/tiny/version_0/best.ckpt", weights_only=True)
    checkpoint["state_dict"]["network.blocks.1.attention.spatial.conv.weight"].zero_()
    path = tmp_path / "blank.ckpt"
    torch.save(checkpoint, path)
    outcome = visualize(command, run, "--ckpt_path", path, "--output", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["attention.png", "features.png", "grad_cam.png", "heat_maps.png"]


def test_pictures_predict_as_predict_does_and_in_batches_that_are_asked_for(run, monkeypatch):
    described = []
    monkeypatch.setattr(drawing, "describe", lambda logits, *_: described.append(logits) or [""])
    path = run / "checkpoints/tiny/version_0/best.ckpt"
    for flip in (False, True):
        content = read_checkpoint(path)
        content["hyper_parameters"]["test_time_flip"] = flip
        loaded = LoadedCheckpoint(path, content, content["datamodule_hyper_parameters"] | {"batch_size": 3})
        assert loaded.batch_size == 12
        pictures_of(loaded, "title", indices=[4])
        inputs = loaded.normalise(loaded.test_images.pixels[[4]])
        with torch.no_grad():
            plain, mirrored = (loaded.network.eval()(one) for one in (inputs, inputs.flip(3)))
        assert torch.allclose(described[-1], (plain + mirrored) / 2 if flip else plain, atol=1e-6)
    assert not torch.allclose(described[0], described[1], atol=1e-4)
