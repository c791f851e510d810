import pytest
from torch import nn

from cbam_pl.models import build_network
from cbam_pl.models.cost import count_flops, count_parameters


@pytest.mark.parametrize("width", [1, 0.5])
def test_operations_of_the_cnn_are_those_counted_by_hand(width):
    channels, flops = [3, *(int(width * count) for count in (32, 64, 128))], 0
    for place, side in enumerate((32, 16, 8)):  # a 3×3 convolution at each place, and then the pool
        flops += 2 * 9 * channels[place] * channels[place + 1] * side**2
    flops += 2 * (16 * channels[-1] * 512 + 512 * 10)  # the two linear layers; 4×4 places are left
    network = build_network("cnn", 10, "none", width=width).train()
    assert count_flops(network, (3, 32, 32)) == flops
    assert network.training
    assert all(parameter.device.type == "cpu" for parameter in network.parameters())


def test_only_what_is_trained_counts_as_a_parameter():
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    network[0].requires_grad_(False)
    assert count_parameters(network) == 3 * 2 + 2
