"""The ResNets: published parameter counts, equality with torchvision's, and where attention stands."""

import pytest
import torch
import torchvision
from torch import nn

from cbam_pl.attention import AttentionConfig
from cbam_pl.models import build_network

COUNTS = [
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
        ({"arch": "resnet19"}, r"^arch='resnet19' is unknown; use one of cnn, resnet18,"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_network(**{"arch": "resnet18", "num_classes": 10, **options})
