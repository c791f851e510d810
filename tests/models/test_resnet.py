"""The ResNets: published parameter counts, equality with torchvision's, and the forward pass written out."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from cbam_pl.attention import AttentionConfig
from cbam_pl.models import build_network

COUNTS = [
    *(
        (arch, classes, kind, "cifar", count)
        for arch, classes, *counts in [
            ("resnet20", 10, 269_722, 271_738, 269_749, 272_620),
            ("resnet32", 10, 464_154, 467_514, 464_199, 468_984),
            ("resnet44", 10, 658_586, 663_290, 658_649, 665_348),
            ("resnet56", 10, 853_018, 859_066, 853_099, 861_712),
            ("resnet110", 10, 1_727_962, 1_740_058, 1_728_124, 1_745_350),
        ]
        for kind, count in zip(("none", "se", "eca", "cbam"), counts, strict=True)
    ),
    ("resnet20", 100, "none", "cifar", 275_572),
    ("resnet20", 100, "cbam", "cifar", 278_470),
    ("resnet56", 100, "none", "cifar", 858_868),
    ("resnet56", 100, "cbam", "cifar", 867_562),
    ("resnet110", 100, "none", "cifar", 1_733_812),
    ("resnet110", 100, "cbam", "cifar", 1_751_200),
    ("resnet18", 10, "none", "cifar", 11_173_962),
    ("resnet18", 10, "cbam", "cifar", 11_261_786),
    ("resnet18", 100, "none", "cifar", 11_220_132),
    ("resnet18", 100, "cbam", "cifar", 11_307_956),
    ("resnet34", 100, "none", "cifar", 21_328_292),
    ("resnet34", 100, "cbam", "cifar", 21_487_044),
    ("resnet50", 1000, "none", "cifar", 25_549_352),
    ("resnet50", 1000, "cbam", "cifar", 28_065_864),
    ("resnet101", 100, "none", "cifar", 42_697_380),
    ("resnet101", 100, "cbam", "cifar", 47_443_782),
    ("resnet152", 100, "none", "cifar", 58_341_028),
    ("resnet152", 100, "cbam", "cifar", 64_924_104),
    ("resnet50", 1000, AttentionConfig(preset="official"), "cifar", 28_081_944),
    ("resnet50", 1000, AttentionConfig(preset="timm"), "cifar", 28_065_896),
    ("resnet50", 1000, AttentionConfig(preset="keras"), "cifar", 30_597_800),
    ("resnet50", 1000, "none", "imagenet", 25_557_032),  # torchvision's
    ("resnet50", 1000, AttentionConfig(preset="paper"), "imagenet", 28_073_544),
    ("resnet50", 1000, AttentionConfig(preset="official"), "imagenet", 28_089_624),  # the published 28.09 M
    ("resnet50", 1000, AttentionConfig(preset="timm"), "imagenet", 28_073_576),
    ("resnet50", 1000, AttentionConfig(preset="keras"), "imagenet", 30_605_480),
]


@pytest.mark.parametrize(("arch", "num_classes", "attention", "stem", "count"), COUNTS)
def test_parameter_count(arch, num_classes, attention, stem, count):
    with torch.device("meta"):
        network = build_network(arch, num_classes, attention, stem=stem)
    assert sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad) == count


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_imagenet_stem_makes_torchvisions_network(arch):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)(num_classes=5).eval()
    ours = build_network(arch, 5, "none", stem="imagenet").eval()
    # Both declare their layers in the order of the forward pass, but that ours puts them in other modules.
    weights, shapes = list(theirs.state_dict().values()), [v.shape for v in ours.state_dict().values()]
    assert [weight.shape for weight in weights] == shapes
    ours.load_state_dict(dict(zip(ours.state_dict(), weights, strict=True)))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def cifar_resnet_forward(state, x, depth, place, stages, training):
    """ResNet-20 to 110 with CBAM, from the state dict and He et al., section 4.2, alone."""

    def norm(x, at):
        if training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        else:
            mean, variance = state[f"{at}.running_mean"], state[f"{at}.running_var"]
        scale = state[f"{at}.weight"] / (variance + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{at}.bias"][:, None, None]

    def conv(x, at, stride=1):
        return F.conv2d(x, state[f"{at}.weight"], stride=stride, padding=1)

    def cbam(x, at):
        reduce, expand = state[f"{at}.channel.reduce.weight"], state[f"{at}.channel.expand.weight"]
        logits = sum(torch.relu(pooled @ reduce.T) @ expand.T for pooled in (x.mean((2, 3)), x.amax((2, 3))))
        x = x * torch.sigmoid(logits)[:, :, None, None]
        described = torch.stack([x.mean(1), x.amax(1)], 1)
        return x * torch.sigmoid(F.conv2d(described, state[f"{at}.spatial.conv.weight"], padding=3))

    x = torch.relu(norm(conv(x, "stem.0"), "stem.1"))
    for stage in range(3):
        for block in range((depth - 2) // 6):
            at = f"stages.{stage}.{block}"
            attend = (lambda x, at=at: cbam(x, f"{at}.attention")) if stage + 1 in stages else (lambda x: x)
            stride = 2 if stage > 0 and block == 0 else 1
            y = torch.relu(norm(conv(x, f"{at}.branch.0", stride), f"{at}.branch.1"))
            y = norm(conv(y, f"{at}.branch.3"), f"{at}.branch.4")
            shortcut = torch.zeros_like(y)
            for channel in range(x.shape[1]):
                shortcut[:, channel] = x[:, channel, ::stride, ::stride]
            x = attend(torch.relu(y + shortcut)) if place == "after_addition" else torch.relu(attend(y) + shortcut)
    return x.mean((2, 3)) @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("arch", "depth", "place", "stages", "width"),
    [
        ("resnet20", 20, None, None, 1.0),
        ("resnet20", 20, "after_addition", (1, 3), 1.0),
        ("resnet32", 32, "before_addition", (2,), 1.3),
        ("resnet110", 110, None, None, 0.5),
    ],
)
def test_cifar_resnet_computes_what_is_written_out(arch, depth, place, stages, width, training):
    torch.manual_seed(0)
    network = build_network(arch, 7, AttentionConfig(place=place, stages=stages), width=width).double()
    network.to(memory_format=torch.channels_last)
    images = torch.randn(3, 3, 20, 17, dtype=torch.float64)
    network(images)  # moves the batch norms' statistics
    network.train(training)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    expected = cifar_resnet_forward(state, images, depth, place, stages or (1, 2, 3), training)
    assert expected.std() > 0.01
    torch.testing.assert_close(network(images), expected)


def test_widened_stages_have_whole_channels():
    with torch.device("meta"):
        network = build_network("resnet20", 10, width=1.3)
        bottlenecks = build_network("resnet50", 10, width=0.125)
    assert [stage[-1].branch[3].out_channels for stage in network.stages] == [21, 42, 83]
    assert network.stem[0].out_channels == 21
    assert [stage[-1].branch[6].out_channels for stage in bottlenecks.stages] == [32, 64, 128, 256]


@pytest.mark.parametrize("place", [None, "before_addition", "after_addition"])
def test_place_of_attention(place):
    torch.manual_seed(0)
    block = build_network("resnet18", 10, AttentionConfig(place=place)).stages[1][0].eval()
    x = torch.randn(2, 64, 8, 8)
    branch, shortcut = block.branch(x), block.shortcut(x)
    before = torch.relu(block.attention(branch) + shortcut)
    after = block.attention(torch.relu(branch + shortcut))
    torch.testing.assert_close(block(x), after if place == "after_addition" else before)
    assert (before - after).abs().max() > 0.1


@pytest.mark.parametrize("stages", [(1,), (3, 4), (1, 2, 3, 4), None])
def test_attention_stands_in_the_chosen_stages_only(stages):
    with torch.device("meta"):
        network = build_network("resnet18", 10, AttentionConfig(stages=stages))
    for number, stage in enumerate(network.stages, start=1):
        for block in stage:
            assert isinstance(block.attention, nn.Identity) == (stages is not None and number not in stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention": AttentionConfig(stages=(0, 1))},
            r"^stages=\(0, 1\) must be one or more of 1, 2, 3, 4, each once",
        ),
        (
            {"attention": AttentionConfig(stages=(2, 2))},
            r"^stages=\(2, 2\) must be one or more of 1, 2, 3, 4, each once",
        ),
        ({"attention": AttentionConfig(stages=())}, r"^stages=\(\) must be one or more of 1, 2, 3, 4, each once$"),
        (
            {"attention": AttentionConfig(place="after_pool")},
            r"^place='after_pool' is not in the ResNets; use before_addition or after_addition$",
        ),
        ({"stem": "large"}, r"^stem='large' is unknown; use cifar or imagenet$"),
        (
            {"arch": "resnet20", "attention": AttentionConfig(stages=(3, 4))},
            r"^stages=\(3, 4\) must be one or more of 1, 2, 3, each once$",
        ),
        (
            {"arch": "resnet56", "stem": "imagenet"},
            r"^stem='imagenet' has no effect with arch='resnet56', whose stem is fixed; leave it out$",
        ),
        (
            {"width": 0.1},
            r"^width=0\.1 leaves 6 of the first stage's 64 channels; use at least 0\.125, which leaves 8$",
        ),
        (
            {"arch": "resnet20", "width": 0.4},
            r"^width=0\.4 leaves 6 of the first stage's 16 channels; use at least 0\.5, which leaves 8$",
        ),
        ({"width": -1.0}, r"^width=-1\.0 must be a positive number$"),
        ({"width": float("nan")}, r"^width=nan must be a positive number$"),
        ({"dropout": 0.5}, r"^dropout=0\.5 has no effect with arch='resnet18'"),
        ({"arch": "resnet19"}, r"^arch='resnet19' is unknown; did you mean resnet18\?$"),
        ({"arch": "vgg"}, r"^arch='vgg' is unknown; use one of cnn, resnet20,"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_network(**{"arch": "resnet18", "num_classes": 10, **options})
