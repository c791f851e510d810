"""The derivatives of the attention modules: backward, forward, second, at ties, of each image, and traced."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbam_pl.attention import CBAM, AttentionConfig
from cbam_pl.attention_parts import convolve_rows
from tests.attention_oracles import build, maps, variants

# torch 2.14 deprecates torch.jit, and its own forward mode uses it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")


@variants
def test_gradients_are_those_of_finite_differences(config):
    attention = build(config, channels=4).double()
    x = maps(2, 4, 3, 3).double().requires_grad_()
    names = [name for name, _ in attention.named_parameters()]

    def call(x, *values):
        parameters = dict(zip(names, values, strict=True))
        # Without the running statistics, which each call would move.
        return torch.func.functional_call(attention, parameters, (x,))

    parameters = [parameter.detach().requires_grad_() for parameter in attention.parameters()]
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradcheck(call, (x, *parameters), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("tied", ["zeros", "constant", "ties"])
@variants
def test_gradients_are_finite_where_maxima_tie(config, tied):
    attention = build(config)
    x = {"zeros": torch.zeros(2, 8, 4, 4), "constant": torch.full((2, 8, 4, 4), 3.0), "ties": maps(2, 8, 4, 4).round()}
    x = x[tied].requires_grad_()
    attention(x).square().sum().backward()
    assert x.grad.isfinite().all()
    for name, parameter in attention.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig("channel"),
        AttentionConfig("channel", pools=("max",)),
        AttentionConfig("spatial", kernel_size=1),
        AttentionConfig("spatial", kernel_size=1, descriptor="max"),
    ],
)
def test_gradient_at_ties_is_shared_out_once(config):
    """Whoever of the tied gets it: the gradients of one maximum sum to that of the maximum."""
    attention = build(config, channels=4).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.abs_()  # so that no ReLU is shut
    x = torch.full((1, 4, 3, 3), 2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention.logits(x)[1].sum(), x)
    # Raising the whole constant map raises every maximum alike.
    step = 1e-6
    rise = (attention.logits(x + step)[1].sum() - attention.logits(x - step)[1].sum()) / (2 * step)
    assert gradient.sum().item() == pytest.approx(rise.item(), rel=1e-6)
    assert rise.item() > 0.1


def test_gradient_among_tied_channels_is_that_of_amax():
    spatial = build(AttentionConfig("spatial", kernel_size=1), channels=4).double()
    x = maps(2, 4, 3, 3).double().round().requires_grad_()  # of small whole numbers, some tie and some do not
    (gradient,) = torch.autograd.grad(spatial.logits(x)[1].sum(), x)
    of_mean, of_maximum = spatial.conv.weight.flatten()
    (expected,) = torch.autograd.grad((of_mean * x.mean(1) + of_maximum * x.amax(1)).sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert len(gradient.unique()) > 2  # the mean's share alone, and more where there is one maximum or a tie


@variants
def test_gradients_that_come_in_another_layout(config):
    attention = build(config)
    x = maps(2, 8, 5, 3).requires_grad_()
    incoming = maps(2, 8, 3, 5).transpose(2, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = attention(x.to(memory_format=layout))
        gradients = [
            torch.autograd.grad(y, x, gradient, retain_graph=True)[0] for gradient in (incoming, incoming.contiguous())
        ]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_gradients_of_each_image_alone():
    cbam = build(AttentionConfig())
    images = maps(3, 8, 5, 5)
    parameters = dict(cbam.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(cbam, parameters, (image[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for index, image in enumerate(images):
        alone = torch.autograd.grad(loss(parameters, image), parameters.values())
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(together[name][index], gradient, rtol=1e-4, atol=1e-5)


def test_float16_does_not_overflow():
    cbam = build(AttentionConfig(), 4)
    x = torch.full((1, 4, 64, 64), 20.0, dtype=torch.float16)  # sums to 81,920 a channel, above 65,504
    expected = cbam(x.float())
    torch.testing.assert_close(cbam.half()(x).float(), expected, rtol=2**-6, atol=2**-6)


@variants
def test_forward_mode_is_that_of_finite_differences(config):
    attention = build(config, channels=4).double().eval()
    x, direction = maps(2, 4, 3, 3).double(), maps(2, 4, 3, 3, seed=2).double()
    _, derivative = torch.func.jvp(attention, (x,), (direction,))
    step = 1e-6
    rise = (attention(x + step * direction) - attention(x - step * direction)).detach() / (2 * step)
    torch.testing.assert_close(derivative, rise, rtol=1e-7, atol=1e-7)


@variants
def test_forward_mode_agrees_with_backward_at_ties(config):
    attention = build(config, channels=4).double().eval()
    x = maps(2, 4, 3, 3).double().round().requires_grad_()  # of small whole numbers, some tie and some do not
    direction, weights = maps(2, 4, 3, 3, seed=2).double(), maps(2, 4, 3, 3, seed=3).double()
    _, derivative = torch.func.jvp(attention, (x,), (direction,))
    (gradient,) = torch.autograd.grad((attention(x) * weights).sum(), x)
    assert ((derivative * weights).sum() - (gradient * direction).sum()).abs() < 1e-12


def plain_cbam(x, reduce, expand, conv):
    def mlp(pooled):
        return torch.relu(pooled @ reduce.T) @ expand.T

    x = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))[:, :, None, None]
    described = torch.stack([x.mean(1), x.amax(1)], 1)
    return x * torch.sigmoid(torch.conv2d(described, conv, padding=1))


def test_hessian_is_that_of_the_plain_formula():
    torch.manual_seed(0)
    cbam = CBAM(3, reduction=1, kernel_size=3).double()
    weights = [parameter.detach() for parameter in cbam.parameters()]
    names = [name for name, _ in cbam.named_parameters()]
    x = maps(2, 3, 2, 2).double()

    def loss(x, *weights):
        return torch.func.functional_call(cbam, dict(zip(names, weights, strict=True)), (x,)).pow(3).sum()

    def plain_loss(x, *weights):
        return plain_cbam(x, *weights).pow(3).sum()

    everything = tuple(range(4))
    ours = torch.func.hessian(loss, everything)(x, *weights)
    plain = torch.autograd.functional.hessian(plain_loss, (x, *weights))  # reverse mode alone
    for row, plain_row in zip(ours, plain, strict=True):
        for block, plain_block in zip(row, plain_row, strict=True):
            assert plain_block.abs().max() > 1e-3
            torch.testing.assert_close(block, plain_block, rtol=1e-9, atol=1e-12)


def test_traced_network_is_the_eager_one():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), CBAM(8, preset="official"), nn.Conv2d(8, 4, 3), CBAM(4)]
    network = nn.Sequential(*layers).eval()
    traced = torch.jit.trace(network, maps(2, 3, 16, 16))
    x = maps(3, 3, 24, 20, seed=2)
    torch.testing.assert_close(traced(x), network(x))
    gradients = [torch.autograd.grad(f(x).square().sum(), network[0].weight)[0] for f in (traced, network)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "height", "width", "side"), [(2, 9, 13, 7), (1, 4, 1, 7), (2, 1, 2, 5), (2, 3, 32, 1)]
)
def test_convolving_rows_is_the_convolution(channels, height, width, side, memory_format):
    torch.manual_seed(0)
    x = torch.randn(3, channels, height, width, dtype=torch.float64).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(1, channels, side, side, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    expected, found = F.conv2d(x, weight, bias, padding=side // 2), convolve_rows(x, weight, bias)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, gradient) for out in (found, expected)))
