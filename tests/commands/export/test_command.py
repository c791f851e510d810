"""`export`: files that give what the network gives, by arithmetic of the test's own, and what is rejected."""

import ast
import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from cbam_pl.attention import AttentionConfig, AttentionKind
from cbam_pl.commands.export.graph import ExportedNetwork, read_onnx, read_pt2, trace, write_onnx, write_pt2
from cbam_pl.data.folder import decode
from cbam_pl.inspect.gates import attention_maps
from cbam_pl.models import NetworkConfig, ResNet, build_network, make_network
from cbam_pl.models.resnet import RESNETS
from cbam_pl.training.checkpoint import load_classifier, read_checkpoint
from cbam_pl.training.classifier import Classifier
from tests.helpers import COLOURS, REPOSITORY, checkpoint, one_line, photo

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
BEST = "checkpoints/tiny/version_0/best.ckpt"

# A network of the user's own for each way to fail.
NETWORKS = """
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, images):
        return self.fc(images.mean((2, 3)))

class LooksAtValues(Plain):
    def forward(self, images):
        logits = super().forward(images)
        return logits if logits.sum() > 0 else -logits

class OneBatchSize(Plain):
    def forward(self, images):
        return torch.stack([self.fc(image.mean((1, 2))) for image in images])

class Random(Plain):
    def forward(self, images):
        logits = super().forward(images)
        return logits + torch.rand(logits.shape)

class NotInOnnx(Plain):
    def forward(self, images):
        return self.fc(torch.linalg.svdvals(images[:, :, :3, :3].mean(1)))
"""


