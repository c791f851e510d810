"""ResNet-18, 34, 50, 101 and 152 with the CIFAR or the ImageNet stem, and attention in every block or some stages.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, table 1; the CIFAR stem
is a 3×3 convolution at stride 1 without max pool, as is usual for 32×32 images. Attention: arXiv:1807.06521, figure 3.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from cbam_pl.attention import AttentionConfig
from cbam_pl.models.initialisation import he_conv

Stem = Literal["cifar", "imagenet"]


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + attention(branch(x))), or with the attention after the addition, on the ReLU's output.

    The latter is the place that "Squeeze-and-Excitation Networks", arXiv:1709.01507, section 6.5, calls SE-POST.

    Args:
        in_channels: channels of the input.
        width: channels of the block's 3×3 convolutions.
        stride: stride of the block, in its (first) 3×3 convolution.
        bottleneck: 1×1, 3×3, 1×1 convolutions with four times as many channels at the end, or 3×3, 3×3.
        attention: its place is before_addition, on the branch's output (the default), or after_addition.

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
        self.after_addition = attention.place == "after_addition"
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(he_conv(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) → (B, channels, H / stride, W / stride)."""
        if self.after_addition:
            return self.attention(torch.relu(self.branch(x) + self.shortcut(x)))
        return torch.relu(self.attention(self.branch(x)) + self.shortcut(x))


def _stem(stem: Stem) -> nn.Sequential:
    """Images (B, 3, H, W) → (B, 64, H, W) for cifar, (B, 64, H / 4, W / 4) for imagenet."""
    if stem == "cifar":
        return nn.Sequential(he_conv(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    if stem == "imagenet":
        conv = he_conv(3, 64, 7, stride=2)
        return nn.Sequential(conv, nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
    raise ValueError(f"stem={stem!r} is unknown; use cifar or imagenet")


class ResNet(nn.Module):
    """A residual network.

    Args:
        depths: residual blocks in each of the four stages.
        bottleneck: bottleneck blocks (ResNet-50 and deeper) or basic ones.
        num_classes: classes to tell apart.
        attention: the attention of each block, or of each block in its stages.
        stem: cifar (3×3, stride 1) or imagenet (7×7, stride 2, then a 3×3 max pool, stride 2).

    Shape:
        images (B, 3, H, W) → logits (B, num_classes), for any H and W.

    Raises:
        ValueError: an unknown stem, a place of the attention that is in the cnn, or stages other than 1 to 4, each
            once.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        bottleneck: bool,
        num_classes: int,
        attention: AttentionConfig,
        stem: Stem = "cifar",
    ) -> None:
        super().__init__()
        if attention.place not in (None, "before_addition", "after_addition"):
            raise ValueError(f"place={attention.place!r} is not in the ResNets; use before_addition or after_addition")
        numbers = range(1, len(depths) + 1)
        stages_with = numbers if attention.stages is None else attention.stages
        if not stages_with or len(set(stages_with)) < len(stages_with) or not set(stages_with) <= set(numbers):
            raise ValueError(f"stages={attention.stages!r} must be one or more of 1, 2, 3, 4, each once")
        self.stem = _stem(stem)
        channels, stages = 64, []
        for stage, depth in enumerate(depths, start=1):
            width = 64 * 2 ** (stage - 1)
            chosen = attention if stage in stages_with else AttentionConfig("none")
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 1 and block == 0 else 1
                blocks.append(ResidualBlock(channels, width, stride, bottleneck, chosen))
                channels = 4 * width if bottleneck else width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → logits (B, num_classes)."""
        features = self.stages(self.stem(images))  # (B, C, H / 8, W / 8), or H / 32 with the imagenet stem
        return self.classifier(features.mean((2, 3)))
