"""Attention CNNs on CIFAR: `from cbam_pl import CBAM`, or `python train.py fit --config configs/cbam_cnn.yaml`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbam_pl.attention import (
        BAM,
        CBAM,
        AttentionConfig,
        ChannelAttention,
        EfficientChannelAttention,
        SpatialAttention,
        SqueezeExcitation,
    )
    from cbam_pl.data.datamodule import ImageDataModule
    from cbam_pl.inspect.gates import AttentionMaps, attention_maps
    from cbam_pl.models import build_network, insert_attention, load_official_state_dict
    from cbam_pl.training.classifier import Classifier
    from cbam_pl.training.inference import load_network

__all__ = [
    "BAM",
    "CBAM",
    "AttentionConfig",
    "AttentionMaps",
    "ChannelAttention",
    "Classifier",
    "EfficientChannelAttention",
    "ImageDataModule",
    "SpatialAttention",
    "SqueezeExcitation",
    "attention_maps",
    "build_network",
    "insert_attention",
    "load_network",
    "load_official_state_dict",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # On first use, since torch takes seconds to import, for which `train.py --help` need not wait.
    if name in __all__:
        homes = ("attention", "inspect.gates", "models", "data.datamodule", "training.classifier", "training.inference")
        for module in homes:
            home = import_module(f"cbam_pl.{module}")
            if hasattr(home, name):
                return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
