"""CIFAR-10, CIFAR-100, image folders and generated shapes, as uint8 tensors in memory or mapped into it."""
