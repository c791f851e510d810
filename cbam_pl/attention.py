"""CBAM as in its paper, its two halves, and squeeze-and-excitation: each multiplies its input by gates in (0, 1).

Every module here has `gates(x)`, the gates by name, and `forward(x)`, which is x times each of them. The sources:

    CBAM    Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018, arXiv:1807.06521
    SE      Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, arXiv:1709.01507
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cbam_pl.attention_parts import (
    Gate,
    IdentityStart,
    MapConv2d,
    check_at_least,
    check_odd,
    check_one_of,
    hidden_width,
    in_float32_on_cpu,
    mean,
    mean_and_max,
    reject_unused,
)
from cbam_pl.attention_variants import BAM, FURTHER_DESCRIPTORS, FURTHER_POOLS, EfficientChannelAttention

AttentionKind = Literal["none", "se", "channel", "spatial", "cbam", "eca", "bam"]
Preset = Literal["paper", "official", "timm", "keras"]
Order = Literal["channel_spatial", "spatial_channel", "parallel", "channel", "spatial"]
Pool = Literal["avg", "max", "lse", "lp"]
Rounding = Literal["down", "nearest"]
Descriptor = Literal["mean_max", "max_mean", "mean", "max", "learned"]
Start = Literal["paper", "identity"]
Place = Literal["before_addition", "after_addition", "before_pool", "after_pool"]

_POOLS = {"avg": lambda x: mean(x, (2, 3)), "max": lambda x: x.amax((2, 3), keepdim=True), **FURTHER_POOLS}


class ChannelAttention(Gate):
    """Which channels matter: x · sigmoid(MLP(avg(x)) + MLP(max(x))), with one MLP shared by the pools.

    Source: arXiv:1807.06521, equation 2.

    Args:
        channels: channels of the input.
        reduction: channels per hidden unit of the MLP.
        pools: the poolings over the map, any of avg, max, lse (log Σ exp(x)), lp ((Σ x²)^½), each once.
        min_hidden: least hidden width: with 1, channels=8 and reduction=16 work, with one hidden unit.
        rounding: of channels / reduction, down or to the nearest (half upwards).
        bias: whether both layers of the MLP have a bias, which starts at zero.

    Shape:
        x (B, C, H, W) → (B, C, H, W); gate (B, C, 1, 1).

    Raises:
        ValueError: a number out of its range, an unknown or repeated pool, or no hidden unit left.
    """

    gate_name = "channel"

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        pools: Sequence[Pool] = ("avg", "max"),
        min_hidden: int = 1,
        rounding: Rounding = "down",
        bias: bool = False,
    ) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction, min_hidden, rounding)
        if not pools or isinstance(pools, str) or len(set(pools)) < len(pools):
            raise ValueError(f"pools={pools!r} must be a list of one or more of {', '.join(_POOLS)}, each once")
        for pool in pools:
            check_one_of(_POOLS, pools=pool)
        self.pools = tuple(pools)
        self.reduce = nn.Linear(channels, hidden, bias)
        self.expand = nn.Linear(hidden, channels, bias)
        if bias:  # starts at zero, as in the authors' and the Keras code
            nn.init.zeros_(self.reduce.bias)
            nn.init.zeros_(self.expand.bias)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) → x itself, and MLP(avg) + MLP(max), (B, C, 1, 1)."""
        if set(self.pools) == {"avg", "max"}:
            x, *pooled = mean_and_max(x, (2, 3))  # in either order, since they are summed
        else:
            pooled = [_POOLS[pool](x) for pool in self.pools]
        hidden = torch.relu(self.reduce(torch.stack(pooled).flatten(2)))  # (pools, B, hidden)
        # Back to the map's type: autocast on CUDA sums in float32, in which all that follows the gate would be as well.
        return x, self.expand(hidden).sum(0).to(x.dtype)[:, :, None, None]


class SqueezeExcitation(ChannelAttention):
    """Channel attention from the average alone: x · sigmoid(MLP(avg(x))).

    Source: arXiv:1709.01507, equations 2 to 4, which have no bias; torchvision's SqueezeExcitation has one. Arguments,
    shapes and errors are those of ChannelAttention.
    """

    def __init__(
        self, channels: int, reduction: int = 16, min_hidden: int = 1, rounding: Rounding = "down", bias: bool = False
    ) -> None:
        super().__init__(channels, reduction, ("avg",), min_hidden, rounding, bias)


