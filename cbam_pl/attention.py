"""CBAM in every published form, its two halves and its neighbours: each multiplies its input by gates.

Every module here has `gates(x)`, the gates by name, and `forward(x)`, which is x times each of them. The sources:

    CBAM    Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018, arXiv:1807.06521
    SE      Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, arXiv:1709.01507
    ECA     Wang et al., "ECA-Net: Efficient Channel Attention", CVPR 2020, arXiv:1910.03151
    BAM     Park, Woo, Lee, Kweon, "BAM: Bottleneck Attention Module", BMVC 2018, arXiv:1807.06514
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AttentionKind = Literal["none", "se", "channel", "spatial", "cbam", "eca", "bam"]
Preset = Literal["paper", "official", "timm", "keras"]
Pool = Literal["avg", "max", "lse", "lp"]
Rounding = Literal["down", "nearest"]
Descriptor = Literal["mean_max", "max_mean", "mean", "max", "learned"]
Order = Literal["channel_spatial", "spatial_channel", "parallel", "channel", "spatial"]
Place = Literal["before_addition", "after_addition", "before_pool", "after_pool"]


def _at_least(minimum: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")


def _one_of(allowed: Collection[str], **choices: str) -> None:
    for name, value in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}")


def _odd(kernel_size: int) -> int:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} must be odd and at least 1, such as 3, 5 or 7")
    return kernel_size


def _only(allowed: Collection[str], given: Mapping[str, object], owner: str) -> None:
    """Refuse each option that was given and that `owner` has no use for."""
    for name, value in given.items():
        if value is not None and name not in allowed:
            raise ValueError(
                f"{name}={value!r} has no effect with {owner}; leave it out"
                + (f" (options: {', '.join(allowed)})" if allowed else "")
            )


def _hidden_width(channels: int, reduction: int, min_hidden: int, rounding: Rounding) -> int:
    _at_least(1, channels=channels, reduction=reduction)
    _at_least(0, min_hidden=min_hidden)
    _one_of(get_args(Rounding), rounding=rounding)
    if min_hidden == 0 and reduction > channels:
        raise ValueError(
            f"reduction={reduction} leaves no hidden unit for channels={channels} with min_hidden=0; "
            f"use a reduction of at most {channels}, or a min_hidden of at least 1"
        )
    half = reduction // 2 if rounding == "nearest" else 0
    return max(min_hidden, (channels + half) // reduction)


def _linear(in_features: int, features: int, bias: bool) -> nn.Linear:
    """A linear layer; a bias starts at zero, as in the authors' and the Keras code."""
    linear = nn.Linear(in_features, features, bias)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def _mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean over dims, which stay as ones."""
    if x.dtype == torch.float16:
        return x.mean(dims, keepdim=True)  # the sum of a large map overflows
    # The sum is divided after it shrank: the backward of mean divides a gradient of the map's full size.
    return x.sum(dims, keepdim=True) / _count(x, dims)


def _count(x: Tensor, dims: tuple[int, ...]) -> int:
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    return count


class _MeanAndMax(torch.autograd.Function):
    """x itself, its mean and its maximum over dims, which stay as ones: (1,), the channels, or (2, 3), the places.

    x comes back so that the gradient of all that follows arrives here too and one pass over the map joins the three.
    By itself autograd makes a map of each and adds them up, and amax makes five passes to share its own among ties.
    Among tied channels, too, the gradient is shared; of tied places, one gets it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        place = None
        if dims == (1,):
            maximum = x.amax(1, keepdim=True)  # four times as fast as max, which finds the place as well
        else:
            maximum, place = F.max_pool2d(x, x.shape[2:], return_indices=True)  # counted along H · W
        return x.view_as(x), _mean(x, dims), maximum, place

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, tuple[int, ...]], output: tuple[Tensor, Tensor, Tensor, Tensor | None]
    ) -> None:
        x, dims = inputs
        _, _, maximum, place = output
        ctx.count = _count(x, dims)
        if place is None:
            ctx.save_for_backward(x, maximum, None)
        else:
            ctx.mark_non_differentiable(place)
            ctx.save_for_backward(None, None, place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_x, of_mean, of_maximum, _ = gradients
        x, maximum, place = ctx.saved_tensors
        joined = of_x + (of_mean / ctx.count).to(of_x.dtype)
        if place is None:
            # 1 where a channel has the maximum, else 0; a comparison's truth values turned into numbers take longer.
            tied = (x - maximum).sign_().add_(1)
            return torch.addcmul(joined, tied, of_maximum / tied.sum(1, keepdim=True)), None
        joined = joined.flatten(2).scatter_add_(2, place.flatten(2), of_maximum.flatten(2))  # (B, C, H · W)
        return joined.unflatten(2, of_x.shape[2:]), None


def _mean_and_max(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """x itself, its mean and its maximum over dims, which stay as ones."""
    # Only where there is a backward to come; torch.compile joins the passes by itself.
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _MeanAndMax.apply(x, dims)[:3]
    return x, _mean(x, dims), x.amax(dims, keepdim=True)


_POOLS = {  # each (B, C, H, W) → (B, C, 1, 1)
    "avg": lambda x: _mean(x, (2, 3)),
    "max": lambda x: x.amax((2, 3), keepdim=True),
    "lse": lambda x: x.logsumexp((2, 3), keepdim=True),
    # The square root of the sum of squares; unlike lp_pool2d's, its gradient at an all-zero map is zero, not NaN.
    "lp": lambda x: torch.linalg.vector_norm(x, 2, (2, 3), keepdim=True),
}


class _Gate(nn.Module):
    """A module with one gate, in two steps. A subclass gives them, and the gate's name."""

    gate_name: Literal["channel", "spatial"]

    def squeeze(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself (see _MeanAndMax), and the small tensor from which the gate is computed."""
        raise NotImplementedError

    def excite(self, squeezed: Tensor) -> Tensor:
        """The gate before the sigmoid, shaped to multiply x."""
        raise NotImplementedError

    def logits(self, x: Tensor) -> Tensor:
        """The gate before the sigmoid. x (B, C, H, W) → (B, C, 1, 1) or (B, 1, H, W)."""
        return self.excite(self.squeeze(x)[1])

    def gate(self, x: Tensor) -> Tensor:
        """The weight of each channel or place. x (B, C, H, W) → (B, C, 1, 1) or (B, 1, H, W), in (0, 1)."""
        return torch.sigmoid(self.logits(x))

    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """The gate by its name, "channel" or "spatial"."""
        return {self.gate_name: self.gate(x)}

    def weigh(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x · gate(x), and the gate."""
        x, squeezed = self.squeeze(x)
        gate = torch.sigmoid(self.excite(squeezed))
        return x * gate, gate

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → x · gate(x)."""
        return self.weigh(x)[0]


class ChannelAttention(_Gate):
    """Which channels matter: x · sigmoid(Σ over pools of MLP(pool(x))), one MLP shared by the pools.

    Source: arXiv:1807.06521, equation 2, with average and maximum pooling. "lse" and "lp" are in the authors' code:
    log Σ exp(x) and (Σ x²)^½ over the map. The MLP is two matrices with a ReLU between; whether it is written as
    dense layers called once a pool, on the pools stacked or tiled, or as 1×1 convolutions is the same arithmetic.
    Here the pools are stacked and, the last layer being linear, summed before it.

    Args:
        channels: channels of the input.
        reduction: channels per hidden unit of the MLP.
        pools: the poolings over the map, any of avg, max, lse (log-sum-exp), lp (p = 2), each once.
        min_hidden: least hidden width: with 1, channels=8 and reduction=16 work, with one hidden unit.
        rounding: of channels / reduction, down or to the nearest (half upwards).
        bias: whether both layers of the MLP have a bias, which starts at zero. The sum over the pools counts the
            last one once a pool, as the equation does.

    Shape:
        x (B, C, H, W) → (B, C, H, W); gate (B, C, 1, 1).

    Raises:
        ValueError: a number out of its range, an unknown or repeated pool, or min_hidden=0 with a reduction above
            the channels.
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
        hidden = _hidden_width(channels, reduction, min_hidden, rounding)
        if not pools or isinstance(pools, str) or len(set(pools)) < len(pools):
            raise ValueError(f"pools={pools!r} must be a list of one or more of {', '.join(_POOLS)}, each once")
        for pool in pools:
            _one_of(_POOLS, pools=pool)
        self.pools = tuple(pools)
        self.reduce = _linear(channels, hidden, bias)
        self.expand = _linear(hidden, channels, bias)

    def squeeze(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) → x and its pools (P, B, C)."""
        if set(self.pools) == {"avg", "max"}:
            x, *pooled = _mean_and_max(x, (2, 3))  # in either order, since they are summed
        else:
            pooled = [_POOLS[pool](x) for pool in self.pools]
        return x, torch.stack(pooled).flatten(2)

    def excite(self, squeezed: Tensor) -> Tensor:
        """Pools (P, B, C) → (B, C, 1, 1)."""
        hidden = torch.relu(self.reduce(squeezed)).sum(0)  # (B, hidden)
        bias = None if self.expand.bias is None else len(self.pools) * self.expand.bias
        return F.linear(hidden, self.expand.weight, bias)[:, :, None, None]


class SqueezeExcitation(ChannelAttention):
    """Channel attention from the average alone: x · sigmoid(MLP(average pool)).

    Source: arXiv:1709.01507, equations 2 to 4, which have no bias; torchvision's SqueezeExcitation has one.

    Args:
        channels: channels of the input.
        reduction: channels per hidden unit of the MLP.
        min_hidden: least hidden width.
        rounding: of channels / reduction, down or to the nearest (half upwards).
        bias: whether both layers of the MLP have a bias, which starts at zero.

    Shape:
        x (B, C, H, W) → (B, C, H, W); gate (B, C, 1, 1).

    Raises:
        ValueError: a number out of its range, or min_hidden=0 with a reduction above the channels.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        min_hidden: int = 1,
        rounding: Rounding = "down",
        bias: bool = False,
    ) -> None:
        super().__init__(channels, reduction, ("avg",), min_hidden, rounding, bias)


class EfficientChannelAttention(_Gate):
    """Channel attention without a bottleneck: x · sigmoid(1-D convolution along the channels' averages).

    Source: arXiv:1910.03151, equation 9; the kernel's size follows equation 12 with γ = 2 and b = 1, rounded as in
    the authors' code: t = ⌊(log2 C + 1) / 2⌋, plus one if even. timm's EcaModule differs below 8 channels, where it
    uses at least 3.

    Args:
        channels: channels of the input.
        kernel_size: neighbouring channels that each gate sees, odd; None: from the channels.

    Shape:
        x (B, C, H, W) → (B, C, H, W); gate (B, C, 1, 1).

    Raises:
        ValueError: channels below 1, or an even kernel_size.
    """

    gate_name = "channel"

    def __init__(self, channels: int, kernel_size: int | None = None) -> None:
        super().__init__()
        _at_least(1, channels=channels)
        if kernel_size is None:
            kernel_size = int((math.log2(channels) + 1) / 2) | 1  # | 1: an even number becomes the next odd one
        self.conv = nn.Conv1d(1, 1, _odd(kernel_size), padding=kernel_size // 2, bias=False)

    def squeeze(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) → x and its averages (B, 1, C)."""
        return x, _mean(x, (2, 3)).flatten(1)[:, None]

    def excite(self, squeezed: Tensor) -> Tensor:
        """Averages (B, 1, C) → (B, C, 1, 1)."""
        return self.conv(squeezed)[:, 0, :, None, None]


class SpatialAttention(_Gate):
    """Which places matter: x · sigmoid(convolution of the mean and the maximum across channels).

    Source: arXiv:1807.06521, equation 3; the learned descriptor is that of its section 4.1, a 1×1 convolution to one
    channel.

    Args:
        kernel_size: side of the convolution's kernel, odd; it may exceed the map.
        descriptor: what the convolution sees of the channels, in this order: mean_max, max_mean, mean, max, or
            learned.
        bias: whether the convolution has a bias, which starts at zero.
        norm: whether batch normalisation follows the convolution. In training it needs more than one value: not a
            batch of one 1×1 map.
        norm_weight: initial value of the batch norm's weight; None: 1.
        norm_momentum: share of a new batch in the batch norm's running statistics; None: 0.1.
        channels: channels of the input, for the learned descriptor; the others take any number.

    Shape:
        x (B, C, H, W) → (B, C, H, W); gate (B, 1, H, W).

    Raises:
        ValueError: an even kernel_size, an unknown descriptor, or an option that has no use beside the others.
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
        _odd(kernel_size)
        _one_of(get_args(Descriptor), descriptor=descriptor)
        if not norm:
            _only((), {"norm_weight": norm_weight, "norm_momentum": norm_momentum}, "norm=False")
        if descriptor != "learned":
            _only((), {"channels": channels}, f"descriptor={descriptor!r}")
        elif channels is None:
            raise ValueError("channels=None must be given with descriptor='learned'")
        else:
            _at_least(1, channels=channels)
            self.compress = nn.Conv2d(channels, 1, 1, bias=False)
        self.descriptor = descriptor
        described = 2 if "_" in descriptor else 1
        self.conv = nn.Conv2d(described, 1, kernel_size, padding=kernel_size // 2, bias=bias)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.norm: nn.Module = nn.Identity()
        if norm:
            self.norm = nn.BatchNorm2d(1, momentum=0.1 if norm_momentum is None else norm_momentum)
            nn.init.constant_(self.norm.weight, 1.0 if norm_weight is None else norm_weight)

    def squeeze(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) → x and its descriptor (B, 2 or 1, H, W)."""
        if self.descriptor == "learned":
            return x, self.compress(x)
        if self.descriptor == "mean":
            return x, _mean(x, (1,))
        if self.descriptor == "max":
            return x, x.amax(1, keepdim=True)
        x, mean, maximum = _mean_and_max(x, (1,))
        parts = [mean, maximum] if self.descriptor == "mean_max" else [maximum, mean]
        # channels_last, in which the backward of so narrow a convolution is several times faster.
        return x, torch.stack([part[:, 0] for part in parts], 3).permute(0, 3, 1, 2)

    def excite(self, squeezed: Tensor) -> Tensor:
        """Descriptor (B, 2 or 1, H, W) → (B, 1, H, W)."""
        return self.norm(self.conv(squeezed))


class BAM(nn.Module):
    """One gate for every channel and place: x · (1 + sigmoid(channel branch + spatial branch)).

    Source: arXiv:1807.06514, equations 1 to 4: an MLP on the average pool, and two dilated 3×3 convolutions between
    1×1 ones. As in the authors' code, and unlike the paper, batch norm and ReLU follow each hidden layer and nothing
    follows the last. As in the paper, and unlike the code (which multiplies them), the branches are added. In
    training the channel branch's batch norm needs two images or more.

    Args:
        channels: channels of the input.
        reduction: channels per hidden unit of both branches.
        min_hidden: least hidden width.

    Shape:
        x (B, C, H, W) → (B, C, H, W); gate (B, C, H, W) in (1, 2).

    Raises:
        ValueError: a number out of its range, or min_hidden=0 with a reduction above the channels.
    """

    def __init__(self, channels: int, reduction: int = 16, min_hidden: int = 1) -> None:
        super().__init__()
        hidden = _hidden_width(channels, reduction, min_hidden, "down")
        self.channel = nn.Sequential(
            nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        layers: list[nn.Module] = [nn.Conv2d(channels, hidden, 1)]
        for _ in range(2):
            dilated = nn.Conv2d(hidden, hidden, 3, padding=4, dilation=4)
            layers += [nn.BatchNorm2d(hidden), nn.ReLU(), dilated]
        self.spatial = nn.Sequential(*layers, nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, 1, 1))

    def gate(self, x: Tensor) -> Tensor:
        """The weight of each channel at each place. x (B, C, H, W) → (B, C, H, W) in (1, 2)."""
        channel = self.channel(_mean(x, (2, 3)).flatten(1))[:, :, None, None]  # (B, C, 1, 1)
        return 1 + torch.sigmoid(channel + self.spatial(x))

    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """The gate by its name, "joint", for it does not separate into channels and places."""
        return {"joint": self.gate(x)}

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → x · gate(x)."""
        return x * self.gate(x)


_PAPER: dict[str, Any] = {
    "order": "channel_spatial",
    "reduction": 16,
    "pools": ("avg", "max"),
    "min_hidden": 1,
    "rounding": "down",
    "mlp_bias": False,
    "kernel_size": 7,
    "descriptor": "mean_max",
    "conv_bias": False,
    "norm": False,
    "norm_weight": None,
    "norm_momentum": None,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "official": {
        **_PAPER,
        "mlp_bias": True,
        "descriptor": "max_mean",
        "norm": True,
        "norm_weight": 0.0,
        "norm_momentum": 0.01,
    },
    "timm": {**_PAPER, "rounding": "nearest", "norm": True},
    "keras": {**_PAPER, "reduction": 8, "mlp_bias": True},
}
_MLP_OPTIONS = ("reduction", "min_hidden", "rounding", "mlp_bias")
_CHANNEL_OPTIONS = (*_MLP_OPTIONS, "pools")
_SPATIAL_OPTIONS = ("kernel_size", "descriptor", "conv_bias", "norm", "norm_weight", "norm_momentum")
_PLACEMENT_OPTIONS = ("place", "stages")
_OPTIONS: dict[str, tuple[str, ...]] = {  # of each kind, in addition to those of the placement
    "none": (),
    "se": _MLP_OPTIONS,
    "channel": _CHANNEL_OPTIONS,
    "spatial": _SPATIAL_OPTIONS,
    "cbam": ("order", *_CHANNEL_OPTIONS, *_SPATIAL_OPTIONS),
    "eca": ("kernel_size",),
    "bam": ("reduction", "min_hidden"),
}


class CBAM(nn.Module):
    """Channel attention, then spatial attention on its result, or another order of the two.

    Source: arXiv:1807.06521, equation 1, and of each preset:

    - paper: the equations. No bias, no batch norm, descriptor [mean; max].
    - official: the authors' code, github.com/Jongchan/attention-module. Biases in the MLP, descriptor [max; mean],
      and after the 7×7 convolution a batch norm of momentum 0.01 whose weight starts at zero, so that the spatial
      gate starts as a constant 0.5.
    - timm: timm.layers.cbam.CbamModule of timm 1.0. No bias, descriptor [mean; max], batch norm at its default
      start, hidden width rounded to the nearest.
    - keras: github.com/kobiso/CBAM-keras. Biases in the MLP, reduction 8, descriptor [mean; max], no batch norm.

    The presets settle the form, not the weights' random start, which is PyTorch's default for every layer.

    The order "parallel" is x · sigmoid(channel logits + spatial logits), both of x, as BAM joins its branches
    (arXiv:1807.06514, equation 2): one gate, which a strong "no" from either branch can close. The paper's own
    parallel arrangement (table 3) leaves the joining open. "channel" and "spatial" are one half alone.

    Args:
        channels: channels of the input.
        reduction: channels per hidden unit of the MLP.
        kernel_size: side of the convolution's kernel, odd.
        order: channel_spatial, spatial_channel, parallel, channel or spatial.
        preset: paper, official, timm or keras: the value of each option that is None.
        pools: poolings over the map; see ChannelAttention, as for the next three.
        min_hidden: least hidden width of the MLP.
        rounding: of channels / reduction, down or nearest.
        mlp_bias: whether the MLP has biases.
        descriptor: what the convolution sees of the channels; see SpatialAttention, as for the rest.
        conv_bias: whether the convolution has a bias.
        norm: whether batch norm follows the convolution.
        norm_weight: initial value of the batch norm's weight.
        norm_momentum: share of a new batch in the batch norm's running statistics.

    Shape:
        x (B, C, H, W) → (B, C, H, W).

    Raises:
        ValueError: an unknown preset or order, an option out of its range, or one that has no use beside the others.
    """

    def __init__(
        self,
        channels: int,
        reduction: int | None = None,
        kernel_size: int | None = None,
        order: Order | None = None,
        *,
        preset: Preset = "paper",
        pools: Sequence[Pool] | None = None,
        min_hidden: int | None = None,
        rounding: Rounding | None = None,
        mlp_bias: bool | None = None,
        descriptor: Descriptor | None = None,
        conv_bias: bool | None = None,
        norm: bool | None = None,
        norm_weight: float | None = None,
        norm_momentum: float | None = None,
    ) -> None:
        super().__init__()
        _at_least(1, channels=channels)
        _one_of(_PRESETS, preset=preset)
        given: dict[str, Any] = {
            "order": order,
            "reduction": reduction,
            "pools": pools,
            "min_hidden": min_hidden,
            "rounding": rounding,
            "mlp_bias": mlp_bias,
            "kernel_size": kernel_size,
            "descriptor": descriptor,
            "conv_bias": conv_bias,
            "norm": norm,
            "norm_weight": norm_weight,
            "norm_momentum": norm_momentum,
        }
        option = {name: _PRESETS[preset][name] if value is None else value for name, value in given.items()}
        _one_of(get_args(Order), order=option["order"])
        if option["order"] in ("channel", "spatial"):
            _only(("order", *_OPTIONS[option["order"]]), given, f"order={order!r}")
        if not option["norm"]:  # norm=False beside a preset with batch norm switches its details off too
            option |= {"norm_weight": norm_weight, "norm_momentum": norm_momentum}
        self.order: Order = option["order"]
        if self.order != "spatial":
            self.channel = ChannelAttention(
                channels,
                option["reduction"],
                option["pools"],
                option["min_hidden"],
                option["rounding"],
                option["mlp_bias"],
            )
        if self.order != "channel":
            self.spatial = SpatialAttention(
                option["kernel_size"],
                option["descriptor"],
                option["conv_bias"],
                option["norm"],
                option["norm_weight"],
                option["norm_momentum"],
                channels if option["descriptor"] == "learned" else None,
            )

    def _gated(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.order == "parallel":
            gate = torch.sigmoid(self.channel.logits(x) + self.spatial.logits(x))  # (B, C, H, W)
            return x * gate, {"joint": gate}
        gates = {}
        for name in self.order.split("_"):
            x, gates[name] = getattr(self, name).weigh(x)  # the second gate sees what the first one let through
        return x, gates

    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """The gates by name, in the order in which they are applied; their product with x is forward(x).

        x (B, C, H, W) → "channel" (B, C, 1, 1) and "spatial" (B, 1, H, W), or for the parallel order "joint"
        (B, C, H, W); all in (0, 1).
        """
        return self._gated(x)[1]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, C, H, W)."""
        return self._gated(x)[0]


def options_of(kind: str) -> tuple[str, ...]:
    """The options of AttentionConfig that this kind of attention has a use for, beside `kind`."""
    preset = ("preset",) if kind in ("cbam", "channel", "spatial") else ()
    placement = () if kind == "none" else _PLACEMENT_OPTIONS
    return (*preset, *_OPTIONS.get(kind, ()), *placement)


@dataclass(frozen=True)
class AttentionConfig:
    """Which attention a network has, and where; each field is a key below `model.attention` in YAML.

    An option that the kind has no use for is an error. None leaves an option to the preset, or to the kind.

    Args:
        kind: none (the baseline), se (squeeze-and-excitation), channel or spatial (one half of CBAM), cbam, eca
            (efficient channel attention) or bam (bottleneck attention).
        preset: the form of cbam, channel and spatial: paper (the equations), official (the authors' code), timm or
            keras. Any option given beside it wins.
        order: of cbam: channel_spatial, spatial_channel, parallel, channel or spatial.
        reduction: channels per hidden unit of the MLP.
        pools: poolings of the channel attention, any of avg, max, lse (log-sum-exp), lp (p = 2).
        min_hidden: least hidden width of the MLP, so that few channels never leave none.
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
        stages: the ResNets' stages with attention, some of 1 to 4; None: all.
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

    def __post_init__(self) -> None:
        _one_of(_OPTIONS, kind=self.kind)
        _one_of(_PRESETS, preset=self.preset)
        if self.place is not None:
            _one_of(get_args(Place), place=self.place)
        if self.preset != "paper" and self.kind not in ("cbam", "channel", "spatial"):
            raise ValueError(f"preset={self.preset!r} has no effect with kind={self.kind!r}; leave it out")
        placement = _PLACEMENT_OPTIONS if self.kind != "none" else ()
        _only((*_OPTIONS[self.kind], *placement), self._options(), f"kind={self.kind!r}")

    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("kind", "preset")}

    def build(self, channels: int) -> nn.Module:
        """The attention for `channels` channels; the identity for "none".

        Raises:
            ValueError: an option out of its range.
        """
        options = {name: value for name, value in self._options().items() if value is not None}
        for name in _PLACEMENT_OPTIONS:  # the network's business
            options.pop(name, None)
        if self.kind == "none":
            return nn.Identity()
        if self.kind == "eca":
            return EfficientChannelAttention(channels, **options)
        if self.kind == "bam":
            return BAM(channels, **options)
        if self.kind == "se":
            if "mlp_bias" in options:
                options["bias"] = options.pop("mlp_bias")
            return SqueezeExcitation(channels, **options)
        if self.kind == "cbam":
            return CBAM(channels, preset=self.preset, **options)
        half = CBAM(channels, preset=self.preset, order=self.kind, **options)  # the one reader of presets
        return half.get_submodule(self.kind)
