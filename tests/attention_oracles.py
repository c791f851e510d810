"""The attention modules' definitions, written the slow plain way, and what the tests of attention share."""

import itertools
import math

import pytest
import torch
from torch import nn

from cbam_pl.attention import AttentionConfig

PRESETS = ["paper", "official", "timm", "keras"]
KINDS = ["se", "channel", "spatial", "cbam", "eca", "bam"]
# Each branch of the code once: what gradients, compilation, export and layouts are tried on.
VARIANTS = {
    **{kind: AttentionConfig(kind) for kind in KINDS},
    **{preset: AttentionConfig(preset=preset) for preset in PRESETS[1:]},  # "cbam" is the paper's
    **{order: AttentionConfig(order=order) for order in ["spatial_channel", "parallel"]},
    "lse, lp": AttentionConfig("channel", pools=("lse", "lp"), mlp_bias=True),
    "learned": AttentionConfig("spatial", descriptor="learned", conv_bias=True),
    "mean": AttentionConfig("spatial", descriptor="mean", kernel_size=3, norm=True),
    "max": AttentionConfig("spatial", descriptor="max", kernel_size=5),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
# For what takes seconds: the fast lane tries three of them.
dear_variants = pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=() if name in ("se", "cbam", "learned") else pytest.mark.slow)
        for name, config in VARIANTS.items()
    ],
)
DESCRIPTORS = {"paper": ["mean", "max"], "official": ["max", "mean"], "timm": ["mean", "max"], "keras": ["mean", "max"]}


def build(config, channels=8, seed=0):
    """The attention with every parameter drawn at random, zeros and ones among them too."""
    generator = torch.Generator().manual_seed(seed)
    module = config.build(channels)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return module


def maps(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual, expected, name, tolerance=1e-6):
    difference = float((actual.double() - expected.double()).detach().abs().max())
    print(f"largest difference {name}: {difference:.1e}")
    assert difference <= tolerance


# The definitions, number by number.


def slow_pool(values, pool):
    if pool == "avg":
        return sum(values) / len(values)
    if pool == "max":
        return max(values)
    if pool == "lse":
        return math.log(sum(math.exp(v) for v in values))
    return math.sqrt(sum(v * v for v in values))


def slow_linear(vector, layer):
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    rows = zip(layer.weight.tolist(), bias, strict=True)
    return [sum(w * v for w, v in zip(row, vector, strict=True)) + b for row, b in rows]


def slow_channel_logits(x, attention, pools):
    """(B, C, H, W) → (B, C, 1, 1): the sum over pools of expand(relu(reduce(pool)))."""
    logits = []
    for image in x.double().tolist():
        total = [0.0] * len(image)
        for pool in pools:
            pooled = [slow_pool([v for row in channel for v in row], pool) for channel in image]
            hidden = [max(0.0, v) for v in slow_linear(pooled, attention.reduce)]
            total = [t + v for t, v in zip(total, slow_linear(hidden, attention.expand), strict=True)]
        logits.append(total)
    return torch.tensor(logits, dtype=torch.float64)[:, :, None, None]


def slow_conv(x, layer, dilation=1):
    """A convolution with zeros around the map, element by element. (B, C, H, W) → (B, O, H, W)."""
    batch, _, height, width = x.shape
    reach = layer.kernel_size[0] // 2
    out = torch.zeros(batch, layer.out_channels, height, width, dtype=torch.float64)
    steps = range(-reach, reach + 1)
    for b, o, i, j in itertools.product(range(batch), range(layer.out_channels), range(height), range(width)):
        total = 0.0 if layer.bias is None else layer.bias[o].double()
        for di, dj in itertools.product(steps, steps):
            row, column = i + dilation * di, j + dilation * dj
            if 0 <= row < height and 0 <= column < width:
                total += (layer.weight[o, :, di + reach, dj + reach].double() * x[b, :, row, column]).sum()
        out[b, o, i, j] = total
    return out.detach()


def slow_norm(x, layer):
    """Batch norm over all axes but the second."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
    if layer.training:
        mean, variance = x.mean(axes), x.var(axes, correction=0)
    else:
        mean, variance = layer.running_mean.double(), layer.running_var.double()
    scale = layer.weight.double() / torch.sqrt(variance + 1e-5)
    return ((x - mean.view(shape)) * scale.view(shape) + layer.bias.double().view(shape)).detach()


def slow_spatial_logits(x, attention, descriptor):
    x = x.detach().double()
    batch, channels, height, width = x.shape
    described = []
    for part in descriptor:
        plane = torch.zeros(batch, height, width, dtype=torch.float64)
        for b, i, j in itertools.product(range(batch), range(height), range(width)):
            values = [float(x[b, c, i, j]) for c in range(channels)]
            plane[b, i, j] = max(values) if part == "max" else sum(values) / channels
        described.append(plane)
    logits = slow_conv(torch.stack(described, 1), attention.conv)
    return slow_norm(logits, attention.norm) if isinstance(attention.norm, nn.BatchNorm2d) else logits


def slow_cbam(x, cbam, descriptor):
    x = x.detach().double()
    x = x * torch.sigmoid(slow_channel_logits(x, cbam.channel, ["avg", "max"]))
    return x * torch.sigmoid(slow_spatial_logits(x, cbam.spatial, descriptor))
