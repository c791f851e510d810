"""What the networks share."""

import pytest
import torch
from torch import nn

from cbam_pl.models import build_network


@pytest.mark.parametrize("arch", ["cnn", "resnet20", "resnet18", "resnet50"])
def test_convolutions_and_the_hidden_layer_start_as_he_et_al_have_it(arch):
    torch.manual_seed(0)
    network = build_network(arch, 10, "none")
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) >= 3
    for conv in convolutions:  # equation 14 of arXiv:1502.01852
        size = conv.kernel_size[0] * conv.kernel_size[1]
        deviation = (2 / (conv.out_channels * size)) ** 0.5
        # Four standard errors of the standard deviation of so many values.
        assert conv.weight.std().item() == pytest.approx(deviation, rel=4 / (2 * conv.weight.numel()) ** 0.5)
        assert conv.bias is None or not conv.bias.any()
    if arch == "cnn":
        hidden = network.classifier[1]
        assert hidden.weight.std().item() == pytest.approx((2 / 2048) ** 0.5, rel=0.01)
        assert not hidden.bias.any()
