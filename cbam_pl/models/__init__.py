"""The networks: a small CNN and the CIFAR ResNets, each with any attention."""

import difflib
from typing import Literal, get_args

from torch import nn

from cbam_pl.attention import AttentionConfig, AttentionKind
from cbam_pl.models.cnn import CHANNELS, CNN
from cbam_pl.models.insertion import insert_attention
from cbam_pl.models.network import NetworkConfig, make_network
from cbam_pl.models.official import load_official_state_dict
from cbam_pl.models.resnet import RESNETS, ResNet, Stem

__all__ = [
    "CNN",
    "Architecture",
    "NetworkConfig",
    "ResNet",
    "Stem",
    "build_network",
    "insert_attention",
    "load_official_state_dict",
    "make_network",
]

CifarResNet = Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
ImageNetResNet = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Architecture = Literal["cnn", CifarResNet, ImageNetResNet]


def build_network(
    arch: Architecture,
    num_classes: int,
    attention: AttentionKind | AttentionConfig = "cbam",
    image_size: int = 32,
    stem: Stem = "cifar",
    dropout: float | None = None,
    width: float = 1.0,
) -> nn.Module:
    """The network `arch` with `attention` in every block, or where its `place` and `stages` say.

    Args:
        arch: cnn; resnet20, 32, 44, 56 or 110, the narrow ones for CIFAR; or resnet18, 34, 50, 101 or 152.
        num_classes: classes to tell apart.
        attention: a kind, or an AttentionConfig with its options.
        image_size: height and width of the images in pixels; only the cnn's linear layer depends on it.
        stem: of resnet18 to 152: cifar (3×3, stride 1) or imagenet (7×7, stride 2, then a 3×3 max pool, stride 2).
        dropout: of the cnn: share of its hidden units that each training step leaves out; None: 0.5.
        width: factor on the channels of the convolutions, rounded to whole channels, which must be at least 8.

    Shape:
        images (B, 3, image_size, image_size) → logits (B, num_classes).

    Raises:
        ValueError: an unknown arch, kind or stem, a number out of its range, or an option (a place or stages of the
            attention, too) that arch has no use for.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1")
    if not isinstance(attention, AttentionConfig):
        attention = AttentionConfig(kind=attention)
    if attention.where is not None:
        raise ValueError(f"where={attention.where!r} has no effect with arch={arch!r}; use place and stages")
    if arch != "cnn" and arch not in RESNETS:
        near = difflib.get_close_matches(arch, get_args(Architecture), n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(get_args(Architecture))}"
        raise ValueError(f"arch={arch!r} is unknown; {hint}")
    if stem != "cifar" and (arch == "cnn" or not RESNETS[arch].projection):
        raise ValueError(f"stem={stem!r} has no effect with arch={arch!r}, whose stem is fixed; leave it out")
    if arch == "cnn":
        return CNN(num_classes, attention, image_size, 0.5 if dropout is None else dropout, width)
    if dropout is not None:
        raise ValueError(f"dropout={dropout} has no effect with arch={arch!r}, which has none; leave it out")
    return ResNet(RESNETS[arch], num_classes, attention, stem, width)


def stage_channels(arch: Architecture) -> tuple[int, ...]:
    """Channels of each stage's convolutions at width 1, the narrowest first."""
    return CHANNELS if arch == "cnn" else RESNETS[arch].stage_channels
