"""Networks that this program does not know: made by their path, fitted to the classes, checked, given attention."""

import copy
import sys
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import nn

from cbam_pl.attention import BAM, CBAM, AttentionConfig, is_attention
from cbam_pl.attention_parts import IdentityStart
from cbam_pl.models import NetworkConfig, build_network, insert_attention, make_network
from cbam_pl.models.network import check_trusted
from cbam_pl.training.classifier import Classifier

NONE = AttentionConfig("none")
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """A convolution and a linear layer for ten classes."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Classes(Small):
    def __init__(self, num_classes, width=8):
        super().__init__(width)
        self.head = nn.Linear(width, num_classes, bias=False)


def passes_on(**options):
    return Classes(**options)


def ignorant(**options):
    return Small(**options)


@dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor


Pair = namedtuple("Pair", ["logits", "aux"])


class Wrapped(Classes):
    def __init__(self, num_classes, form="dataclass"):
        super().__init__(num_classes)
        self.form = form

    def forward(self, x):
        logits = super().forward(x)
        return {
            "dataclass": Output(logits, x), "dict": {"logits": logits}, "tuple": Pair(logits, x), "plain": (logits, x),
            "places": x,
        }[self.form]  # fmt: skip


class Attending(Small):
    """Attention of its own, declared after the classifier."""

    def __init__(self, width: int = 8):
        super().__init__(width)
        self.gates = CBAM(width)

    def forward(self, x):
        return self.head(self.gates(self.conv(x)).mean((2, 3)))


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("first line\nthe kernel is larger than the image")


class Linearless(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))[:, :2]


def broken():
    raise KeyError("width")


def number():
    return 3


def own(name, num_classes=3, attention=NONE, **arguments):
    return make_network(NetworkConfig(f"{__name__}.{name}", arguments), num_classes, attention, 32)


@pytest.mark.parametrize("name", ["Classes", "passes_on"])
def test_a_network_that_takes_the_number_of_classes_gets_it(name):
    network, replaced = own(name, 5, width=16)
    assert (network.head.out_features, network.head.bias, replaced) == (5, None, "")
    assert network.conv.out_channels == 16


@pytest.mark.parametrize("name", ["Small", "ignorant", "Attending"])
def test_else_its_last_linear_layer_is_replaced(name):
    network, replaced = own(name, 5, width=16)
    assert replaced == "head"
    assert (network.head.in_features, network.head.out_features) == (16, 5)
    assert own(name, 10)[1] == ""


def test_torchvisions_weights_come_with_their_own_classes():
    path = f"{__name__}.weighted"
    network, replaced = make_network(NetworkConfig(path, {"weights": "DEFAULT"}), 5, NONE, 32)
    assert (replaced, network.fc.out_features) == ("fc", 5)
    assert network.conv1.weight.eq(0.5).all()


def weighted(*, weights=None, **options):  # as torchvision's functions, which reject another number with weights
    assert "num_classes" not in options
    network = torchvision.models.resnet18()
    nn.init.constant_(network.conv1.weight, 0.5)
    return network


@pytest.mark.parametrize("form", ["dataclass", "dict", "tuple"])
def test_logits_are_taken_out_of_what_holds_them(form):
    torch.manual_seed(0)
    network = own("Wrapped", form=form)[0].eval()
    assert torch.equal(network(IMAGES), Classes.forward(network, IMAGES))
    assert torch.equal(copy.deepcopy(network)(IMAGES), network(IMAGES))


def test_what_attention_could_follow_is_listed_with_its_shapes():
    with pytest.raises(ValueError, match=r"needs attention\.where") as caught:
        make_network(NetworkConfig("torchvision.models.resnet18"), 3, AttentionConfig("se"), 64)
    text = str(caught.value)
    assert "these give (C, H, W): conv1 (64, 32, 32), bn1 (64, 32, 32)" in text
    assert "layer1.*.bn* (64, 16, 16)" in text  # four modules that differ in numbers alone
    assert "layer2.0.downsample.* (128, 8, 8)" in text
    assert text.endswith("layer4 (512, 2, 2), avgpool (512, 1, 1)")


ERRORS = {
    "network=resnet18 is not an import path": ("resnet18", {}),
    "network=torchvision.models.resnet19: torchvision.models has no resnet19": ("torchvision.models.resnet19", {}),
    "importing no_such_package fails with ModuleNotFoundError: No module named": ("no_such_package.Net", {}),
    "network=torchvision.models is a module; name a class or function": ("torchvision.models", {}),
    "makes a int, not a torch.nn.Module": (f"{__name__}.number", {}),
    "broken fails with KeyError: 'width'": (f"{__name__}.broken", {}),
    r"fails on images \(1, 3, 32, 32\) with RuntimeError: the kernel is larger than the image$": (
        f"{__name__}.Fails",
        {},
    ),
    "takes no num_classes and has no linear layer to replace": (f"{__name__}.Linearless", {}),
    "gives a tuple without logits for one image": (f"{__name__}.Wrapped", {"form": "plain"}),
    r"gives \(1, 3, 32, 32\) for one image; it must give \(1, 3\), the classes' logits$": (
        f"{__name__}.Wrapped",
        {"form": "places"},
    ),
    "unexpected keyword argument 'depth'": ("torchvision.models.resnet18", {"depth": 3}),
    "num_classes=7 comes from the data; leave it out": ("torchvision.models.resnet18", {"num_classes": 7}),
    r"fails on images \(1, 3, 32, 32\) with .*Wrong image height! Expected 224 but got 32": (
        "torchvision.models.vit_b_16",
        {},
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_is_not_a_network_for_these_images_is_named_in_one_line(message):
    path, arguments = ERRORS[message]
    with pytest.raises(ValueError, match=message) as caught:
        make_network(NetworkConfig(path, arguments), 3, NONE, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "layer9"}, "where='layer9' matches no module of the network; it has conv"),
        ({"where": "head"}, r"where='head': the output of Linear is \(1, 10\); choose a module that gives"),
        ({"where": "conv", "place": "after_pool"}, "place='after_pool' has no effect with network=.*Small"),
        ({"where": "conv", "stages": (1,)}, r"stages=\(1,\) has no effect with network=.*Small; use attention.where"),
    ],
)
def test_places_that_cannot_have_attention_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        own("Small", 10, AttentionConfig("cbam", **options))


def test_where_is_for_networks_by_their_path():
    with pytest.raises(ValueError, match="where='conv' has no effect with arch='cnn'; use place and stages"):
        build_network("cnn", 10, AttentionConfig("cbam", where="conv"))


# The identity start


def blocks():
    """Torchvision's ResNet with one block a stage."""
    torch.manual_seed(0)
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


