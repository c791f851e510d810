"""What the networks share: He's initialisation, and the channels of a network of another width."""

import math
from collections.abc import Sequence

from torch import nn

_LEAST = 8  # channels: fewer leave the attention's bottleneck nothing to choose from
_MOST = 65_536  # a 3×3 convolution of so many has 155 GB of weights


def he_conv(in_channels: int, channels: int, kernel_size: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1. (B, in_channels, H, W) → (B, channels, H / stride, W / stride).

    Source: He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv:1502.01852, equation 14 (fan out).
    """
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def scale_channels(channels: Sequence[int], width: float) -> list[int]:
    """The channels of each stage, the narrowest first, times `width`, rounded to whole channels."""
    if not 0 < width < math.inf:
        raise ValueError(f"width={width} must be a positive number")
    scaled = [round(count * width) for count in channels]
    if scaled[0] < _LEAST:
        raise ValueError(
            f"width={width} leaves {scaled[0]} of the first stage's {channels[0]} channels; "
            f"use at least {_LEAST / channels[0]}, which leaves {_LEAST}"
        )
    if scaled[-1] > _MOST:
        most = _MOST / channels[-1]
        raise ValueError(f"width={width} gives the last stage more than {_MOST:,} channels; use at most {most}")
    return scaled
