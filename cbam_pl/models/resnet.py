"""ResNet-18, 34, 50, 101 and 152 with the CIFAR stem, and attention in every block.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, table 1; the stem is a
3×3 convolution at stride 1 without max pool, as is usual for 32×32 images. Attention: arXiv:1807.06521, figure 3.
"""

import torch
from torch import Tensor, nn

from cbam_pl.attention import AttentionConfig
from cbam_pl.models.initialisation import he_conv


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + attention(branch(x))).

    Args:
        in_channels: channels of the input.
        width: channels of the block's 3×3 convolutions.
        stride: stride of the block, in its (first) 3×3 convolution.
        bottleneck: 1×1, 3×3, 1×1 convolutions with four times as many channels at the end, or 3×3, 3×3.
        attention: stands on the branch's output, before the shortcut is added.

    Shape:
        x (B, in_channels, H, W) → (B, width or 4 · width, H / stride, W / stride).
    """

    def __init__(self, in_channels: int, width: int, stride: int, bottleneck: bool, attention: AttentionConfig) -> None:
        super().__init__()
        channels = 4 * width if bottleneck else width
        if bottleneck:
            kernels = [(in_channels, width, 1, 1), (width, width, 3, stride), (width, channels, 1, 1)]
        else:
            kernels = [(in_channels, width, 3, stride), (width, width, 3, 1)]
        layers: list[nn.Module] = []
        for before, after, kernel_size, step in kernels:
            layers += [
                he_conv(before, after, kernel_size, step),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        self.branch = nn.Sequential(*layers[:-1])  # the last ReLU comes after the addition
        self.attention = attention.build(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(he_conv(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) → (B, channels, H / stride, W / stride)."""
        return torch.relu(self.attention(self.branch(x)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images.

    Args:
        depths: residual blocks in each of the four stages.
        bottleneck: bottleneck blocks (ResNet-50 and deeper) or basic ones.
        num_classes: classes to tell apart.
        attention: the attention of each block.

    Shape:
        images (B, 3, H, W) → logits (B, num_classes), for any H and W.
    """

    def __init__(self, depths: tuple[int, ...], bottleneck: bool, num_classes: int, attention: AttentionConfig) -> None:
        super().__init__()
        self.stem = nn.Sequential(he_conv(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
        channels, stages = 64, []
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(channels, width, stride, bottleneck, attention))
                channels = 4 * width if bottleneck else width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → logits (B, num_classes)."""
        features = self.stages(self.stem(images))  # (B, C, H / 8, W / 8)
        return self.classifier(features.mean((2, 3)))
