"""Every form of attention against its definition, written the slow plain way, or against an independent library.

The largest differences in docs/attention.md:  python -m pytest tests/test_attention.py -rP | grep "largest difference"
"""

import copy
import itertools
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import torchvision
from timm.layers.cbam import CbamModule
from timm.layers.eca import EcaModule
from torch import nn

from cbam_pl.attention import (
    BAM,
    CBAM,
    AttentionConfig,
    ChannelAttention,
    EfficientChannelAttention,
    SpatialAttention,
    SqueezeExcitation,
)

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


# Equal to the definitions.

DESCRIPTORS = {"paper": ["mean", "max"], "official": ["max", "mean"], "timm": ["mean", "max"], "keras": ["mean", "max"]}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_its_definition(preset, training):
    cbam = build(AttentionConfig(preset=preset), channels=32).train(training)
    x = maps(2, 32, 5, 4).requires_grad_(training)  # maxima are found in another way where a gradient is wanted
    expected = slow_cbam(x, copy.deepcopy(cbam), DESCRIPTORS[preset])
    assert_near(cbam(x), expected, f"{preset} against the equations")


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


def test_squeeze_excitation_is_torchvisions():
    ours = build(AttentionConfig("se", mlp_bias=True), 32)
    theirs = torchvision.ops.SqueezeExcitation(32, 2)
    with torch.no_grad():
        for mine, other in [(ours.reduce, theirs.fc1), (ours.expand, theirs.fc2)]:
            other.weight.copy_(mine.weight[:, :, None, None])
            other.bias.copy_(mine.bias)
    x = maps(4, 32, 5, 6)
    assert_near(ours(x), theirs(x), "se against torchvision's SqueezeExcitation")


def test_squeeze_excitation_is_its_equation():
    attention = build(AttentionConfig("se"), 32)
    x = maps(2, 32, 3, 4)
    expected = x * torch.sigmoid(slow_channel_logits(x, attention, ["avg"]))
    assert_near(attention(x), expected, "se against the equations")


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


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_all_forms_of_the_shared_mlp_are_one(bias):
    attention = build(AttentionConfig("channel", mlp_bias=bias, reduction=4), 16)
    reduce, expand = attention.reduce, attention.expand
    x = maps(3, 16, 4, 5)
    average, maximum = x.mean((2, 3)), x.amax((2, 3))

    def mlp(pooled):
        return expand(torch.relu(reduce(pooled)))

    dense = mlp(average) + mlp(maximum)
    stacked = mlp(torch.stack([average, maximum])).sum(0)
    tiled_weight = torch.block_diag(reduce.weight, reduce.weight)  # one wide MLP on both pools side by side
    tiled_bias = [None, None] if not bias else [reduce.bias.tile(2), 2 * expand.bias]
    wide = torch.relu(F.linear(torch.cat([average, maximum], 1), tiled_weight, tiled_bias[0]))
    tiled = F.linear(wide, expand.weight.tile(2), tiled_bias[1])

    def pointwise(pooled):
        hidden = torch.relu(F.conv2d(pooled[:, :, None, None], reduce.weight[:, :, None, None], reduce.bias))
        return F.conv2d(hidden, expand.weight[:, :, None, None], expand.bias)[:, :, 0, 0]

    convolved = pointwise(average) + pointwise(maximum)
    logits = attention.logits(x)[:, :, 0, 0]
    for name, form in {"dense": dense, "stacked": stacked, "tiled": tiled, "1×1": convolved}.items():
        assert_near(logits, form, f"channel against the {name} form", tolerance=2e-6)  # logits reach 4


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("descriptor", ["mean_max", "max_mean", "mean", "max"])
def test_spatial_attention_is_its_definition(descriptor, kernel_size):
    attention = build(AttentionConfig("spatial", descriptor=descriptor, kernel_size=kernel_size, conv_bias=True))
    for needs_gradient in (False, True):
        x = maps(2, 6, 5, 4).requires_grad_(needs_gradient)
        expected = x * torch.sigmoid(slow_spatial_logits(x, attention, descriptor.split("_")))
        assert_near(attention(x), expected, f"spatial with {descriptor}")


def test_learned_descriptor_is_its_definition():
    attention = build(AttentionConfig("spatial", descriptor="learned"))
    x = maps(2, 8, 5, 4)
    expected = x * torch.sigmoid(slow_conv(slow_conv(x.double(), attention.compress), attention.conv))
    assert_near(attention(x), expected, "spatial with learned")


