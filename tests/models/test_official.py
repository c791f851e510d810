"""The authors' checkpoints: a state dict with their names and shapes, and their forward pass written out with it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from cbam_pl.attention import AttentionConfig
from cbam_pl.models import build_network, load_official_state_dict

CLASSES = 6


def official_state_dict(depths, bottleneck, counters=True):
    """What their ResidualNet("ImageNet", depth, CLASSES, "CBAM").state_dict() names, at random values."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def tensor(name, *shape):
        state[name] = torch.randn(*shape, generator=generator) / (shape[-1] if len(shape) > 1 else 4) ** 0.5

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean"):
            tensor(f"{name}.{part}", channels)
        state[f"{name}.running_var"] = torch.rand(channels, generator=generator) + 0.5
        if counters:
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    tensor("conv1.weight", 64, 3, 7, 7)
    norm("bn1", 64)
    before = 64
    for layer, depth in enumerate(depths, start=1):
        width = 64 * 2 ** (layer - 1)
        after = width * (4 if bottleneck else 1)
        for block in range(depth):
            at = f"layer{layer}.{block}"
            if bottleneck:
                shapes = [(width, before, 1), (width, width, 3), (after, width, 1)]
            else:
                shapes = [(width, before, 3), (width, width, 3)]
            for number, (out, into, kernel) in enumerate(shapes, start=1):
                tensor(f"{at}.conv{number}.weight", out, into, kernel, kernel)
                norm(f"{at}.bn{number}", out)
            if block == 0 and (layer > 1 or bottleneck):
                tensor(f"{at}.downsample.0.weight", after, before, 1, 1)
                norm(f"{at}.downsample.1", after)
            tensor(f"{at}.cbam.ChannelGate.mlp.1.weight", after // 16, after)
            tensor(f"{at}.cbam.ChannelGate.mlp.1.bias", after // 16)
            tensor(f"{at}.cbam.ChannelGate.mlp.3.weight", after, after // 16)
            tensor(f"{at}.cbam.ChannelGate.mlp.3.bias", after)
            tensor(f"{at}.cbam.SpatialGate.spatial.conv.weight", 1, 2, 7, 7)
            norm(f"{at}.cbam.SpatialGate.spatial.bn", 1)
            before = after
    tensor("fc.weight", CLASSES, before)
    tensor("fc.bias", CLASSES)
    return state


def official_forward(state, x, depths, bottleneck):
    """Their network in evaluation, from the state dict alone."""

    def norm(x, at):
        part = [state[f"{at}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *part, training=False, eps=1e-5)

    def cbam(x, at):
        def mlp(pooled):
            hidden = F.linear(pooled, state[f"{at}.ChannelGate.mlp.1.weight"], state[f"{at}.ChannelGate.mlp.1.bias"])
            parts = [state[f"{at}.ChannelGate.mlp.3.{name}"] for name in ("weight", "bias")]
            return F.linear(torch.relu(hidden), *parts)

        x = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))[:, :, None, None]
        described = torch.stack([x.amax(1), x.mean(1)], 1)
        logits = F.conv2d(described, state[f"{at}.SpatialGate.spatial.conv.weight"], padding=3)
        return x * torch.sigmoid(norm(logits, f"{at}.SpatialGate.spatial.bn"))

    x = torch.relu(norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), "bn1"))
    x = F.max_pool2d(x, 3, 2, padding=1)
    for layer, depth in enumerate(depths, start=1):
        for block in range(depth):
            at, stride, convs = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1, 3 if bottleneck else 2
            y = x
            for number in range(1, convs + 1):
                weight = state[f"{at}.conv{number}.weight"]
                step = stride if number == convs - 1 else 1  # the first 3×3 of either kind
                y = norm(F.conv2d(y, weight, stride=step, padding=weight.shape[-1] // 2), f"{at}.bn{number}")
                y = torch.relu(y) if number < convs else y
            if f"{at}.downsample.0.weight" in state:
                x = norm(F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride), f"{at}.downsample.1")
            x = torch.relu(cbam(y, f"{at}.cbam") + x)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


def official_network(arch, **options):
    return build_network(arch, CLASSES, AttentionConfig(preset="official", **options), stem="imagenet")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("arch", "depths", "bottleneck"), [("resnet18", (2, 2, 2, 2), False), ("resnet50", (3, 4, 6, 3), True)]
)
def test_loaded_network_computes_what_theirs_does(arch, depths, bottleneck, prefix):
    state = official_state_dict(depths, bottleneck, counters=not prefix)  # old PyTorch wrote no counters
    network = official_network(arch).eval()
    load_official_state_dict(network, {prefix + name: value for name, value in state.items()})
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = official_forward(state, images, depths, bottleneck)
    assert expected.std() > 0
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    if not prefix:
        assert network.stages[3][1].attention.spatial.norm.num_batches_tracked == 7


def rejection_of(network, state):
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="state_dict does not fit the network") as caught:
        load_official_state_dict(network, state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    return str(caught.value)


def test_every_tensor_that_does_not_fit_is_listed():
    state = official_state_dict((2, 2, 2, 2), False)
    del state["layer1.0.cbam.ChannelGate.mlp.1.weight"], state["bn1.running_var"]
    state["layer2.0.conv9.weight"] = state["extra"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(1000, 512)
    message = rejection_of(official_network("resnet18"), state)
    for part in [
        "unknown: layer2.0.conv9.weight",
        "unknown: extra",
        "wrong shape: fc.weight is (1000, 512), not (6, 512)",
        "missing: the tensor of stages.0.0.attention.channel.reduce.weight",
        "missing: the tensor of stem.1.running_var",
    ]:
        assert part in message
    assert message.count("; ") == 4


def test_other_networks_are_rejected():
    state = official_state_dict((2, 2, 2, 2), False)
    cifar = build_network("resnet18", CLASSES, AttentionConfig(preset="official"))
    assert "wrong shape: conv1.weight is (64, 3, 7, 7), not (64, 3, 3, 3)" in rejection_of(cifar, state)
    paper = build_network("resnet18", CLASSES, "cbam", stem="imagenet")
    assert "unknown: layer1.0.cbam.ChannelGate.mlp.1.bias" in rejection_of(paper, state)
    message = rejection_of(official_network("resnet34"), state)
    assert "missing: the tensor of stages.0.2.branch.0.weight" in message
