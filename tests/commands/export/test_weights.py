"""Folders of weights: the same network for every command, a card of the run's figures, and what is rejected."""

import csv
import errno
import hashlib
import json
import re
import shutil
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import cbam_pl
from cbam_pl.attention import AttentionConfig
from cbam_pl.commands.export.weights import write_pretrained
from cbam_pl.data.folder import load_folder
from cbam_pl.environment import describe_environment
from cbam_pl.errors import UserError
from cbam_pl.training.checkpoint import read_checkpoint
from cbam_pl.training.classifier import Classifier
from cbam_pl.training.finetuning import load_weights
from cbam_pl.training.run import atomic_write
from cbam_pl.training.weights_folder import as_stored, read_folder, write_folder
from tests.helpers import assert_equal, one_line

STATE = ("loops", "callbacks", "optimizer_states", "lr_schedulers", "interrupted_epoch")


@pytest.fixture(scope="module")
def root(trained, tmp_path_factory, command):
    """A copy of the finished run, tested, and part of a comparison."""
    root = shutil.copytree(trained[0], tmp_path_factory.mktemp("pretrained") / "run")
    assert command("test", "--trainer.default_root_dir", root).status == 0
    best = {"recipe": "tiny", "seed": 3, "checkpoint": "checkpoints/tiny/version_0/best.ckpt"}
    other = {"recipe": "tiny", "seed": 4, "checkpoint": "checkpoints/tiny/version_1/best.ckpt"}
    test_acc = {"mean": 81.254, "sd": 1.337, "n": 2, "low": 0}
    report = {"title": "tiny against none", "runs": [best, other], "recipes": {"tiny": {"test_acc": test_acc}}}
    (root / "reports/tiny").mkdir(parents=True)
    (root / "reports/tiny/report.json").write_text(json.dumps(report))
    elsewhere = {**best, "checkpoint": "finetune/checkpoints/tiny/version_0/best.ckpt"}  # another run of this name
    (root / "reports/other").mkdir()
    (root / "reports/other/report.json").write_text(json.dumps({**report, "title": "other", "runs": [elsewhere]}))
    (root / "reports/report.json").write_text("of another program")
    return root


@pytest.fixture(scope="module")
def best(root):
    return root / "checkpoints/tiny/version_0/best.ckpt"


