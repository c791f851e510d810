"""What a network costs: parameters and floating-point operations."""

from copy import deepcopy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(network: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def count_flops(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of a forward pass of one image (C, H, W); a multiplication and an addition are two.

    Convolutions and matrix products are counted, as is usual; pooling, normalisation and activations are not.
    """
    try:
        return _count(network, image_shape, "meta")
    except (NotImplementedError, RuntimeError):  # a network that looks at values, which are not there
        return _count(network, image_shape, "cpu")


def _count(network: nn.Module, image_shape: tuple[int, int, int], device: str) -> int:
    twin = deepcopy(network).to(device).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.zeros(1, *image_shape, device=device))
    return counter.get_total_flops()