def by_hand(network, pixels, mean, std, flip=False):
    """Probabilities (N, classes) of pixels (N, 3, H, W) uint8, with normalisation and softmax written out."""
    x = torch.stack([(pixels[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)], 1).float()
    with torch.no_grad():
        logits = network(x).double()
        if flip:
            logits = (logits + network(x[:, :, :, torch.arange(x.shape[3] - 1, -1, -1)]).double()) / 2
    exponentials = torch.exp(logits - logits.amax(1, keepdim=True))
    return exponentials / exponentials.sum(1, keepdim=True)


def noise(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def assert_gates(outputs, network, pixels, mean, std, bound):
    """The gates of `attention_maps`, each by its block's name, and no others."""
    x = torch.stack([(pixels[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)], 1).float()
    expected = {}
    for block, maps in attention_maps(network, x).items():
        expected |= {f"{block}.{name}": gate for name, gate in vars(maps).items() if gate is not None}
    assert list(outputs) == ["probabilities", *expected]
    for name, gate in expected.items():
        torch.testing.assert_close(outputs[name], gate, rtol=0, atol=bound)


@pytest.fixture(scope="module")
def pt2(trained, command, tmp_path_factory):
    """The finished run, tested and exported with its gates: the run's folder, the file, and what was printed."""
    root = shutil.copytree(trained[0], tmp_path_factory.mktemp("export") / "run")
    assert command("test", "--trainer.default_root_dir", root).status == 0
    output = root / "exported"
    outcome = command("export", "--trainer.default_root_dir", root, "--format", "pt2", "--output", output, "--gates")
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    return root, output / "model.pt2", outcome.out


def test_a_pt2_file_gives_probabilities_and_gates_for_any_number_of_images(pt2):
    root, file, _ = pt2
    content = checkpoint(root, "best")
    network = load_classifier(file, read_checkpoint(root / BEST)).eval().network
    mean, std = (content["ImageDataModule"][name] for name in ("mean", "std"))
    run = read_pt2(file)
    for count in (1, 5):
        pixels = noise(count, 32)
        outputs = run(pixels / 255)
        expected = by_hand(network, pixels, mean, std)
        torch.testing.assert_close(outputs["probabilities"].double(), expected, rtol=0, atol=2e-6)
        assert_gates(outputs, network, pixels, mean, std, 2e-6)


def test_the_metadata_say_what_it_is_and_how_good_it_was_measured(pt2):
    root, file, out = pt2
    extra = {"metadata.json": ""}
    torch.export.load(file, extra_files=extra)
    about = json.loads(extra["metadata.json"])
    test = json.loads((root / "logs/tiny/version_0/test.json").read_text())
    content = checkpoint(root, "best")
    assert about["classes"] == list(COLOURS)
    assert (about["mean"], about["std"]) == tuple(content["ImageDataModule"][name] for name in ("mean", "std"))
    assert (about["test_accuracy"], about["test_images"]) == (test["test/acc"], 21)
    assert (about["recipe"], about["version"], about["seed"]) == ("tiny", 0, 3)
    assert (about["network"], about["attention"], about["epoch"]) == ("cnn", "cbam", content["epoch"] + 1)
    assert about["commit"] == test["environment"]["commit"]
    found = re.search(r"on 21 test images of folder: probabilities (\S+), gates (\S+) \(at most 1e-04", out)
    assert all(float(text) < 1e-5 for text in found.groups())
    assert str(REPOSITORY).encode() not in file.read_bytes()  # no paths of the machine


def test_the_metadata_say_what_was_resized_in_proportion(trained, command, tmp_path):
    root = shutil.copytree(trained[0], tmp_path / "run")
    content = checkpoint(root, "best")
    content["datamodule_hyper_parameters"]["augmentation"] = "resized_crop"
    torch.save(content, root / "checkpoints/tiny/version_0/best.ckpt")
    outcome = command("export", "--trainer.default_root_dir", root, "--format", "pt2", "--output", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "out/model.pt2", extra_files=extra)
    about = json.loads(extra["metadata.json"])
    assert (about["image_size"], about["shorter_side"]) == (32, 37)
    # As docs/export.md prepares an image.
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/export.md").read_text(), re.DOTALL)
    (script,) = (block for block in blocks if "shorter_side" in block)
    photo(110, 61).save(tmp_path / "my_cat.png")
    names = {"about": about, "Image": Image}
    with contextlib.chdir(tmp_path):
        exec(script, names)
    expected = decode(tmp_path / "my_cat.png", 32, in_proportion=True).permute(1, 2, 0).numpy()
    found = np.asarray(names["photo"])
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.fixture
def own(trained, tmp_path, monkeypatch):
    """Makes a checkpoint of one of NETWORKS, and gives the options that export it."""
    (tmp_path / "their_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_networks", raising=False)

    def make(name):
        content = checkpoint(trained[0], "best")
        settings = {"network": {"class_path": f"their_networks.{name}"}, "attention": {"kind": "none"}}
        torch.manual_seed(0)
        model = Classifier(3, **settings)
        content |= {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
        torch.save(content, tmp_path / f"{name}.ckpt")
        return ["export", "--ckpt_path", tmp_path / f"{name}.ckpt", "--trust", "their_networks", "--format", "pt2"]

    return make


@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "LooksAtValues": "their_networks.LooksAtValues cannot be exported: .*data-dependent",
        "OneBatchSize": "cannot be exported: its code works for only one batch size",
        "Random": r"model.pt2 differs from the checkpoint by more than 1e-04 on 21 test images of folder \(probabilit",
    }.items(),
)
def test_a_network_that_cannot_be_exported_leaves_nothing_behind(name, reason, own, command, tmp_path):
    outcome = command(*own(name), "--output", tmp_path / "new/folder")
    assert re.search(reason, one_line(outcome))
    assert {path.name for path in tmp_path.iterdir()} <= {"their_networks.py", f"{name}.ckpt", "__pycache__"}


def test_an_earlier_export_is_replaced_and_other_files_are_not_touched(own, command, tmp_path):
    output = tmp_path / "out"
    words = [*own("Plain"), "--output", output, "--data.root", tmp_path / "nowhere"]
    for _ in range(2):
        outcome = command(*words)
        assert outcome.status == 0, outcome.err
    assert "nowhere, so the file is verified on noise" in outcome.out
    assert [path.name for path in output.iterdir()] == ["model.pt2"]
    (output / "thesis.tex").write_text("mine")
    assert f"--output {output} holds other files, such as thesis.tex; name another" in one_line(command(*words))
    assert {path.name for path in output.iterdir()} == {"model.pt2", "thesis.tex"}
    words[words.index(output)] = output / "thesis.tex"
    assert "thesis.tex is not a folder" in one_line(command(*words))


def test_what_does_not_fit_together_is_one_line(own, command, tmp_path, monkeypatch):
    plain = [*own("Plain"), "--output", tmp_path / "out"]
    assert "has none; leave it out" in one_line(command(*plain, "--gates"))
    assert "Expected a typing.Literal['onnx', 'pt2', 'safetensors']. Got value: onyx" in one_line(
        command(*plain, "--format", "onyx")
    )
    assert "required: output" in one_line(command(*plain[:-2]))
    error = one_line(command(*plain, "--format", "safetensors", "--input_type", "uint8"))
    assert "--input_type has no effect with --format safetensors" in error
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for option in (["--format", "onnx"], ["--benchmark"]):
        assert "pip install onnx onnxscript onnxruntime" in one_line(command(*plain, *option))
    content = torch.load(tmp_path / "Plain.ckpt", weights_only=True)
    content["state_dict"]["network.fc.bias"][0] = torch.nan
    torch.save(content, tmp_path / "Plain.ckpt")
    assert "probabilities that are not finite: it has diverged" in one_line(command(*plain))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_safetensors_are_a_folder_that_every_command_takes(trained, command, image_folder, tmp_path):
    root = ["--trainer.default_root_dir", trained[0]]
    options = ["--format", "safetensors", "--output", tmp_path / "weights", "--licence", "mit"]
    outcome = command("export", *root, *options)
    assert outcome.status == 0, outcome.err
    assert "license: mit" in (tmp_path / "weights/README.md").read_text()
    found = []
    for number, source in enumerate((trained[0] / BEST, tmp_path / "weights")):
        output = tmp_path / f"exported-{number}"
        outcome = command("export", "--format", "pt2", "--output", output, "--ckpt_path", source)
        assert outcome.status == 0, outcome.err
        found.append(read_pt2(output / "model.pt2")(noise(3, 32) / 255)["probabilities"])
    assert torch.equal(*found)


BLOCKS = {"basic": "resnet20", "bottleneck": "resnet50"}


def networks():
    """Each kind of block with each attention: the cnn, and ResNets of three blocks, which the deeper ones repeat."""
    for kind in get_args(AttentionKind):
        yield pytest.param("cnn", AttentionConfig(kind), id=f"cnn-{kind}")
        for block in BLOCKS:
            yield pytest.param(block, AttentionConfig(kind), id=f"{block}-{kind}")
    for name, options in {
        "parallel": {"order": "parallel"}, "timm": {"preset": "timm"}, "identity": {"start": "identity"},
        "learned": {"descriptor": "learned"}, "pools": {"pools": ("lse", "lp")},
    }.items():  # fmt: skip
        yield pytest.param("cnn", AttentionConfig("cbam", **options), id=f"cnn-cbam-{name}")
    yield pytest.param("resnet20", AttentionConfig("cbam"), id="resnet20-cbam")


def spread(network):
    """Evaluation mode, with statistics and factors as a training leaves them."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim < 2 and tensor.is_floating_point():
            tensor.uniform_(0.2, 0.8, generator=generator)
    return network.eval()


def assert_files_agree(network, size, tmp_path):
    """Both files of a network with any number of images."""
    has_gates = bool(attention_maps(network, torch.zeros(1, 3, size, size)))
    graph = trace(ExportedNetwork(network, MEAN, STD, False, has_gates), size, "float32", "network")
    for name, write, read in (("pt2", write_pt2, read_pt2), ("onnx", write_onnx, read_onnx)):
        write(graph, {}, tmp_path / name)
        run = read(tmp_path / name)
        for count in (1, 3):
            pixels = noise(count, size, seed=count)
            outputs = run(pixels / 255)
            expected = by_hand(network, pixels, MEAN, STD)
            torch.testing.assert_close(outputs["probabilities"].double(), expected, rtol=0, atol=1e-5)
            assert_gates(outputs, network, pixels, MEAN, STD, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "attention"), list(networks()))
def test_every_block_with_every_attention(arch, attention, tmp_path):
    torch.manual_seed(0)
    if arch in BLOCKS:
        network = ResNet(replace(RESNETS[BLOCKS[arch]], depths=(1, 2)), 5, attention)
    else:
        network = build_network(arch, 5, attention, image_size=16)
    assert_files_agree(spread(network), 16, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "arguments", "where"),
    [
        ("torchvision.models.mobilenet_v3_small", {}, "features.[258]"),
        ("timm.create_model", {"model_name": "convnext_atto"}, "stages.?"),
        ("timm.create_model", {"model_name": "resnet10t", "zero_init_last": False}, "layer?.*.bn2"),
    ],
    ids=["mobilenet", "convnext", "resnet10t"],
)
def test_networks_of_libraries(path, arguments, where, tmp_path):
    torch.manual_seed(0)
    attention = AttentionConfig("cbam", where=where, start="identity")
    network = spread(make_network(NetworkConfig(path, arguments), 5, attention, 64)[0])
    assert_files_agree(network, 64, tmp_path)


@pytest.fixture(scope="module")
def onnx(pt2, command):
    """The same run as ONNX, with uint8 images, the test-time flip and gates, timed."""
    root, _, _ = pt2
    output = root / "onnx"
    outcome = command(
        "export", "--trainer.default_root_dir", root, "--format", "onnx", "--output", output, "--gates",
        "--input_type", "uint8", "--model.test_time_flip", "true", "--benchmark",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    return root, output / "model.onnx", outcome.out


@pytest.mark.slow
def test_an_onnx_file_flips_and_takes_bytes(onnx):
    root, file, _ = onnx
    content = read_checkpoint(root / BEST)
    network = load_classifier(file, content).eval().network
    mean, std = (content["ImageDataModule"][name] for name in ("mean", "std"))
    run = read_onnx(file)
    for count in (1, 5):
        pixels = noise(count, 32)
        outputs = run(pixels)
        plain, expected = (by_hand(network, pixels, mean, std, flip) for flip in (False, True))
        assert (plain - expected).abs().max() > 1e-4
        torch.testing.assert_close(outputs["probabilities"].double(), expected, rtol=0, atol=2e-6)
        assert_gates(outputs, network, pixels, mean, std, 2e-6)


@pytest.mark.slow
def test_an_onnx_file_has_its_opset_and_metadata_and_no_paths(onnx):
    _, file, out = onnx
    model = pytest.importorskip("onnx").load(file)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 18)]
    assert "ONNX, opset 18" in out
    about = {one.key: one.value for one in model.metadata_props}
    assert json.loads(about["classes"]) == list(COLOURS)
    assert (about["recipe"], about["input_type"], about["test_time_flip"]) == ("tiny", "uint8", "true")
    assert "test_accuracy" not in about, "which was measured without mirror images"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert str(REPOSITORY).encode() not in file.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]  # the pt2 file was made to be timed


@pytest.mark.slow
def test_the_benchmark_times_one_image_and_many(onnx):
    rows = re.findall(r"│ +(\d+) +│ +([\d.]+) .*?│ +([\d.]+) .*?│ +([\d.]+) .*?│", onnx[2])
    assert [row[0] for row in rows] == ["1", "64"]
    one, many = ([float(text) for text in row[1:]] for row in rows)
    assert all(0 < fast < slow for fast, slow in zip(one, many, strict=True))
    assert re.search(r"images +┃ +PyTorch +┃ +pt2 +┃ +onnxruntime", onnx[2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_half_precision_halves_the_file_and_keeps_the_interface(kind, pt2, command, tmp_path):
    root, _, _ = pt2
    sizes = []
    for precision in ("float32", "float16"):
        output = tmp_path / precision
        words = ["export", "--trainer.default_root_dir", root, "--format", kind, "--output", output]
        outcome = command(*words, "--precision", precision)
        assert outcome.status == 0, outcome.err
        sizes.append((output / f"model.{kind}").stat().st_size)
    assert sizes[1] < 0.56 * sizes[0]
    content = read_checkpoint(root / BEST)
    network = load_classifier(root, content).eval().network
    mean, std = (content["ImageDataModule"][name] for name in ("mean", "std"))
    pixels = noise(7, 32)
    found = {"onnx": read_onnx, "pt2": read_pt2}[kind](output / f"model.{kind}")(pixels / 255)["probabilities"]
    assert found.dtype == torch.float32
    difference = (found - by_hand(network, pixels, mean, std)).abs().max()
    assert 0 < difference < 1e-2


@pytest.mark.slow
def test_operators_that_onnx_lacks_are_named(own, command, tmp_path):
    words = [*own("NotInOnnx")[:-1], "onnx", "--output", tmp_path / "out"]
    assert re.search("NotInOnnx cannot be converted to ONNX: .*svd", one_line(command(*words)))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_weights_that_need_a_file_of_their_own_are_rejected(own, command, tmp_path, monkeypatch):
    save = torch.onnx.ONNXProgram.save

    def save_in_two(program, path, **_):  # as torch does above 1.5 GiB
        save(program, path, external_data=True)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save_in_two)
    words = [*own("Plain")[:-1], "onnx", "--output", tmp_path / "out"]
    assert "Plain has weights that are too large for one ONNX file; use --precision" in one_line(command(*words))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nothing_of_torchs_own_reaches_the_terminal(trained, tmp_path):
    words = ["export", "--trainer.default_root_dir", trained[0], "--format", "onnx", "--output", tmp_path / "out"]
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    script = [sys.executable, "train.py", *map(str, words)]
    done = subprocess.run(script, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "exporting", "model.onnx:", f"{tmp_path / 'out/model.onnx'}:",
    ]  # fmt: skip


def documented(package):
    """The lines of docs/export.md that use a file with this package alone."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/export.md").read_text(), re.DOTALL)
    (script,) = (block for block in blocks if f"import {package}\n" in block)
    return script


