"""The ResNets for CIFAR and for ImageNet, with attention in every block or in the blocks of some stages.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385. ResNet-20 to 110 are
those of section 4.2, ResNet-18 to 152 those of table 1, here with the CIFAR stem that is usual for 32×32 images: a 3×3
convolution at stride 1 without max pool. Attention: arXiv:1807.06521, figure 3.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam_pl.attention import AttentionConfig
from cbam_pl.models.layers import he_conv, scale_channels

Stem = Literal["cifar", "imagenet"]


@dataclass(frozen=True)
class Layout:
    """What distinguishes one ResNet from another."""

    depths: tuple[int, ...]  # residual blocks in each stage
    channels: int = 64  # of the stem and of the first stage's 3×3 convolutions; each stage doubles them
    bottleneck: bool = False  # bottleneck blocks, or basic ones
    # A 1×1 convolution in the shortcuts that change the shape (the paper's option B), or zeros for the new channels
    # (option A), which has no parameters.
    projection: bool = True

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of each stage's 3×3 convolutions, at width 1."""
        return tuple(self.channels * 2**number for number in range(len(self.depths)))


RESNETS = {
    "resnet20": Layout((3, 3, 3), channels=16, projection=False),
    "resnet32": Layout((5, 5, 5), channels=16, projection=False),
    "resnet44": Layout((7, 7, 7), channels=16, projection=False),
    "resnet56": Layout((9, 9, 9), channels=16, projection=False),
    "resnet110": Layout((18, 18, 18), channels=16, projection=False),
    "resnet18": Layout((2, 2, 2, 2)),
    "resnet34": Layout((3, 4, 6, 3)),
    "resnet50": Layout((3, 4, 6, 3), bottleneck=True),
    "resnet101": Layout((3, 4, 23, 3), bottleneck=True),
    "resnet152": Layout((3, 8, 36, 3), bottleneck=True),
}


class ZeroPaddedShortcut(nn.Module):
    """Every `stride`-th place of the input, and zeros for the channels that it lacks (the paper's option A)."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, C + new_channels, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + attention(branch(x))), or with the attention after the addition, on the ReLU's output.

    The latter is the place that "Squeeze-and-Excitation Networks", arXiv:1709.01507, section 6.5, calls SE-POST.
    `width` is that of the 3×3 convolutions; a bottleneck's last, 1×1 one has four times as many channels.
    """

    def __init__(self, in_channels: int, width: int, stride: int, layout: Layout, attention: AttentionConfig) -> None:
        super().__init__()
        channels = 4 * width if layout.bottleneck else width
        if layout.bottleneck:
            kernels = [(in_channels, width, 1, 1), (width, width, 3, stride), (width, channels, 1, 1)]
        else:
            kernels = [(in_channels, width, 3, stride), (width, width, 3, 1)]
        layers: list[nn.Module] = []
        for before, after, kernel_size, step in kernels:
            layers += [he_conv(before, after, kernel_size, step), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.branch = nn.Sequential(*layers[:-1])  # the last ReLU comes after the addition
        self.attention = attention.build(channels)
        self.after_addition = attention.place == "after_addition"
        self.shortcut: nn.Module = nn.Identity()
        if layout.projection and (stride != 1 or in_channels != channels):
            self.shortcut = nn.Sequential(he_conv(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))
        elif stride != 1 or in_channels != channels:
            self.shortcut = ZeroPaddedShortcut(channels - in_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) → (B, channels, H / stride, W / stride)."""
        if self.after_addition:
            return self.attention(torch.relu(self.branch(x) + self.shortcut(x)))
        return torch.relu(self.attention(self.branch(x)) + self.shortcut(x))


def _stem(stem: Stem, channels: int) -> nn.Sequential:
    """Images (B, 3, H, W) → (B, channels, H, W) for cifar, (B, channels, H / 4, W / 4) for imagenet."""
    if stem == "cifar":
        return nn.Sequential(he_conv(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    if stem == "imagenet":
        conv = he_conv(3, channels, 7, stride=2)
        return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
    raise ValueError(f"stem={stem!r} is unknown; use cifar or imagenet")


class ResNet(nn.Module):
    """A residual network of one of RESNETS. The other arguments, shapes and errors are those of build_network."""

    def __init__(
        self, layout: Layout, num_classes: int, attention: AttentionConfig, stem: Stem = "cifar", width: float = 1.0
    ) -> None:
        super().__init__()
        if attention.place not in (None, "before_addition", "after_addition"):
            raise ValueError(f"place={attention.place!r} is not in the ResNets; use before_addition or after_addition")
        numbers = range(1, len(layout.depths) + 1)
        stages_with = numbers if attention.stages is None else attention.stages
        if not stages_with or len(set(stages_with)) < len(stages_with) or not set(stages_with) <= set(numbers):
            allowed = ", ".join(map(str, numbers))
            raise ValueError(f"stages={attention.stages!r} must be one or more of {allowed}, each once")
        widths = scale_channels(layout.stage_channels, width)
        self.stem = _stem(stem, widths[0])
        channels, stages = widths[0], []
        for number, depth, stage_width in zip(numbers, layout.depths, widths, strict=True):
            chosen = attention if number in stages_with else AttentionConfig("none")
            blocks = []
            for block in range(depth):
                stride = 2 if number > 1 and block == 0 else 1
                blocks.append(ResidualBlock(channels, stage_width, stride, layout, chosen))
                channels = 4 * stage_width if layout.bottleneck else stage_width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → logits (B, num_classes)."""
        features = self.stages(self.stem(images))  # (B, C, H, W), halved by each stage but the first
        return self.classifier(features.mean((2, 3)))
