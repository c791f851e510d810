"""Attention CNNs on CIFAR: `from cbam_pl import CBAM`, or `python train.py fit --config configs/cbam_cnn.yaml`."""

from cbam_pl.attention import (
    BAM,
    CBAM,
    AttentionConfig,
    ChannelAttention,
    EfficientChannelAttention,
    SpatialAttention,
    SqueezeExcitation,
)
from cbam_pl.inspection import AttentionMaps, attention_maps
from cbam_pl.models import build_network, insert_attention, load_official_state_dict

__all__ = [
    "BAM",
    "CBAM",
    "AttentionConfig",
    "AttentionMaps",
    "ChannelAttention",
    "EfficientChannelAttention",
    "SpatialAttention",
    "SqueezeExcitation",
    "attention_maps",
    "build_network",
    "insert_attention",
    "load_official_state_dict",
]
