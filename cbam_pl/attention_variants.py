"""Beyond the CBAM paper: further pools and descriptors, ECA and BAM.

ECA    Wang et al., "ECA-Net: Efficient Channel Attention", CVPR 2020, arXiv:1910.03151
BAM    Park, Woo, Lee, Kweon, "BAM: Bottleneck Attention Module", BMVC 2018, arXiv:1807.06514
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cbam_pl.attention_parts import Gate, check_at_least, check_odd, hidden_width, mean

# Pools over the map that the authors' code has beside avg and max. (B, C, H, W) → (B, C, 1, 1).
FURTHER_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "lse": lambda x: x.logsumexp((2, 3), keepdim=True),
    # The square root of the sum of squares; unlike lp_pool2d's, its gradient at an all-zero map is zero, not NaN.
    "lp": lambda x: torch.linalg.vector_norm(x, 2, (2, 3), keepdim=True),
}
# Half of the paper's descriptor. (B, C, H, W) → (B, 1, H, W).
FURTHER_DESCRIPTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: mean(x, (1,)),
    "max": lambda x: x.amax(1, keepdim=True),
}


class EfficientChannelAttention(Gate):
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
        check_at_least(1, channels=channels)
        if kernel_size is None:
            kernel_size = int((math.log2(channels) + 1) / 2) | 1  # | 1: an even number becomes the next odd one
        check_odd(kernel_size)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) → x itself, and conv(avg), (B, C, 1, 1)."""
        average = mean(x, (2, 3)).flatten(1)[:, None]  # (B, 1, C)
        return x, self.conv(average)[:, 0, :, None, None]


class BAM(Gate):
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

    gate_name = "joint"  # it does not separate into channels and places

    def __init__(self, channels: int, reduction: int = 16, min_hidden: int = 1) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction, min_hidden)
        self.channel = nn.Sequential(
            nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        layers: list[nn.Module] = [nn.Conv2d(channels, hidden, 1)]
        for _ in range(2):
            layers += [nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, hidden, 3, padding=4, dilation=4)]
        self.spatial = nn.Sequential(*layers, nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → x · (1 + σ(channel + spatial))."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """The weight of each channel at each place. x (B, C, H, W) → (B, C, H, W) in (1, 2)."""
        return 1 + super().gate(x)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) → x itself, and the sum of the branches (B, C, H, W)."""
        channel = self.channel(mean(x, (2, 3)).flatten(1))[:, :, None, None]  # (B, C, 1, 1)
        return x, channel + self.spatial(x)
