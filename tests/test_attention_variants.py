"""ECA, BAM, the presets of other codes, further pools and descriptors, against definitions and other libraries."""

import copy
import itertools
import math

import pytest
import torch
from timm.layers.cbam import CbamModule
from timm.layers.eca import EcaModule
from torch import nn

from cbam_pl.attention import CBAM, AttentionConfig
from tests.attention_oracles import (
    assert_near,
    build,
    maps,
    slow_channel_logits,
    slow_conv,
    slow_linear,
    slow_norm,
    slow_pool,
)


@pytest.mark.parametrize("channels", [8, 24, 64])  # timm rounds 24 / 16 up to 2
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_timm_preset_is_timms_module(channels, training):
    ours, theirs = build(AttentionConfig(preset="timm"), channels), CbamModule(channels)
    with torch.no_grad():
        theirs.channel.fc1.weight.copy_(ours.channel.reduce.weight[:, :, None, None])
        theirs.channel.fc2.weight.copy_(ours.channel.expand.weight[:, :, None, None])
    theirs.spatial.conv.conv.load_state_dict(ours.spatial.conv.state_dict())
    theirs.spatial.conv.bn.load_state_dict(ours.spatial.norm.state_dict())
    x = maps(4, channels, 7, 6)
    assert_near(ours.train(training)(x), theirs.train(training)(x), "timm against timm's CbamModule")
    assert_near(ours.spatial.norm.running_var, theirs.spatial.conv.bn.running_var, "timm's running variance")


def test_presets_differ_where_their_sources_do():
    official = CBAM(64, preset="official")
    x = maps(2, 64, 7, 7)
    assert torch.equal(official.gates(x)["spatial"], torch.full((2, 1, 7, 7), 0.5))
    assert official.spatial.norm.momentum == 0.01
    assert official.spatial.norm.eps == 1e-5
    assert official.channel.reduce.bias.tolist() == [0.0] * 4
    timm = CBAM(64, preset="timm")
    assert (timm.spatial.norm.momentum, timm.spatial.norm.weight.item()) == (0.1, 1.0)
    assert CBAM(64, preset="keras").channel.reduce.out_features == 8


def test_single_option_beside_a_preset_wins():
    cbam = CBAM(64, preset="official", reduction=8, norm_weight=0.25, mlp_bias=False, kernel_size=3)
    assert cbam.channel.reduce.out_features == 8
    assert cbam.channel.reduce.bias is None
    assert cbam.spatial.norm.weight.item() == 0.25
    assert cbam.spatial.norm.momentum == 0.01
    assert cbam.spatial.conv.kernel_size == (3, 3)
    assert isinstance(CBAM(64, preset="official", norm=False).spatial.norm, nn.Identity)
    half = AttentionConfig("spatial", preset="official", descriptor="mean").build(64)
    assert half.conv.in_channels == 1
    assert half.norm.weight.item() == 0


@pytest.mark.parametrize(("channels", "kernel_size"), [(8, 3), (64, 3), (128, 5), (256, 5), (1024, 5), (2048, 7)])
def test_efficient_channel_attention_is_timms(channels, kernel_size):
    ours, theirs = build(AttentionConfig("eca"), channels), EcaModule(channels)
    assert ours.conv.kernel_size == (kernel_size,)
    theirs.conv.load_state_dict(ours.conv.state_dict())
    x = maps(2, channels, 3, 4)
    assert_near(ours(x), theirs(x), "eca against timm's EcaModule")


def test_efficient_channel_attention_is_its_equation():
    attention = build(AttentionConfig("eca", kernel_size=3), 5)
    x = maps(2, 5, 3, 4)
    left, middle, right = attention.conv.weight[0, 0].tolist()
    expected = torch.zeros_like(x)
    for b, c in itertools.product(range(2), range(5)):
        average = [float(x[b, k].sum()) / 12 if 0 <= k < 5 else 0.0 for k in (c - 1, c, c + 1)]
        logit = left * average[0] + middle * average[1] + right * average[2]
        expected[b, c] = x[b, c] / (1 + math.exp(-logit))
    assert_near(attention(x), expected, "eca against the equations")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_bottleneck_attention_is_its_definition(training):
    attention = build(AttentionConfig("bam", reduction=4), 8).train(training)
    x = maps(2, 8, 6, 5)
    slow = copy.deepcopy(attention)
    first, norm, _, last = slow.channel
    pooled = torch.tensor([[slow_pool(c.flatten().tolist(), "avg") for c in image] for image in x.double()])
    hidden = torch.tensor([slow_linear(vector, first) for vector in pooled.tolist()], dtype=torch.float64)
    hidden = slow_norm(hidden, norm).clamp(min=0)
    channel = torch.tensor([slow_linear(vector, last) for vector in hidden.tolist()], dtype=torch.float64)
    spatial = x.double()
    for layer in slow.spatial:
        if isinstance(layer, nn.Conv2d):
            spatial = slow_conv(spatial, layer, dilation=4)
        elif isinstance(layer, nn.BatchNorm2d):
            spatial = slow_norm(spatial, layer)
        else:
            spatial = spatial.clamp(min=0)
    expected = x * (1 + torch.sigmoid(channel[:, :, None, None] + spatial))
    assert_near(attention(x), expected, "bam against the equations")


POOL_CHOICES = [pools for n in range(1, 5) for pools in itertools.combinations(["avg", "max", "lse", "lp"], n)]


@pytest.mark.parametrize("pools", POOL_CHOICES, ids="+".join)
def test_each_choice_of_pools_is_summed_after_the_mlp(pools):
    attention = build(AttentionConfig("channel", pools=pools, mlp_bias=True, reduction=3), 8)
    for needs_gradient in (False, True):
        x = maps(2, 8, 3, 4).requires_grad_(needs_gradient)
        expected = x * torch.sigmoid(slow_channel_logits(x, attention, pools))
        assert_near(attention(x), expected, "channel with " + ", ".join(pools))


def test_learned_descriptor_is_its_definition():
    attention = build(AttentionConfig("spatial", descriptor="learned"))
    x = maps(2, 8, 5, 4)
    expected = x * torch.sigmoid(slow_conv(slow_conv(x.double(), attention.compress), attention.conv))
    assert_near(attention(x), expected, "spatial with learned")
