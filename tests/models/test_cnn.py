"""The small CNN: its parameter counts, where attention stands, and its forward pass written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbam_pl.attention import AttentionConfig
from cbam_pl.models import build_network

COUNTS = {"none": 1_147_914, "se": 1_150_602, "cbam": 1_150_896, "eca": 1_147_914 + 3 + 3 + 5}


@pytest.mark.parametrize("kind", COUNTS)
def test_parameter_count(kind):
    with torch.device("meta"):
        network = build_network("cnn", 10, kind)
    assert sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad) == COUNTS[kind]


@pytest.mark.parametrize(("width", "channels"), [(0.25, (8, 16, 32)), (1.3, (42, 83, 166)), (2, (64, 128, 256))])
def test_width_multiplies_the_channels(width, channels):
    network = build_network("cnn", 10, "none", width=width)
    expected, before = 512 * channels[-1] * 16 + 512 + 512 * 10 + 10, 3  # the linear layers
    for after in channels:
        expected += 9 * before * after + after + 2 * after  # convolution with bias, batch norm
        before = after
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    assert network(torch.randn(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("config", "before_pool"),
    [
        (AttentionConfig("se"), True),
        (AttentionConfig("eca"), True),
        (AttentionConfig("cbam"), False),
        (AttentionConfig("bam"), False),
        (AttentionConfig("cbam", place="before_pool"), True),
        (AttentionConfig("se", place="after_pool"), False),
    ],
    ids=lambda value: f"{value.kind} {value.place}" if isinstance(value, AttentionConfig) else "",
)
def test_forward_pass_written_out(config, before_pool):
    torch.manual_seed(0)
    network = build_network("cnn", 7, config, image_size=16).eval()
    images = torch.randn(2, 3, 16, 16)
    x = images
    for block in network.blocks:
        x = F.conv2d(x, block.conv.weight, block.conv.bias, padding=1)
        x = torch.relu(block.norm(x))
        x = F.max_pool2d(block.attention(x), 2) if before_pool else block.attention(F.max_pool2d(x, 2))
    hidden = torch.relu(network.classifier[1](x.flatten(1)))
    torch.testing.assert_close(network(images), network.classifier[4](hidden))


@pytest.mark.parametrize(("given", "share"), [({}, 0.5), ({"dropout": 0.25}, 0.25), ({"dropout": 0.0}, 0.0)])
def test_training_leaves_out_that_share_of_the_hidden_units(given, share):
    network = build_network("cnn", 10, "none", **given)
    seen = []  # by the last layer
    network.classifier[-1].register_forward_pre_hook(lambda _, inputs: seen.append(*inputs))
    images = torch.rand(64, 3, 32, 32)
    torch.nn.init.ones_(network.classifier[1].bias)  # the ReLU's output is 1 everywhere
    torch.nn.init.zeros_(network.classifier[1].weight)
    network(images)
    network.eval()(images)
    trained, evaluated = seen
    assert (trained == 0).float().mean() == pytest.approx(share, abs=0.02)
    torch.testing.assert_close(trained[trained != 0] * (1 - share), evaluated[trained != 0])


def test_none_is_the_network_without_attention():
    network = build_network("cnn", 10, "none")
    assert all(isinstance(block.attention, nn.Identity) for block in network.blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "cbma"}, r"^kind='cbma' is unknown; use one of none, se, channel"),
        (
            {"attention": AttentionConfig(place="after_addition")},
            r"^place='after_addition' is not in the cnn; use before_pool or after_pool$",
        ),
        ({"attention": AttentionConfig(stages=(3, 4))}, r"^stages=\(3, 4\) has no effect in the cnn"),
        ({"attention": AttentionConfig(kernel_size=4)}, r"^kernel_size=4 must be odd"),
        ({"stem": "imagenet"}, r"^stem='imagenet' has no effect with arch='cnn'"),
        ({"image_size": 7}, r"^image_size=7 leaves nothing after three poolings; use at least 8$"),
        ({"dropout": 1.0}, r"^dropout=1\.0 must be at least 0 and below 1$"),
        ({"dropout": -0.1}, r"^dropout=-0\.1 must be at least 0 and below 1$"),
        ({"width": 0.2}, r"^width=0\.2 leaves 6 of the first stage's 32 channels; use at least 0\.25, which leaves 8$"),
        ({"width": 1e18}, r"^width=1e\+18 gives the last stage more than 65,536 channels; use at most 512\.0$"),
        ({"width": 0.0}, r"^width=0\.0 must be a positive number$"),
        ({"num_classes": 0}, r"^num_classes=0 must be at least 1$"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_network("cnn", **{"num_classes": 10, **options})