@pytest.mark.slow
def test_the_lines_for_pytorch_need_nothing_of_this_program(pt2):
    root, _, _ = pt2
    check = "import sys\nsys.modules['cbam_pl'] = None\n"
    script = [sys.executable, "-W", "ignore", "-c", check + documented("torch")]
    done = subprocess.run(script, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    classes = ast.literal_eval(done.stdout)
    assert len(classes) == 5
    assert set(classes) <= set(COLOURS)


@pytest.fixture
def without_torch(tmp_path):
    """Python in an environment of onnxruntime, NumPy and Pillow, with what these need, and nothing else."""
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    for name in ("onnxruntime", "numpy", "pillow", "flatbuffers", "protobuf", "packaging"):
        files = metadata.files(name)
        assert files is not None
        for top in {file.parts[0] for file in files} - {".."}:
            source = Path(metadata.distribution(name).locate_file(top))
            if not (packages / top).exists():
                (packages / top).symlink_to(source)
    return tmp_path / "venv/bin/python"


@pytest.mark.slow
def test_the_ten_lines_need_no_torch_and_give_what_predict_gives(
    without_torch, trained, command, image_folder, tmp_path
):
    script = documented("onnxruntime")
    assert len([line for line in script.splitlines() if line]) == 10
    root = ["--trainer.default_root_dir", trained[0]]
    outcome = command("export", *root, "--format", "onnx", "--output", tmp_path / "exported")
    assert outcome.status == 0, outcome.err
    shutil.copy(image_folder / "test/green/0.png", tmp_path / "my_cat.png")
    outcome = command("predict", *root, "--images", tmp_path / "my_cat.png", "--output", tmp_path / "predicted.csv")
    assert outcome.status == 0, outcome.err
    with (tmp_path / "predicted.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    check = "try:\n    import torch\nexcept ImportError:\n    pass\nelse:\n    raise SystemExit('torch is here')\n"
    done = subprocess.run([without_torch, "-c", check + script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, probability = done.stdout.split()
    assert (name, float(probability)) == (row["class_1"], pytest.approx(float(row["probability_1"]), abs=1e-4))
    assert np.isfinite(float(probability))
