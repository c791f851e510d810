"""Draw what checkpoints see: python train.py visualize"""