CONFIGS = {
    **{kind: {"kind": kind} for kind in ("se", "channel", "spatial", "cbam", "eca", "bam")},
    **{preset: {"kind": "cbam", "preset": preset} for preset in ("official", "timm", "keras")},
    "parallel": {"kind": "cbam", "order": "parallel"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_identity_start_is_the_network_itself_and_learns(name):
    plain = blocks()
    changed = insert_attention(copy.deepcopy(plain), AttentionConfig(**CONFIGS[name], start="identity"), "layer?.*.bn2")
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 5
    for network in (plain, changed):
        network.train()
    assert torch.equal(changed(images), plain(images))  # with the batch's statistics
    assert torch.equal(changed.eval()(images), plain.eval()(images))
    changed.train()
    attentions = [module for module in changed.modules() if isinstance(module, IdentityStart)]
    assert len(attentions) == 4
    optimizer = torch.optim.SGD(changed.parameters(), lr=0.1)
    for step in (1, 2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(changed(images), labels).backward()
        for attention in attentions:
            inner = sum(float(weight.grad.abs().sum()) for weight in attention.attention.parameters())
            assert float(attention.factor.grad.abs()) > 0
            assert (inner > 0) == (step == 2)  # α times what it would be
        optimizer.step()


@pytest.mark.parametrize("name", CONFIGS)
def test_identity_start_with_a_factor_of_one_is_the_paper(name):
    x = torch.randn(2, 32, 7, 7)
    torch.manual_seed(1)
    paper = AttentionConfig(**CONFIGS[name]).build(32).eval()
    torch.manual_seed(1)
    scaled = AttentionConfig(**CONFIGS[name], start="identity").build(32).eval()
    nn.init.ones_(scaled.factor)
    torch.testing.assert_close(scaled(x), paper(x))
    nn.init.constant_(scaled.factor, 0.25)
    torch.testing.assert_close(scaled(x), 0.75 * x + 0.25 * paper(x))


@pytest.mark.parametrize("arch", ["cnn", "resnet20"])
def test_our_own_networks_can_start_as_the_identity(arch):
    plain = build_network(arch, 10, "none").eval()
    changed = build_network(arch, 10, AttentionConfig("cbam", start="identity")).eval()
    missing, unexpected = changed.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".attention." in name for name in missing)
    assert torch.equal(changed(IMAGES), plain(IMAGES))


def test_what_is_attention():
    for kind in ("se", "channel", "spatial", "cbam", "eca", "bam"):
        for start in ("paper", "identity"):
            assert is_attention(AttentionConfig(kind, start=start).build(32))
    assert not is_attention(nn.Identity())
    assert is_attention(BAM(32))


def test_a_network_without_a_class_is_named():
    with pytest.raises(ValueError, match=r"^network needs a class_path, an import path such as torchvision"):
        NetworkConfig(init_args={"width": 3})


# What a checkpoint may name


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("torchvision.models.resnet18", {"weights": None}),
        ("torchvision.models.resnet.ResNet", {"layers": [1, 1]}),
        ("torchvision.models.get_model", {"name": "resnet18"}),
        ("timm.create_model", {"model_name": "vit_small_patch14_dinov2.lvd142m", "pretrained": True}),
        ("timm.models.resnet.resnet18", {"drop_rate": 0.1}),
        ("cbam_pl.models.build_network", {"arch": "cnn", "attention": "se"}),
    ],
)
def test_networks_of_known_libraries_are_trusted(path, arguments):
    check_trusted(NetworkConfig(path, arguments), ())


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("os.system", {"command": "x"}, "network=os.system is not imported.*allow it with --trust os, if you know"),
        ("torchvision.datasets.CIFAR10", {"root": "x"}, "allow it with --trust torchvision,"),
        ("torchvision.models_of_mine.Net", {}, "allow it with --trust torchvision,"),
        ("torchvision.models.resnet.partial", {}, "is not imported"),  # functools'
        ("torchvision.models.resnet.nn.Linear", {}, "is not imported"),
        ("torchvision.models.resnet.Tensor", {}, "it is not a network of torchvision"),
        ("torchvision.models.list_models", {}, "it is not a network of torchvision; allow it with --trust torchvision"),
        ("torchvision.models._api.get_model_weights", {"name": "resnet18"}, "it is not a network of torchvision"),
        ("timm.models._helpers.load_checkpoint", {"checkpoint_path": "x"}, "it is not a network of timm"),
        ("cbam_pl.models.make_network", {}, "it is not a network of cbam_pl"),
        ("cbam_pl.cli.main", {}, "is not imported"),
        ("cbam_pl.Classifier", {"num_classes": 10, "network": {"class_path": "os.system"}}, "is not imported"),
        ("cbam_pl.training.classifier.Classifier", {"num_classes": 10}, "is not imported"),
        ("cbam_pl.training.checkpoint.load_classifier", {"trust": ["os"]}, "is not imported"),
        (
            "timm.create_model",
            {"model_name": "hf-hub:stranger/model"},
            "its arguments must be numbers, words and lists",
        ),
        ("timm.create_model", {"checkpoint_path": "../x.pth"}, "its arguments must be numbers, words and lists"),
        ("torchvision.models.resnet18", {"norm_layer": torch.zeros(1)}, "its arguments must be numbers"),
    ],
)
def test_whatever_else_a_checkpoint_names_is_refused(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        check_trusted(NetworkConfig(path, arguments), ())


def test_packages_are_trusted_by_name_and_not_imported_before(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("import pathlib\npathlib.Path('witness').touch()\nNet = print\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for trusted in ((), ("strange",), ("stranger.Other",)):
        with pytest.raises(ValueError, match=r"network=stranger\.Net is not imported.*--trust stranger,"):
            check_trusted(NetworkConfig("stranger.Net"), trusted)
    for trusted in ("stranger", "stranger.Net"):
        check_trusted(NetworkConfig("stranger.Net"), [trusted])
    assert "stranger" not in sys.modules
    assert not (tmp_path / "witness").exists()


class Scaled(Classes):
    def __init__(self, num_classes, weights=None, scale=1.0):
        super().__init__(num_classes)
        self.scale = 2.0 if weights else scale  # as torchvision's weights bring arguments with them

    def forward(self, x):
        return super().forward(self.scale * x + 1)


def test_a_network_that_only_its_weights_make_is_rejected():
    def make(**arguments):
        network = {"class_path": f"{__name__}.Scaled", "init_args": {"weights": "DEFAULT", **arguments}}
        return Classifier(3, network=network, attention=NONE)

    make(scale=2.0)
    with pytest.raises(ValueError, match="its weights set arguments that a checkpoint does not have") as caught:
        make()
    assert "\n" not in str(caught.value)