def test_each_order_is_what_it_says():
    x = maps(2, 8, 5, 4)
    channel = build(AttentionConfig("channel"), seed=2)
    spatial = build(AttentionConfig("spatial"), seed=3)
    expected = {
        "channel_spatial": spatial(channel(x)),
        "spatial_channel": channel(spatial(x)),
        "parallel": x * torch.sigmoid(channel.logits(x) + spatial.logits(x)),
        "channel": channel(x),
        "spatial": spatial(x),
    }
    for order, output in expected.items():
        cbam = CBAM(8, order=order)
        if order != "spatial":
            cbam.channel.load_state_dict(channel.state_dict())
        if order != "channel":
            cbam.spatial.load_state_dict(spatial.state_dict())
        assert_near(cbam(x), output, f"cbam in the order {order}", tolerance=0)
    for one, other in itertools.combinations(expected.values(), 2):
        assert (one - other).abs().max() > 0.01


@variants
def test_forward_is_the_input_times_every_gate(config):
    attention = build(config).eval()
    x = maps(3, 8, 6, 5)
    gates = attention.gates(x)
    product = x
    for name, gate in gates.items():
        assert gate.shape == {"channel": (3, 8, 1, 1), "spatial": (3, 1, 6, 5), "joint": (3, 8, 6, 5)}[name]
        low = 1 if config.kind == "bam" else 0
        assert low < gate.min() <= gate.max() < low + 1
        product = product * gate
    torch.testing.assert_close(attention(x), product, rtol=0, atol=0)


# Options.


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


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({"channels": 64}, 4),
        ({"channels": 8, "reduction": 16}, 1),
        ({"channels": 8, "reduction": 8, "min_hidden": 0}, 1),
        ({"channels": 64, "min_hidden": 6}, 6),
        ({"channels": 31}, 1),
        ({"channels": 24, "rounding": "nearest"}, 2),
        ({"channels": 23, "rounding": "nearest"}, 1),
    ],
)
def test_hidden_width(options, hidden):
    assert ChannelAttention(**options).reduce.out_features == hidden
    assert SqueezeExcitation(**options).reduce.out_features == hidden


PARAMETERS_AT_64 = {
    "paper": (AttentionConfig(), 64 * 4 * 2 + 98),
    "official": (AttentionConfig(preset="official"), 64 * 4 * 2 + 4 + 64 + 98 + 2),
    "timm": (AttentionConfig(preset="timm"), 64 * 4 * 2 + 98 + 2),
    "keras": (AttentionConfig(preset="keras"), 64 * 8 * 2 + 8 + 64 + 98),
    "channel": (AttentionConfig("channel"), 512),
    "spatial": (AttentionConfig("spatial"), 98),
    "se": (AttentionConfig("se"), 512),
    "eca": (AttentionConfig("eca"), 3),
    # Two linear layers and their norm; 1×1, two 3×3 and 1×1 convolutions and three norms.
    "bam": (AttentionConfig("bam"), 260 + 8 + 320 + 260 + 2 * 148 + 5 + 3 * 8),
    "parallel": (AttentionConfig(order="parallel"), 610),
    "learned": (AttentionConfig(descriptor="learned"), 512 + 64 + 49),
}


