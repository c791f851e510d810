"""Attention CNNs on CIFAR: `from cbam_pl import CBAM`, or `python train.py fit --config configs/cbam_cnn.yaml`."""

from cbam_pl.attention import CBAM, ChannelAttention, SpatialAttention, SqueezeExcitation
from cbam_pl.models import build_network

__all__ = ["CBAM", "ChannelAttention", "SpatialAttention", "SqueezeExcitation", "build_network"]
