"""Every command on networks that this program does not know, and what checkpoints of them may not do."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.helpers import REPOSITORY, one_line, scalars

EXAMPLE = (REPOSITORY / "docs/own_networks.md").read_text().split("## A worked example")[1].split("\n## ")[0]


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A working directory with the files of the worked example, and its commands, on fewer images."""
    monkeypatch.chdir(tmp_path)
    code, recipe, commands = re.findall(r"```\w+\n(.*?)```", EXAMPLE, re.DOTALL)
    Path("my_network.py").write_text(code)
    Path("my_network.yaml").write_text(recipe)
    return [shlex.split(line)[2:] for line in commands.splitlines()]


@pytest.mark.slow
def test_the_worked_example(example, command):
    fit, test, visualize, compare = example
    few = ["--trainer.limit_train_batches", 2, "--trainer.accelerator", "cpu"]
    trained = command(*fit, *few)
    assert trained.status == 0, trained.err
    assert "network      my_network.MyNet, attention cbam" in trained.out
    refused = one_line(command("test"))
    assert (
        "network=my_network.MyNet is not imported, since importing it could run any code; allow it with --trust my_net"
        in refused
    )
    for words in (test, visualize):
        outcome = command(*words)
        assert outcome.status == 0, outcome.err
    assert Path("logs/my_network/version_0/pictures/grad_cam.png").exists()
    compared = command(*compare, *few)
    assert compared.status == 0, compared.err
    assert Path("reports/my_network/report.md").read_text().startswith("# cbam against none")


