"""Layers with He's initialisation, for those that a ReLU follows.

Source: He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv:1502.01852, equation 14 (fan out).
"""

from torch import nn


def he_conv(in_channels: int, channels: int, kernel_size: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1. (B, in_channels, H, W) → (B, channels, H / stride, W / stride)."""
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def he_linear(in_features: int, features: int) -> nn.Linear:
    """A linear layer with bias. (B, in_features) → (B, features)."""
    linear = nn.Linear(in_features, features)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)
    return linear
