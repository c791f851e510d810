"""Channel attention, spatial attention, CBAM and squeeze-and-excitation: each is a gate in (0, 1) times its input.

Source: CBAM: Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018, arXiv:1807.06521.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

AttentionKind = Literal["none", "se", "channel", "spatial", "cbam"]


def _hidden_width(channels: int, reduction: int) -> int:
    if channels < 1:
        raise ValueError(f"channels={channels} must be at least 1")
    if reduction < 1:
        raise ValueError(f"reduction={reduction} must be at least 1")
    return max(1, channels // reduction)


class ChannelAttention(nn.Module):
    """Which channels matter: x · sigmoid(MLP(average pool) + MLP(maximum pool)), one shared MLP.

    Source: arXiv:1807.06521, equation 2.

    Args:
        channels: channels of the input.
        reduction: input channels per hidden unit of the MLP; the hidden width is at least 1.

    Shape:
        x (B, C, H, W) → (B, C, H, W); gate (B, C, 1, 1).

    Raises:
        ValueError: channels or reduction below 1.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = _hidden_width(channels, reduction)
        self.reduce = nn.Linear(channels, hidden, bias=False)
        self.expand = nn.Linear(hidden, channels, bias=False)

    def gate(self, x: Tensor) -> Tensor:
        """The weight of each channel. x (B, C, H, W) → (B, C, 1, 1) in (0, 1)."""
        pooled = torch.stack([x.mean((2, 3)), x.amax((2, 3))])  # (2, B, C)
        # The last layer is linear, so the two branches are summed before it.
        hidden = torch.relu(self.reduce(pooled)).sum(0)  # (B, hidden)
        return torch.sigmoid(self.expand(hidden))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → x · gate(x)."""
        return x * self.gate(x)


class SpatialAttention(nn.Module):
    """Which places matter: x · sigmoid(convolution of [mean; max] across channels).

    Source: arXiv:1807.06521, equation 3.

    Args:
        kernel_size: side of the convolution's kernel, odd.

    Shape:
        x (B, C, H, W) → (B, C, H, W); gate (B, 1, H, W).

    Raises:
        ValueError: kernel_size is even or below 1.
    """

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd and at least 1, such as 3, 5 or 7")
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def gate(self, x: Tensor) -> Tensor:
        """The weight of each place. x (B, C, H, W) → (B, 1, H, W) in (0, 1)."""
        described = torch.stack([x.mean(1), x.amax(1)], 1)  # (B, 2, H, W)
        return torch.sigmoid(self.conv(described))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → x · gate(x)."""
        return x * self.gate(x)


class CBAM(nn.Module):
    """Channel attention, then spatial attention on its result.

    Source: arXiv:1807.06521, equation 1.

    Args:
        channels: channels of the input.
        reduction: input channels per hidden unit of the channel attention's MLP.
        kernel_size: side of the spatial attention's kernel, odd.

    Shape:
        x (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, channels: int, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels, reduction)
        self.spatial = SpatialAttention(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, C, H, W)."""
        return self.spatial(self.channel(x))


class SqueezeExcitation(nn.Module):
    """Channel attention from the average alone: x · sigmoid(MLP(average pool)).

    Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, arXiv:1709.01507, equations 2 to 4, which
    have no bias.

    Args:
        channels: channels of the input.
        reduction: input channels per hidden unit of the MLP; the hidden width is at least 1.

    Shape:
        x (B, C, H, W) → (B, C, H, W); gate (B, C, 1, 1).

    Raises:
        ValueError: channels or reduction below 1.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = _hidden_width(channels, reduction)
        self.reduce = nn.Linear(channels, hidden, bias=False)
        self.expand = nn.Linear(hidden, channels, bias=False)

    def gate(self, x: Tensor) -> Tensor:
        """The weight of each channel. x (B, C, H, W) → (B, C, 1, 1) in (0, 1)."""
        hidden = torch.relu(self.reduce(x.mean((2, 3))))  # (B, hidden)
        return torch.sigmoid(self.expand(hidden))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → x · gate(x)."""
        return x * self.gate(x)


@dataclass(frozen=True)
class AttentionConfig:
    """Which attention a network has; each field is a key below `model.attention` in YAML.

    Args:
        kind: none (the baseline), se (squeeze-and-excitation), channel or spatial (one half of CBAM), cbam.
        reduction: channels per hidden unit of the channel attention's MLP.
        kernel_size: side of the spatial attention's convolution, odd.
    """

    kind: AttentionKind = "cbam"
    reduction: int = 16
    kernel_size: int = 7

    def build(self, channels: int) -> nn.Module:
        """The attention for `channels` channels; the identity for "none".

        Raises:
            ValueError: an unknown kind, or an option out of its range.
        """
        if self.kind == "none":
            return nn.Identity()
        if self.kind == "se":
            return SqueezeExcitation(channels, self.reduction)
        if self.kind == "channel":
            return ChannelAttention(channels, self.reduction)
        if self.kind == "spatial":
            return SpatialAttention(self.kernel_size)
        if self.kind == "cbam":
            return CBAM(channels, self.reduction, self.kernel_size)
        raise ValueError(f"kind={self.kind!r} is unknown; use none, se, channel, spatial or cbam")