class SpatialAttention(Gate):
    """Which places matter: x · sigmoid(conv([mean(x); max(x)])), the mean and the maximum across channels.

    Source: arXiv:1807.06521, equation 3, and section 4.1 for the learned descriptor, a 1×1 convolution to one channel.

    Args:
        kernel_size: side of the convolution's kernel, odd; it may exceed the map.
        descriptor: what the convolution sees of the channels: mean_max, max_mean, mean, max or learned.
        bias: whether the convolution has a bias, which starts at zero.
        norm: whether batch norm follows the convolution; it cannot train on a batch of one 1×1 map.
        norm_weight: initial value of the batch norm's weight; None: 1.
        norm_momentum: share of a new batch in the batch norm's running statistics; None: 0.1.
        channels: channels of the input, for the learned descriptor; the others work with any number.

    Shape:
        x (B, C, H, W) → (B, C, H, W); gate (B, 1, H, W).

    Raises:
        ValueError: an even kernel_size, an unknown descriptor, or an option that has no effect beside the others.
    """

    gate_name = "spatial"

    def __init__(
        self,
        kernel_size: int = 7,
        descriptor: Descriptor = "mean_max",
        bias: bool = False,
        norm: bool = False,
        norm_weight: float | None = None,
        norm_momentum: float | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        check_odd(kernel_size)
        check_one_of(get_args(Descriptor), descriptor=descriptor)
        if not norm:
            reject_unused((), {"norm_weight": norm_weight, "norm_momentum": norm_momentum}, "norm=False")
        if descriptor != "learned":
            reject_unused((), {"channels": channels}, f"descriptor={descriptor!r}")
        elif channels is None:
            raise ValueError("channels=None must be given with descriptor='learned'")
        else:
            check_at_least(1, channels=channels)
            self.compress = nn.Conv2d(channels, 1, 1, bias=False)
        self.descriptor = descriptor
        in_channels = 2 if descriptor in ("mean_max", "max_mean") else 1
        self.conv = MapConv2d(in_channels, 1, kernel_size, padding=kernel_size // 2, bias=bias)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.norm: nn.Module = nn.Identity()
        if norm:
            self.norm = nn.BatchNorm2d(1, momentum=0.1 if norm_momentum is None else norm_momentum)
            nn.init.constant_(self.norm.weight, 1.0 if norm_weight is None else norm_weight)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) → x itself, and conv([mean; max]), (B, 1, H, W)."""
        if self.descriptor == "learned":
            described = self.compress(x)
        elif self.descriptor in FURTHER_DESCRIPTORS:
            described = FURTHER_DESCRIPTORS[self.descriptor](x)
        else:
            x, average, maximum = mean_and_max(x, (1,))
            parts = [average, maximum] if self.descriptor == "mean_max" else [maximum, average]
            # channels_last, in which the backward of so narrow a convolution is several times faster.
            described = torch.stack([part[:, 0] for part in parts], 3).permute(0, 3, 1, 2)  # (B, 2, H, W)
        return x, self.norm(self.conv(described))


class CBAM(nn.Module):
    """Channel attention, then spatial attention on its result, or another order of the two.

    Source: arXiv:1807.06521, equation 1; for the presets, which set the form and not the weights' random start, see
    docs/attention.md. The order "parallel" is x · sigmoid(channel logits + spatial logits), both of x, as BAM joins its
    branches (arXiv:1807.06514, equation 2); the CBAM paper does not say how its parallel arrangement (table 3) joins
    them.

    Args:
        channels: channels of the input.
        reduction: channels per hidden unit of the MLP.
        kernel_size: side of the convolution's kernel, odd.
        order: channel_spatial, spatial_channel, parallel, or channel or spatial, which are one half alone.
        preset: paper, official, timm or keras: the value of each option that is None or not given.
        options: any of pools, min_hidden, rounding, mlp_bias, descriptor, conv_bias, norm, norm_weight and
            norm_momentum, as in AttentionConfig.

    Shape:
        x (B, C, H, W) → (B, C, H, W).

    Raises:
        ValueError or TypeError: an option that is unknown, out of its range, or without effect beside the others.
    """

    def __init__(
        self,
        channels: int,
        reduction: int | None = None,
        kernel_size: int | None = None,
        order: Order | None = None,
        *,
        preset: Preset = "paper",
        **options: Any,
    ) -> None:
        super().__init__()
        check_at_least(1, channels=channels)
        check_one_of(_PRESETS, preset=preset)
        for name in options.keys() - set(_OPTIONS["cbam"]):
            raise TypeError(f"CBAM got an unexpected keyword argument {name!r}")
        options |= {"reduction": reduction, "kernel_size": kernel_size, "order": order}
        given = {name: value for name, value in options.items() if value is not None}
        defaults = _PRESETS[preset].given(_OPTIONS["cbam"])
        if not given.get("norm", True):  # switches the details of the preset's batch norm off too
            defaults = {name: value for name, value in defaults.items() if name not in ("norm_weight", "norm_momentum")}
        options = {"order": "channel_spatial", **defaults, **given}
        self.order: Order = options["order"]
        check_one_of(get_args(Order), order=self.order)
        if self.order in ("channel", "spatial"):
            reject_unused(("order", *_OPTIONS[self.order]), given, f"order={self.order!r}")
        if self.order != "spatial":
            self.channel = ChannelAttention(channels, **_arguments(options, _CHANNEL_OPTIONS))
        if self.order != "channel":
            learned = channels if options.get("descriptor") == "learned" else None
            self.spatial = SpatialAttention(**_arguments(options, _SPATIAL_OPTIONS), channels=learned)

    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """The gates in (0, 1), in their order: channel (B, C, 1, 1) and spatial (B, 1, H, W), or joint (B, C, H, W)."""
        return self._apply_gates(x)[1]

    @in_float32_on_cpu
    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, C, H, W)."""
        return self._apply_gates(x)[0]

    def _apply_gates(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.order == "parallel":
            gate = torch.sigmoid(self.channel.logits(x)[1] + self.spatial.logits(x)[1])  # (B, C, H, W)
            return x * gate, {"joint": gate}
        gates = {}
        for name in self.order.split("_"):
            x, logits = getattr(self, name).logits(x)
            gates[name] = torch.sigmoid(logits)
            x = x * gates[name]  # the second half sees what the first one let through
        return x, gates


_MLP_OPTIONS = ("reduction", "min_hidden", "rounding", "mlp_bias")
_CHANNEL_OPTIONS = (*_MLP_OPTIONS, "pools")
_SPATIAL_OPTIONS = ("kernel_size", "descriptor", "conv_bias", "norm", "norm_weight", "norm_momentum")
_OPTIONS: dict[str, tuple[str, ...]] = {  # of each kind, without the placement
    "none": (),
    "se": _MLP_OPTIONS,
    "channel": ("preset", *_CHANNEL_OPTIONS),
    "spatial": ("preset", *_SPATIAL_OPTIONS),
    "cbam": ("preset", "order", *_CHANNEL_OPTIONS, *_SPATIAL_OPTIONS),
    "eca": ("kernel_size",),
    "bam": ("reduction", "min_hidden"),
}


def options_of(kind: str) -> tuple[str, ...]:
    """The options of AttentionConfig that this kind of attention uses, beside `kind`."""
    return (*_OPTIONS.get(kind, ()), *(() if kind == "none" else ("place", "stages", "where", "start")))


def _arguments(options: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The named options as a layer's arguments, where mlp_bias and conv_bias are `bias`."""
    renamed = {"mlp_bias": "bias", "conv_bias": "bias"}
    return {renamed.get(name, name): options[name] for name in names if name in options}


@dataclass(frozen=True)
class AttentionConfig:
    """Which attention a network has, and where; each field is a key below `model.attention` in YAML.

    An option that the kind does not use is an error. None leaves an option to the preset, or to the kind.

    Args:
        kind: none (the baseline), se (squeeze-and-excitation), channel or spatial (one half of CBAM), cbam, eca
            (efficient channel attention) or bam (bottleneck attention).
        preset: the form of cbam, channel and spatial: paper (the equations), official (the authors' code), timm or
            keras. Any option given beside it wins.
        order: of cbam: channel_spatial, spatial_channel, parallel, channel or spatial.
        reduction: channels per hidden unit of the MLP.
        pools: poolings of the channel attention, any of avg, max, lse (log-sum-exp), lp (p = 2).
        min_hidden: least hidden width of the MLP, so that few channels still have one hidden unit.
        rounding: of channels / reduction, down or nearest.
        mlp_bias: whether the MLP has biases.
        kernel_size: side of the spatial attention's convolution, or channels that each gate of eca sees; odd.
        descriptor: what the spatial attention sees of the channels: mean_max, max_mean, mean, max or learned.
        conv_bias: whether the spatial attention's convolution has a bias.
        norm: whether batch norm follows that convolution.
        norm_weight: initial value of that batch norm's weight.
        norm_momentum: share of a new batch in that batch norm's running statistics.
        place: in the ResNets before_addition (the default: on the branch) or after_addition (on the block's
            output); in the cnn before_pool (the default of se and eca) or after_pool (that of the others).
        stages: the ResNets' stages with attention, some of 1 to 4 (1 to 3 in resnet20 to 110); None: all.
        where: in a `model.network`: patterns of the names of the modules that attention follows, such as layer?.*.bn2;
            `*`, `?` and `[…]` stand for parts of a name between dots.
        start: paper (gates of about one half), or identity (the network begins as it is without attention, to the bit:
            x + α · (attention(x) − x), with a learned α that starts at zero). None: paper, but in a network that starts
            from trained weights the start of their attention, if that is the same, else identity.
    """

    kind: AttentionKind = "cbam"
    preset: Preset = "paper"
    order: Order | None = None
    reduction: int | None = None
    pools: tuple[Pool, ...] | None = None
    min_hidden: int | None = None
    rounding: Rounding | None = None
    mlp_bias: bool | None = None
    kernel_size: int | None = None
    descriptor: Descriptor | None = None
    conv_bias: bool | None = None
    norm: bool | None = None
    norm_weight: float | None = None
    norm_momentum: float | None = None
    place: Place | None = None
    stages: tuple[int, ...] | None = None
    where: tuple[str, ...] | str | None = None
    start: Start | None = None

    def __post_init__(self) -> None:
        check_one_of(_OPTIONS, kind=self.kind)
        check_one_of(get_args(Preset), preset=self.preset)
        if self.place is not None:
            check_one_of(get_args(Place), place=self.place)
        if self.start is not None:
            check_one_of(get_args(Start), start=self.start)
        given = {**vars(self), "kind": None, "preset": None if self.preset == "paper" else self.preset}
        reject_unused(options_of(self.kind), given, f"kind={self.kind!r}")

    def given(self, names: Collection[str]) -> dict[str, Any]:
        """The named options that are not None."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def build(self, channels: int) -> nn.Module:
        """The attention for `channels` channels; the identity for "none". place, stages and where are the network's."""
        if self.kind == "none":
            return nn.Identity()
        attention = self._build(channels, self.given(_OPTIONS[self.kind]))
        return IdentityStart(attention) if self.start == "identity" else attention

    def _build(self, channels: int, options: dict[str, Any]) -> nn.Module:
        if self.kind == "cbam":
            return CBAM(channels, **options)
        if self.kind in ("channel", "spatial"):
            return CBAM(channels, order=self.kind, **options).get_submodule(self.kind)
        layer = {"se": SqueezeExcitation, "eca": EfficientChannelAttention, "bam": BAM}[self.kind]
        return layer(channels, **_arguments(options, options))


def is_attention(module: nn.Module) -> bool:
    """Whether a module is one of those that AttentionConfig builds, or one of their gates."""
    return isinstance(module, (Gate, CBAM, IdentityStart))


# What differs from the paper's equations, which are the layers' defaults.
_PRESETS = {
    "paper": AttentionConfig(),
    # The authors' code, github.com/Jongchan/attention-module. As the weight of its batch norm starts at zero, the
    # spatial gate starts as a constant 0.5.
    "official": AttentionConfig(mlp_bias=True, descriptor="max_mean", norm=True, norm_weight=0.0, norm_momentum=0.01),
    # timm.layers.cbam.CbamModule of timm 1.0
    "timm": AttentionConfig(rounding="nearest", norm=True),
    # github.com/kobiso/CBAM-keras
    "keras": AttentionConfig(reduction=8, mlp_bias=True),
}