@pytest.fixture(scope="module")
def folder(best, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny_float32"
    write_pretrained(best, folder)
    return folder


@pytest.fixture(scope="module")
def half(best, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny_float16"
    lines = write_pretrained(best, folder, "float16", licence="mit")
    return folder, lines


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_order(state_dict):
    return dict(sorted(state_dict.items()))  # safetensors has its own order


def test_a_folder_holds_what_the_checkpoint_does_without_the_training(best, folder):
    checkpoint, read = read_checkpoint(best), read_checkpoint(folder)
    record = read.pop("record")
    assert (record["recipe"], record["version"], record["seed"]) == ("tiny", 0, 3)
    for key in STATE:
        checkpoint.pop(key, None)
        read.pop(key, None)
    kept = {key: checkpoint[key] for key in read}
    kept["optimization"] = json.loads(json.dumps(kept["optimization"]))  # tuples are lists
    for content in (read, kept):
        content |= {key: dict(sorted(content[key].items())) for key in ("state_dict", "ImageDataModule")}
    assert_equal({key: read[key] for key in kept}, kept)
    assert {"state_dict", "hyper_parameters", "datamodule_hyper_parameters", "ImageDataModule"} <= kept.keys()
    plain = load_file(folder / "model.safetensors")  # by names with which the network alone loads them
    Classifier(**checkpoint["hyper_parameters"]).network.load_state_dict(plain)


def test_half_precision_is_for_kernels_and_matrices_alone(best, half):
    checkpoint, read = read_checkpoint(best), read_checkpoint(half[0])
    for name, weight in checkpoint["state_dict"].items():
        expected = weight.numpy().astype(np.float16).astype(np.float32) if weight.ndim > 1 else weight.numpy()
        assert np.array_equal(read["state_dict"][name].numpy(), expected), name
        assert read["state_dict"][name].dtype == weight.dtype
    sizes = {path.name: path.stat().st_size for path in half[0].iterdir()}
    assert sizes["model.safetensors"] < 2.1 * sum(one.numel() for one in checkpoint["state_dict"].values())
    with pytest.raises(UserError, match=r"^network\.a has weights that are too large for --precision float16"):
        as_stored({"network.a": torch.full((1, 1), 7e4)}, "float16")


def test_predict_test_and_validate_give_the_same_for_a_folder(best, folder, root, command, image_folder, tmp_path):
    before, printed = contents(folder), {}
    for path in (best, folder):
        csv_file = tmp_path / f"{path.name}.csv"
        images = ("--images", image_folder / "test", "--output", csv_file)
        assert command("predict", "--ckpt_path", path, *images).status == 0
        outcomes = [
            command(name, "--ckpt_path", path, "--trainer.default_root_dir", root) for name in ("test", "validate")
        ]
        assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
        lines = [re.findall(r"^(?:\w+/)?\w+  [\d.]+$", outcome.out, re.MULTILINE) for outcome in outcomes]
        printed[path] = (csv_file.read_text(), lines)
    assert printed[best] == printed[folder]
    assert [len(lines) for lines in printed[best][1]] == [5, 2]
    tests = [
        json.loads((root / "logs" / run / "test.json").read_text())
        for run in ("tiny/version_0", "weights/tiny_float32")
    ]
    assert tests[0]["confusion"] == tests[1]["confusion"]
    assert contents(folder) == before


@pytest.mark.slow
def test_visualize_draws_a_folder_into_the_logs(folder, command, tmp_path, image_folder):
    place = ("--trainer.default_root_dir", tmp_path)
    outcome = command("visualize", "--ckpt_path", folder, "--images", image_folder / "test/red/0.png", *place)
    assert outcome.status == 0, outcome.err
    names = {path.name for path in (tmp_path / "logs/weights/tiny_float32/pictures").iterdir()}
    assert names == {"features.png", "heat_maps.png", "attention.png", "grad_cam.png"}


def test_a_folder_is_no_state_to_resume_from_but_weights_to_start_from(folder, half, command, recipe, tmp_path):
    place = ("--trainer.default_root_dir", tmp_path)
    error = one_line(command("fit", "--config", recipe, "--ckpt_path", folder, *place))
    assert "has weights, but not the state of a training to resume" in error
    assert f"--model.weights {folder}" in error
    assert not (tmp_path / "checkpoints").exists()
    model = Classifier(**read_checkpoint(folder)["hyper_parameters"])
    loaded, data = load_weights(model.network, str(folder))
    assert loaded == f"34 of 34 tensors from {folder}"
    assert (data["dataset"], data["seed"], data["val_size"]) == ("folder", 3, None)
    assert_equal(in_order(model.state_dict()), in_order(read_checkpoint(folder)["state_dict"]))


def test_the_card_has_the_figures_of_the_run_and_of_the_file(best, root, half):
    folder, lines = half
    text = (folder / "README.md").read_text()
    test = json.loads((root / "logs/tiny/version_0/test.json").read_text())
    # By hand: the network as it is in the file, on the test images.
    checkpoint = read_checkpoint(best)
    model = Classifier(**checkpoint["hyper_parameters"]).eval()
    weights = load_file(folder / "model.safetensors")
    model.network.load_state_dict({name: one.float() for name, one in weights.items()})
    images = load_folder(checkpoint["datamodule_hyper_parameters"]["root"]).test
    mean, std = (torch.tensor(checkpoint["ImageDataModule"][name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        logits = model((images.pixels / 255 - mean) / std)
    accuracy = float((logits.argmax(1) == images.labels).double().mean())
    nll = float(torch.nn.functional.cross_entropy(logits, images.labels))
    with np.load(root / "logs/tiny/version_0/test.npz") as file:
        changed = int((file["predicted"] != logits.argmax(1).numpy()).sum())
    for row in (
        f"| accuracy | {test['test/acc']:.4f} | {accuracy:.4f} |",
        f"| NLL, nats | {test['measures']['nll']:.4f} | {nll:.4f} |",
        f"| predictions that differ from the run's test | | {changed} of 21 |",
        "| recipe | tiny, version 0 |",
        f"| commit | {describe_environment(torch.device('cpu'))['commit']} |\n",
        "| seed | 3 |",
        "| augmentation | rich |",
        "Corrupted images: not measured.",
        'in the comparison "tiny against none" the recipe has a test accuracy of 81.25 ± 1.34 %',
        "n = 2, seeds 3 4).",
        "Of the weights: mit.",
    ):
        assert row in text, row
    assert f"as written: accuracy {accuracy:.4f} on 21 images, {changed} predictions differ" in lines

    card = huggingface_hub.ModelCard(text)  # reads the front matter as the Hub does
    (result,) = card.data.eval_results
    assert (card.data.license, card.data.library_name, result.metric_value) == (
        "mit",
        "cbam_pl",
        pytest.approx(accuracy),
    )


def test_the_card_says_how_a_network_was_fine_tuned(best, tmp_path):
    content = torch.load(best, weights_only=True)
    content["optimization"] |= {"optimizer.weight_decay": 0, "freeze": ["conv1", "layer?.0"], "lr_factors": {}}
    torch.save(content, tmp_path / "frozen.ckpt")
    content["optimization"] |= {"freeze": [], "lr_factors": {"layer?": 0.1, "fc": 10.0}}
    torch.save(content, tmp_path / "slow.ckpt")
    texts = {}
    for name in ("frozen", "slow"):
        write_pretrained(tmp_path / f"{name}.ckpt", tmp_path / name)
        texts[name] = (tmp_path / name / "README.md").read_text()
    assert "| frozen modules | conv1, layer?.0 |" in texts["frozen"]
    assert "factors on the learning rate" not in texts["frozen"]
    assert "| factors on the learning rate | layer? 0.1, fc 10.0 |" in texts["slow"]
    assert "frozen modules" not in texts["slow"]
    for text in texts.values():
        assert re.search(r"^\| optimizer \| Adam \(.*weight_decay 0, ", text, re.MULTILINE)
        assert "amsgrad False" in text


def test_what_was_not_measured_is_called_so(best, root, trained, tmp_path):
    loose = shutil.copy(best, tmp_path / "loose.ckpt")  # its run is not known
    lines = write_pretrained(loose, tmp_path / "loose")
    text = (tmp_path / "loose/README.md").read_text()
    assert lines[-1] == "the run was not tested, so the card has no figures; run `test` first"
    assert "| accuracy | not measured | not measured |" in text
    assert "| recipe | not known |" in text
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "unknown"
    assert "model-index" not in text

    # Tested, but its images are gone: the run's figures are there, those of this file are not.
    moved = shutil.copytree(root, tmp_path / "moved")
    path = moved / "checkpoints/tiny/version_0/best.ckpt"
    content = torch.load(path, weights_only=True)
    content["datamodule_hyper_parameters"]["root"] = str(tmp_path / "gone")
    torch.save(content, path)
    lines = write_pretrained(path, tmp_path / "w")
    accuracy = json.loads((root / "logs/tiny/version_0/test.json").read_text())["test/acc"]
    text = (tmp_path / "w/README.md").read_text()
    assert f"| accuracy | {accuracy:.4f} | not measured |" in text
    assert "gone/train is not a folder" in lines[-1]
    assert "This file was not tested: " in text


def test_damaged_results_are_left_out_or_rejected(best, root, tmp_path):
    damaged = shutil.copytree(root, tmp_path / "damaged")
    path, logs = damaged / "checkpoints/tiny/version_0/best.ckpt", damaged / "logs/tiny/version_0"
    for content in (b"", (logs / "test.npz").read_bytes()[:99]):
        (logs / "test.npz").write_bytes(content)
        write_pretrained(path, tmp_path / "w")
        assert "predictions that differ" not in (tmp_path / "w/README.md").read_text()
    test = json.loads((logs / "test.json").read_text())
    del test["images"]
    (logs / "test.json").write_text(json.dumps(test))
    with pytest.raises(UserError, match=r"test\.json or robustness\.json in .*version_0 has no 'images'; test"):
        write_pretrained(path, tmp_path / "w")


def test_a_test_of_other_weights_of_the_same_epoch_is_not_in_the_card(root, tmp_path):
    run = shutil.copytree(root, tmp_path / "run")
    path = run / "checkpoints/tiny/version_0/best.ckpt"
    content = torch.load(path, weights_only=True)
    content["global_step"] += 1  # as after the rest of an epoch that was interrupted, and tested
    torch.save(content, path)
    assert write_pretrained(path, tmp_path / "w")[-1].startswith("the run was not tested")


def test_corruptions_are_in_the_card_as_they_were_measured(best, root, tmp_path):
    run = shutil.copytree(root, tmp_path / "run")
    epoch = read_checkpoint(best)["epoch"] + 1
    record = {
        "epoch": epoch, "images": 21, "seed": 0, "accuracy": {"fog": {"1": 0.5, "2": 0.25}},
        "mean": {"common": 0.375, "extra": None}, "options": ["--x"], "environment": {"date": "2026-01-02"},
    }  # fmt: skip
    (run / "logs/tiny/version_0/robustness.json").write_text(json.dumps(record))
    write_pretrained(run / "checkpoints/tiny/version_0/best.ckpt", tmp_path / "w")
    text = " ".join((tmp_path / "w/README.md").read_text().split())
    assert "mean accuracy 0.3750 on the common ones; measured: fog, at severities 1, 2; with" in text
    assert "on 2026-01-02, options of `test`: `--x`." in text


def test_a_folder_in_another_precision_keeps_the_record_of_the_run(folder, tmp_path):
    write_pretrained(folder, tmp_path / "again", "float16")
    write_pretrained(tmp_path / "again", tmp_path / "back")
    text = "stored as float32, after kernels and matrices were rounded to float16;"
    found = [text in " ".join((path / "README.md").read_text().split()) for path in (folder, tmp_path / "back")]
    assert found == [False, True]
    before, after = (read_checkpoint(path)["record"] for path in (folder, tmp_path / "again"))
    assert after["test"] == before["test"]
    assert after["stored"]["changed"] is None  # the predictions of the run are not in the folder


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "config.json"])
def test_an_earlier_folder_stays_whole_where_the_disk_is_full(name, best, folder, tmp_path, monkeypatch):
    earlier = shutil.copytree(folder, tmp_path / "mine")
    files = {file.name: file.read_bytes() for file in earlier.iterdir()}

    def full(path):
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return atomic_write(path)

    monkeypatch.setattr("cbam_pl.training.weights_folder.atomic_write", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_pretrained(best, earlier, "float16")
    assert {file.name: file.read_bytes() for file in earlier.iterdir()} == files


def test_writing_again_replaces_the_folder_but_no_other_files(best, tmp_path, command):
    write_pretrained(best, tmp_path / "w", "float16")
    write_pretrained(best, tmp_path / "w")
    assert read_checkpoint(tmp_path / "w")["state_dict"].keys() == read_checkpoint(best)["state_dict"].keys()
    (tmp_path / "w/notes.txt").write_text("mine")
    before = contents(tmp_path / "w")
    with pytest.raises(UserError, match=r"w holds other files, such as notes\.txt; name another folder"):
        write_pretrained(best, tmp_path / "w", "float16")
    assert contents(tmp_path / "w") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        write_pretrained(best, tmp_path / "file")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", "split.safetensors"])
def test_a_file_that_is_missing_or_changed_is_named(name, folder, command, tmp_path, image_folder):
    predict = ("predict", "--images", image_folder / "test", "--output", tmp_path / "out.csv", "--ckpt_path")
    changed = shutil.copytree(folder, tmp_path / "changed")
    content = bytearray((changed / name).read_bytes())
    place = content.rindex(b"blue") if name == "config.json" else len(content) - 2
    content[place] ^= 1  # such as another class's name
    (changed / name).write_bytes(content)
    error = one_line(command(*predict, changed))
    assert f"{changed / name} is not the file that was written (its SHA-256 differs" in error
    (changed / name).unlink()
    assert f"{changed} has no {name} that can be read (No such file or directory)" in one_line(
        command(*predict, changed)
    )
    assert not (tmp_path / "out.csv").exists()


def rewrite(folder, change):
    """Change config.json, with a SHA-256 that fits."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    hashes = {name: value for name, value in config.get("sha256", {}).items() if name != "config.json"}
    text = json.dumps({**config, "sha256": hashes}, sort_keys=True)
    config["sha256"] = {**hashes, "config.json": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_config_that_is_not_of_this_program_is_rejected(folder, command, tmp_path):
    def error(change):
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        rewrite(shutil.copytree(folder, tmp_path / "w"), change)
        return one_line(command("test", "--ckpt_path", tmp_path / "w"))

    assert "has the unknown key code" in error(lambda config: config.update(code="x"))
    assert "has the unknown file ../x" in error(lambda config: config["sha256"].update({"../x": "0"}))
    assert "has format 2, and this version reads 1; update the program" in error(lambda config: config.update(format=2))
    assert "has record of type list" in error(lambda config: config.update(record=[]))
    assert "has no checkpoint.ImageDataModule" in error(lambda config: config["checkpoint"].pop("ImageDataModule"))
    assert "has no hyper_parameters.arch" in error(lambda config: config["checkpoint"]["hyper_parameters"].pop("arch"))
    wrong = error(lambda config: config["checkpoint"]["hyper_parameters"].update(arch="resnet20"))
    assert "has weights that do not match its settings" in wrong
    for text in ('{"architectures": ["ResNet"]}', "[]", "{", "[" * 100_000):
        (tmp_path / "w/config.json").write_text(text)
        assert "config.json " in one_line(command("test", "--ckpt_path", tmp_path / "w"))
    (tmp_path / "w/config.json").unlink()
    (tmp_path / "w/model.safetensors").unlink()
    assert "w is a folder; name a checkpoint in it" in one_line(command("test", "--ckpt_path", tmp_path / "w"))


def test_a_folder_runs_no_code(folder, command, tmp_path):
    forged = shutil.copytree(folder, tmp_path / "forged")
    network = {"class_path": "os.mkdir", "init_args": {"path": str(tmp_path / "witness")}}
    rewrite(forged, lambda config: config["checkpoint"]["hyper_parameters"].update(network=network, arch=None))
    error = one_line(command("test", "--ckpt_path", forged))
    assert "network=os.mkdir is not imported, since importing it could run any code; allow it with --trust os" in error
    with pytest.raises(UserError, match=r"network=os\.mkdir is not imported"):
        cbam_pl.load_network(forged)
    assert not (tmp_path / "witness").exists()


def test_load_network_predicts_as_the_command_does(half, command, image_folder, tmp_path):
    folder, image = half[0], tmp_path / "photo.png"
    pixels = torch.randint(0, 256, (90, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(image)
    files = [image_folder / "test/red/0.png", image]
    output = tmp_path / "out.csv"
    assert command("predict", "--ckpt_path", folder, "--images", *files, "--output", output).status == 0
    with output.open() as stream:
        rows = {row["image"]: row for row in csv.DictReader(stream)}
    network = cbam_pl.load_network(folder)
    assert not network.training
    assert network.classes == ["blue", "green", "red"]
    with torch.no_grad():
        for images in (files, [str(files[0]), Image.open(image)], [Image.open(file) for file in files]):
            probabilities = network(network.preprocess(images)).softmax(1)
            for file, values in zip(files, probabilities, strict=True):
                row = rows[str(file)]
                assert row["class_1"] == network.classes[int(values.argmax())]
                assert float(row["probability_1"]) == pytest.approx(float(values.max()), abs=1e-4)

    # Tensors: bytes and fractions are the same image; of the network's own size they are only normalised.
    small = torch.from_numpy(np.array(Image.open(files[0]))).permute(2, 0, 1)
    prepared = network.preprocess(files[0])
    assert torch.equal(network.preprocess(small), prepared)
    assert torch.allclose(network.preprocess(small[None].float() / 255), prepared, atol=1e-6)
    large = pixels.permute(2, 0, 1)
    level = 1 / 255 / min(read_folder(folder)["ImageDataModule"]["std"])  # of 256, which Pillow may round otherwise
    assert torch.allclose(network.preprocess(large), network.preprocess(image), atol=1.01 * level)
    assert network.preprocess([small, large]).shape == (2, 3, 32, 32)
    gates = cbam_pl.attention_maps(network.network, prepared)
    assert gates


def test_preprocess_names_what_it_cannot_take(folder, tmp_path):
    network = cbam_pl.load_network(folder)
    for images, message in (
        (torch.zeros(1, 32, 32), r"images of shape \(1, 32, 32\) must be \(3, H, W\) or \(B, 3, H, W\)"),
        (torch.zeros(0, 3, 32, 32), r"images of shape \(0, 3, 32, 32\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "images of torch.int64 must be uint8, or floats"),
        (torch.full((3, 8, 8), 255.0), "values from 255 to 255 must be floats in"),
        (torch.full((3, 8, 8), float("nan")), "values from nan to nan"),
        ([], r"images=\[\] must be one image or more"),
        ([3], "images=int must be a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            network.preprocess(images)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"text\.jpg cannot be decoded"):
        network.preprocess(tmp_path / "text.jpg")


def test_from_pretrained_reads_folders_and_gives_them_to_the_hub(folder, tmp_path, monkeypatch):
    class Hub:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, **_):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **_):
            shutil.copytree(folder_path, tmp_path / "pushed")
            return f"commit of {repo_id}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    classifier = Classifier.from_pretrained(folder)
    assert isinstance(classifier, Classifier)
    assert not classifier.training
    assert_equal(in_order(classifier.state_dict()), in_order(read_checkpoint(folder)["state_dict"]))
    assert classifier.push_to_hub("me/tiny") == "commit of me/tiny"
    assert contents(tmp_path / "pushed") == contents(folder)

    # From the Hub: what it has of the repository lies in a folder.
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "pushed")

    monkeypatch.setattr("cbam_pl.training.hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **_: str(tmp_path / "pushed/config.json"))
    again = Classifier.from_pretrained("me/tiny", revision="v1")
    assert_equal(dict(again.state_dict()), dict(classifier.state_dict()))
    assert (asked["name"], asked["revision"]) == ("me/tiny", "v1")

    with torch.no_grad():
        next(classifier.parameters()).add_(1)
    with pytest.raises(UserError, match=r"the weights are no longer those of .*tiny_float32; export their checkpoint"):
        classifier.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_save_pretrained_does_not_touch_the_folder_that_was_read(folder, tmp_path, monkeypatch):
    read = shutil.copytree(folder, tmp_path / "read")
    classifier, before = Classifier.from_pretrained(read), contents(read)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(read)
    for name in (read, "read", "link"):
        with pytest.raises(UserError, match=f"^{name} is the folder that this classifier was read from; name another$"):
            classifier.save_pretrained(name)
    assert contents(read) == before
    classifier.save_pretrained(tmp_path / "other")
    assert contents(tmp_path / "other") == before


def test_the_hub_is_not_needed_for_anything_else(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "cbam_pl.training.hub", raising=False)
    assert cbam_pl.load_network(folder).classes
    with pytest.raises(UserError, match=r"from_pretrained needs huggingface_hub: pip install huggingface_hub"):
        Classifier.from_pretrained(folder)


def test_networks_of_a_library_are_taken_along(tmp_path, image_folder):
    network = {"class_path": "torchvision.models.mobilenet_v3_small", "init_args": {"weights": None}}
    classifier = Classifier(3, network=network, attention=AttentionConfig("none"), image_size=64).eval()
    checkpoint = {
        "format": 2, "epoch": 0, "global_step": 1, "state_dict": classifier.state_dict(), "figures": {},
        "hyper_parameters": dict(classifier.hparams), "run_conditions": {},
        "datamodule_hyper_parameters": {"dataset": "folder", "augmentation": "resized_crop"},
        "ImageDataModule": {"classes": ["a", "b", "c"], "mean": [0.0] * 3, "std": [1.0] * 3},
        "optimization": {"lr_scheduler.rates": {60: 0.1, 120: 0.01}},  # as numbers and as text, sorted otherwise
    }  # fmt: skip
    write_folder(tmp_path / "own", checkpoint, "float32", {}, "card")
    loaded = cbam_pl.load_network(tmp_path / "own")
    image = torch.rand(
        3, 73, 100, generator=torch.Generator().manual_seed(0)
    )  # 73 × 73 are kept, 64 × 64 in the middle
    prepared = loaded.preprocess(image)
    assert torch.allclose(prepared[0], image[:, 4:68, 18:82], atol=1e-6)
    with torch.no_grad():
        assert torch.equal(loaded(prepared), classifier(prepared))
