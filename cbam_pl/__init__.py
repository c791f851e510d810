"""Attention CNNs on CIFAR: `from cbam_pl import CBAM`, or `python train.py fit --config configs/cbam_cnn.yaml`."""