NETWORKS = {
    "resnet18": ("torchvision.models.resnet18", {}, "layer?.*.bn2"),
    "mobilenet_v3_small": ("torchvision.models.mobilenet_v3_small", {}, "features.*"),
    "efficientnet_b0": ("torchvision.models.efficientnet_b0", {}, "features.?.*"),
    "convnext_tiny": ("torchvision.models.convnext_tiny", {}, "features.[1357].*"),
    "densenet121": ("torchvision.models.densenet121", {}, "features.transition?"),
    "mobilenetv3_small_050": ("timm.create_model", {"model_name": "mobilenetv3_small_050"}, "blocks.?.?"),
    "convnext_atto": ("timm.create_model", {"model_name": "convnext_atto"}, "stages.?"),
    "resnet10t": ("timm.create_model", {"model_name": "resnet10t", "zero_init_last": False}, "layer?.*.bn2"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the spatial gate of")  # which is nearly constant after one step
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_libraries_are_trained_resumed_tested_and_drawn(name, command, image_folder, tmp_path):
    path, arguments, where = NETWORKS[name]
    root = ["--trainer.default_root_dir", tmp_path]
    recipe = tmp_path / "any.yaml"
    recipe.write_text(
        f"""
model:
  network: {{class_path: {path}, init_args: {arguments}}}
  attention: {{kind: cbam, where: {where!r}, start: identity}}
data: {{dataset: folder, root: {image_folder}, image_size: 64, batch_size: 8}}
trainer: {{max_epochs: 1, limit_train_batches: 1, accelerator: cpu}}
"""
    )
    trained = command("fit", "--config", recipe, *root)
    assert trained.status == 0, trained.err
    assert "that starts as the identity" in trained.out
    resumed = command("fit", "--config", recipe, *root, "--trainer.max_epochs", 2, "--ckpt_path", "last")
    assert resumed.status == 0, resumed.err
    tested = command("test", *root)
    assert tested.status == 0, tested.err
    drawn = command("visualize", *root)
    # After two steps, there may be no evidence for the predicted class.
    assert drawn.status == 0 or one_line(drawn).startswith("error: no grad_cam.png: Grad-CAM is 0.000 everywhere")
    logs = tmp_path / "logs/any/version_0"
    pictures = {path.stem for path in (logs / "pictures").iterdir()}
    assert pictures >= {"attention", "features", "heat_maps", "curves"}
    logged = scalars(logs)
    assert [step for step, _ in logged["train/loss_step"]] == [1, 2]
    factors = [points for tag, points in logged.items() if re.fullmatch(r"val_gates/.*[^.]/factor", tag)]
    assert len(factors) == sum(tag.endswith("/channel_mean") for tag in logged) > 0
    assert all([step for step, _ in points] == [1, 2] and points[0][1] != 0 for points in factors)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command, image_folder):
    """A run of torchvision's smallest ResNet, without attention."""
    root = tmp_path_factory.mktemp("own")
    outcome = command(
        "fit", "--model.network", "torchvision.models.resnet18", "--model.attention.kind", "none", "--data.dataset",
        "folder", "--data.root", image_folder, "--data.batch_size", 32, "--trainer.max_epochs", 1,
        "--trainer.limit_train_batches", 1, "--trainer.default_root_dir", root, "--trainer.accelerator", "cpu",
        "--pictures_every", 0,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    return root / "checkpoints/default/version_0/best.ckpt"


def test_a_checkpoint_is_fine_tuned_and_the_summary_says_what_is_trained(finished, command, image_folder, tmp_path):
    outcome = command(
        "fit", "--model.network", "torchvision.models.resnet18", "--model.attention.where", "layer4.*.bn2",
        "--model.weights", finished, "--model.freeze", "[conv1, bn1, 'layer[123]']", "--model.lr_factors", "{fc: 10}",
        "--data.dataset", "folder", "--data.root", image_folder, "--data.batch_size", 32, "--trainer.max_epochs", 1,
        "--trainer.limit_train_batches", 1, "--trainer.default_root_dir", tmp_path, "--trainer.accelerator", "cpu",
        "--pictures_every", 0, "--data.image_size", 64,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    attention = 2 * (2 * 512 * 32 + 2 * 49 + 1)
    layer4 = 8_393_728
    fc = 512 * 3 + 3
    for line in (
        "network      torchvision.models.resnet18, attention cbam that starts as the identity",
        f"weights      122 of 130 tensors from {finished}; attention at its start: 8 tensors",
        f"trained      {layer4 + attention + fc:,} of {11_176_512 + fc + attention:,} parameters, without conv1, bn1, ",
        f"rate         × 1 for the rest: {layer4 + attention:,} parameters",
        f"rate         × 10 for fc: {fc:,} parameters",
    ):
        assert f"\n{line}" in f"\n{outcome.out}", outcome.out


def test_weights_that_cannot_be_downloaded_are_reported_in_one_line(command, image_folder, tmp_path, monkeypatch):
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    words = ["--model.network", "torchvision.models.resnet18", "--model.network.weights", "DEFAULT"]
    error = one_line(command("fit", *words, "--data.dataset", "folder", "--data.root", image_folder))
    assert re.search(
        "network=torchvision.models.resnet18 fails with URLError: .*give a file of them with model.we", error
    )


@pytest.mark.parametrize("which", ["test", "validate", "predict", "visualize"])
def test_a_strangers_checkpoint_imports_nothing(which, finished, command, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"stranger_of_{which}"  # since one that was imported stays so
    Path(f"{name}.py").write_text("import pathlib\npathlib.Path('witness').touch()\n")
    saved = torch.load(finished, weights_only=True)
    saved["hyper_parameters"]["network"]["class_path"] = f"{name}.Net"
    torch.save(saved, "x.ckpt")
    images = ["--images", image_folder / "test/red/0.png"] if which == "predict" else []
    error = one_line(command(which, *images, "--ckpt_path", "x.ckpt"))
    assert f"x.ckpt has hyper_parameters from which no network can be made: network={name}.Net is not im" in error
    assert f"allow it with --trust {name}, if you know" in error
    assert not Path("witness").exists()
    error = one_line(command(which, *images, "--ckpt_path", "x.ckpt", "--trust", name))
    assert f"network={name}.Net: {name} has no Net" in error
    assert Path("witness").exists()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (3, "has hyper_parameters.network of type int"),
        ({"class_path": "a.b"}, "has no hyper_parameters.network.init_args"),
        (
            {"class_path": "torchvision.models.resnet34", "init_args": {}},
            "weights that do not match its settings",
        ),
        (
            {"class_path": "torchvision.models.resnet18", "init_args": {"width": 3}},
            "unexpected keyword argument 'width'",
        ),
    ],
)
def test_edited_networks_of_checkpoints_are_named(network, message, finished, command, tmp_path):
    saved = torch.load(finished, weights_only=True)
    saved["hyper_parameters"]["network"] = network
    torch.save(saved, tmp_path / "x.ckpt")
    assert message in one_line(command("test", "--ckpt_path", tmp_path / "x.ckpt"))


def test_a_network_that_cannot_be_traced_trains_with_a_warning(command, image_folder, tmp_path):
    with pytest.warns(UserWarning, match="no graph in TensorBoard, since the network cannot be traced .*not to be"):
        outcome = command(
            "fit", "--model.network", f"{__name__}.Untraceable", "--model.attention.kind", "none", "--data.dataset",
            "folder", "--data.root", image_folder, "--data.batch_size", 32, "--trainer.max_epochs", 1,
            "--trainer.default_root_dir", tmp_path, "--trainer.accelerator", "cpu", "--pictures_every", 0,
        )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert (
        "1.5 MFLOPs" in outcome.out
    )  # of one convolution, 2 · 27 · 27 · 32² , counted though the network looks at values


class Untraceable(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 27, 3, padding=1)
        self.head = torch.nn.Linear(27, num_classes)

    def forward(self, images):
        if torch.jit.is_tracing():
            raise RuntimeError("not to be traced")
        scale = images.abs().amax().item()
        return self.head(self.conv(images).mean((2, 3)) / max(scale, 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.network", "torchvision.models.resnet18", "--model.arch", "cnn"],
            "arch=cnn has no effect with network",
        ),
        (
            ["--model.network", "torchvision.models.resnet18", "--model.width", "2"],
            "width=2.0 has no effect with network",
        ),
        (["--model.network.depth", "2"], "model.network.depth is an argument of a network; give --model.network"),
        (["--model.network", "no_such_package.Net"], "importing no_such_package fails with ModuleNotFoundError"),
        (["--model.network", "torchvision.models.resnet18"], "needs attention.where with network=torchvision"),
        (["--model.attention.where", "conv"], "where='conv' has no effect with arch='cnn'; use place and stages"),
        (["--model.weights", "nowhere.pth"], "weights=nowhere.pth cannot be read (No such file or directory)"),
    ],
)
def test_mistakes_of_the_command_line(options, message, command, image_folder, tmp_path):
    data = ["--data.dataset", "folder", "--data.root", image_folder, "--trainer.default_root_dir", tmp_path]
    assert message in one_line(command("fit", *data, *options))
    assert not list(tmp_path.glob("*/*"))