@pytest.mark.parametrize(("config", "count"), PARAMETERS_AT_64.values(), ids=PARAMETERS_AT_64)
def test_parameter_count(config, count):
    assert sum(parameter.numel() for parameter in config.build(64).parameters()) == count


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChannelAttention(0), r"^channels=0 must be at least 1$"),
        (lambda: CBAM(0, order="spatial"), r"^channels=0 must be at least 1$"),
        (lambda: BAM(0), r"^channels=0 must be at least 1$"),
        (lambda: EfficientChannelAttention(-1), r"^channels=-1 must be at least 1$"),
        (lambda: SpatialAttention(descriptor="learned", channels=0), r"^channels=0 must be at least 1$"),
        (lambda: SqueezeExcitation(8, reduction=0), r"^reduction=0 must be at least 1$"),
        (lambda: ChannelAttention(8, min_hidden=-1), r"^min_hidden=-1 must be at least 0$"),
        (
            lambda: ChannelAttention(8, reduction=16, min_hidden=0),
            r"^reduction=16 leaves no hidden unit for channels=8 with min_hidden=0; use a reduction of at most 8",
        ),
        (lambda: ChannelAttention(8, rounding="up"), r"^rounding='up' is unknown; use one of down, nearest$"),
        (lambda: ChannelAttention(8, pools=()), r"^pools=\(\) must be a list of one or more of avg, max, lse, lp"),
        (lambda: ChannelAttention(8, pools="avg"), r"^pools='avg' must be a list"),
        (lambda: ChannelAttention(8, pools=("avg", "avg")), r"^pools=\('avg', 'avg'\) must .* each once$"),
        (lambda: CBAM(8, pools=("min",)), r"^pools='min' is unknown; use one of avg, max, lse, lp$"),
        (lambda: SpatialAttention(4), r"^kernel_size=4 must be odd and at least 1"),
        (lambda: CBAM(8, kernel_size=-1), r"^kernel_size=-1 must be odd and at least 1"),
        (lambda: EfficientChannelAttention(8, 2), r"^kernel_size=2 must be odd and at least 1"),
        (lambda: SpatialAttention(descriptor="min"), r"^descriptor='min' is unknown; use one of mean_max, max_mean"),
        (lambda: SpatialAttention(descriptor="learned"), r"^channels=None must be given with descriptor='learned'$"),
        (lambda: SpatialAttention(channels=8), r"^channels=8 has no effect with descriptor='mean_max'; leave it out$"),
        (lambda: SpatialAttention(norm_weight=0.0), r"^norm_weight=0.0 has no effect with norm=False; leave it out$"),
        (lambda: CBAM(8, norm_momentum=0.1), r"^norm_momentum=0.1 has no effect with norm=False; leave it out$"),
        (lambda: CBAM(8, order="both"), r"^order='both' is unknown; use one of channel_spatial, spatial_channel, par"),
        (lambda: CBAM(8, order="channel", kernel_size=3), r"^kernel_size=3 has no effect with order='channel'; leave"),
        (lambda: CBAM(8, preset="torch"), r"^preset='torch' is unknown; use one of paper, official, timm, keras$"),
        (lambda: AttentionConfig("cbma"), r"^kind='cbma' is unknown; use one of none, se, channel, spatial, cbam, e"),
        (lambda: AttentionConfig(preset="torch"), r"^preset='torch' is unknown; use one of paper, official, timm, k"),
        (lambda: AttentionConfig("se", preset="timm"), r"^preset='timm' has no effect with kind='se'; leave it out$"),
        (lambda: AttentionConfig("none", stages=(1,)), r"^stages=\(1,\) has no effect with kind='none'; leave it out$"),
        (lambda: AttentionConfig(place="inside"), r"^place='inside' is unknown; use one of before_addition, after_ad"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# A value for every option, and the kinds that have a use for it.
MLP_KINDS = {"se", "channel", "cbam"}
OPTIONS = {
    "order": ("parallel", {"cbam"}),
    "reduction": (4, MLP_KINDS | {"bam"}),
    "pools": (("max",), {"channel", "cbam"}),
    "min_hidden": (6, MLP_KINDS | {"bam"}),
    "rounding": ("nearest", MLP_KINDS),
    "mlp_bias": (True, MLP_KINDS),
    "kernel_size": (5, {"spatial", "cbam", "eca"}),
    "descriptor": ("max", {"spatial", "cbam"}),
    "conv_bias": (True, {"spatial", "cbam"}),
    "norm": (True, {"spatial", "cbam"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_has_its_effect_or_is_refused(option):
    value, kinds = OPTIONS[option]
    for kind in ["none", *KINDS]:
        if kind not in kinds:
            with pytest.raises(ValueError, match=rf"^{option}=.* has no effect with kind='{kind}'; leave it out"):
                AttentionConfig(kind, **{option: value})
            continue
        made = []
        for options in ({option: value}, {}):
            torch.manual_seed(0)
            made.append(AttentionConfig(kind, **options).build(40))  # 2.5 sixteenths, rounded down or up
        shapes = [{name: p.shape for name, p in attention.named_parameters()} for attention in made]
        x = maps(2, 40, 5, 5)
        assert shapes[0] != shapes[1] or not torch.equal(made[0](x), made[1](x)), kind


def test_config_none_is_the_identity():
    assert isinstance(AttentionConfig("none").build(8), nn.Identity)


# Safe.


@variants
def test_gradients_are_those_of_finite_differences(config):
    attention = build(config, channels=4).double()
    x = maps(2, 4, 3, 3).double().requires_grad_()
    names = [name for name, _ in attention.named_parameters()]

    def call(x, *values):
        parameters = dict(zip(names, values, strict=True))
        # Without the running statistics, which each call would move.
        return torch.func.functional_call(attention, parameters, (x,))

    parameters = [parameter.detach().requires_grad_() for parameter in attention.parameters()]
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True)


@variants
def test_bfloat16_autocast_stays_within_its_rounding(config):
    attention = build(config).eval()
    x = maps(4, 8, 6, 6)
    exact = attention(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = attention(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    # 2⁻⁸ is half a unit in the last place; logits of up to 4, gates and the product are rounded a few times each.
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-6, atol=2**-6)


def test_float16_does_not_overflow():
    cbam = build(AttentionConfig(), 4)
    x = torch.full((1, 4, 64, 64), 20.0, dtype=torch.float16)  # sums to 81,920 a channel, above 65,504
    expected = cbam(x.float())
    torch.testing.assert_close(cbam.half()(x).float(), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("tied", ["zeros", "constant", "ties"])
@variants
def test_gradients_are_finite_where_maxima_tie(config, tied):
    attention = build(config)
    x = {"zeros": torch.zeros(2, 8, 4, 4), "constant": torch.full((2, 8, 4, 4), 3.0), "ties": maps(2, 8, 4, 4).round()}
    x = x[tied].requires_grad_()
    attention(x).square().sum().backward()
    assert x.grad.isfinite().all()
    for name, parameter in attention.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig("channel"),
        AttentionConfig("channel", pools=("max",)),
        AttentionConfig("spatial", kernel_size=1),
        AttentionConfig("spatial", kernel_size=1, descriptor="max"),
    ],
)
def test_gradient_at_ties_is_shared_out_once(config):
    """Whoever of the tied gets it: the gradients of one maximum sum to that of the maximum."""
    attention = build(config, channels=4).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.abs_()  # so that no ReLU is shut
    x = torch.full((1, 4, 3, 3), 2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention.logits(x).sum(), x)
    # Raising the whole constant map raises every maximum alike.
    step = 1e-6
    rise = (attention.logits(x + step).sum() - attention.logits(x - step).sum()) / (2 * step)
    assert gradient.sum().item() == pytest.approx(rise.item(), rel=1e-6)
    assert rise.item() > 0.1


def test_gradient_among_tied_channels_is_that_of_amax():
    spatial = build(AttentionConfig("spatial", kernel_size=1), channels=4).double()
    x = maps(2, 4, 3, 3).double().round().requires_grad_()  # of small whole numbers, some tie and some do not
    (gradient,) = torch.autograd.grad(spatial.logits(x).sum(), x)
    of_mean, of_maximum = spatial.conv.weight.flatten()
    (expected,) = torch.autograd.grad((of_mean * x.mean(1) + of_maximum * x.amax(1)).sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert len(gradient.unique()) > 2  # the mean's share alone, and more where there is one maximum or a tie


@variants
def test_gradients_that_come_in_another_layout(config):
    attention = build(config)
    x = maps(2, 8, 5, 3).requires_grad_()
    incoming = maps(2, 8, 3, 5).transpose(2, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = attention(x.to(memory_format=layout))
        gradients = [
            torch.autograd.grad(y, x, gradient, retain_graph=True)[0] for gradient in (incoming, incoming.contiguous())
        ]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_gradients_of_each_image_alone():
    cbam = build(AttentionConfig())
    images = maps(3, 8, 5, 5)
    parameters = dict(cbam.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(cbam, parameters, (image[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for index, image in enumerate(images):
        alone = torch.autograd.grad(loss(parameters, image), parameters.values())
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(together[name][index], gradient, rtol=1e-4, atol=1e-5)


@variants
def test_deterministic_mode_runs_and_repeats(config):
    attention = build(config)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            x = maps(4, 8, 6, 6).requires_grad_()
            y = copy.deepcopy(attention)(x)
            y.square().sum().backward()
            results.append((y, x.grad))
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def compiled_agrees(config, backend):
    """Forward and backward over three batch sizes; returns the number of graphs."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    attention = build(config)
    twin = copy.deepcopy(attention)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    for batch in (4, 6, 9):
        x = maps(batch, 8, 6, 5).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        z = x.detach().clone().requires_grad_()
        y, expected = compiled(x), twin(z)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    return counter.frame_count


@variants
def test_compiles_to_one_graph_for_all_batch_sizes(config):
    assert compiled_agrees(config, "aot_eager") == 1


def test_compiled_code_gives_the_same_numbers():
    assert compiled_agrees(AttentionConfig(preset="official"), "inductor") == 1


@variants
def test_exports_with_any_batch_and_map(config):
    attention = build(config).eval()
    dim = torch.export.Dim
    shapes = ({0: dim("batch", min=2, max=64), 2: dim("height", min=2, max=64), 3: dim("width", min=2, max=64)},)
    exported = torch.export.export(attention, (maps(3, 8, 6, 5),), dynamic_shapes=shapes).module()
    for shape in [(3, 8, 6, 5), (5, 8, 9, 4)]:
        x = maps(*shape)
        torch.testing.assert_close(exported(x), attention(x), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:copyreg", "ignore::DeprecationWarning:onnxscript")
@variants
def test_onnx_agrees(config, tmp_path):
    pytest.importorskip("onnxscript", reason="the optional extra onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the optional extra onnx")
    attention = build(config).eval()
    path = tmp_path / "attention.onnx"
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.onnx.export(attention, (maps(3, 8, 6, 5),), path, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(path)
    for size in (3, 5):
        x = maps(size, 8, 6, 5)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), attention(x).detach(), rtol=0, atol=1e-5)


@variants
def test_memory_format_is_kept(config):
    attention = build(config).eval()
    x = maps(3, 8, 6, 5).requires_grad_()
    expected = attention(x)
    assert expected.is_contiguous()
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for module in (attention, attention.to(memory_format=torch.channels_last)):
        z = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        y = module(z)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), z)[0], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 5, 5), (3, 8, 1, 1), (1, 8, 1, 1), (2, 8, 2, 3), (2, 8, 1, 6)], ids=str)
@variants
def test_small_input_agrees_with_the_same_inside_a_larger_batch(config, shape):
    """Batch of one, 1×1 maps, kernels larger than the map: each image alone, against it among others."""
    attention = build(config).eval()
    x = maps(*shape)
    y = attention(x)
    assert y.shape == shape
    crowd = attention(torch.cat([maps(4, *shape[1:], seed=5), x]))[4:]
    torch.testing.assert_close(y, crowd, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("shape", [(1, 32, 1, 1), (1, 32, 2, 3)], ids=str)
def test_small_input_is_the_definition(preset, shape):
    cbam = build(AttentionConfig(preset=preset), 32).eval()
    x = maps(*shape)
    assert_near(cbam(x), slow_cbam(x, cbam, DESCRIPTORS[preset]), f"{preset} on a small map")


@variants
def test_empty_batch(config):
    attention = build(config)
    x = torch.zeros(0, 8, 4, 4, requires_grad=True)
    for mode in (True, False):
        y = attention.train(mode)(x)
        assert y.shape == (0, 8, 4, 4)
    y.sum().backward()
    assert x.grad.shape == (0, 8, 4, 4)
    for parameter in attention.parameters():
        assert not parameter.grad.any()


def test_copies_do_not_share_state():
    cbam = build(AttentionConfig(preset="official"))
    twin = copy.deepcopy(cbam)
    before = copy.deepcopy(twin.state_dict())
    cbam(maps(4, 8, 6, 6))
    assert not torch.equal(cbam.spatial.norm.running_mean, before["spatial.norm.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.attention.kind", "cbma"], "kind"),
        (["--model.attention.preset", "torch"], "preset"),
        (["--model.attention.order", "both"], "order"),
        (["--model.attention.pools", "[avg, min]"], "pools"),
        (["--model.attention.kernel_size", "4"], "kernel_size=4 must be odd and at least 1"),
        (["--model.attention.reduction", "64", "--model.attention.min_hidden", "0"], "reduction=64 leaves no hidden"),
        (["--model.attention.kind", "se", "--model.attention.kernel_size", "5"], "kernel_size=5 has no effect"),
        (["--model.attention.stages", "[3, 4]"], "stages=(3, 4) has no effect in the cnn"),
    ],
)
def test_bad_option_on_the_command_line_is_status_2(command, recipe, options, message):
    outcome = command("fit", "--config", recipe, *options)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert "Traceback" not in outcome.err
