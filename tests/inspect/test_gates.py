import math
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cbam_pl.attention import BAM, CBAM, AttentionConfig, SpatialAttention
from cbam_pl.inspect.gates import (
    AttentionMaps,
    attention_maps,
    constant_gates,
    feature_maps,
    gate_health,
    identity_factors,
    unwrap,
)
from cbam_pl.inspect.scores import grad_cam
from cbam_pl.models import build_network, insert_attention


def network_of(kind="cbam", arch="cnn", **options):
    torch.manual_seed(1)
    network = build_network(arch, 10, AttentionConfig(kind, **options)).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as after a training
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def images_of(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def assert_same(maps, others):
    assert list(maps) == list(others)
    for name, gates in maps.items():
        for ours, theirs in ((gates.channel, others[name].channel), (gates.spatial, others[name].spatial)):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs)


def test_gates_of_cbam_are_those_of_the_papers_equations():
    network, x = network_of(), images_of()
    maps = attention_maps(network, x)
    assert list(maps) == ["blocks.0", "blocks.1", "blocks.2"]
    with torch.no_grad():
        for index, block in enumerate(network.blocks):
            x = F.max_pool2d(F.relu(block.norm(block.conv(x))), 2)
            reduce, expand = block.attention.channel.reduce.weight, block.attention.channel.expand.weight
            logits = sum(F.relu(pooled @ reduce.T) @ expand.T for pooled in (x.mean((2, 3)), x.amax((2, 3))))
            channel = 1 / (1 + torch.exp(-logits))
            x = x * channel[:, :, None, None]
            described = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
            spatial = 1 / (1 + torch.exp(-F.conv2d(described, block.attention.spatial.conv.weight, padding=3)[:, 0]))
            x = x * spatial[:, None]
            torch.testing.assert_close(maps[f"blocks.{index}"].channel, channel)
            torch.testing.assert_close(maps[f"blocks.{index}"].spatial, spatial)


@pytest.mark.parametrize(
    ("kind", "options", "gates"),
    [
        ("none", {}, ""),
        ("se", {}, "channel"),
        ("eca", {}, "channel"),
        ("channel", {}, "channel"),
        ("spatial", {}, "spatial"),
        ("cbam", {}, "channel spatial"),
        ("cbam", {"order": "spatial_channel"}, "channel spatial"),
        ("cbam", {"order": "channel"}, "channel"),
        ("cbam", {"order": "parallel"}, "channel spatial"),
        ("cbam", {"preset": "timm"}, "channel spatial"),
        ("bam", {}, "channel spatial"),
    ],
)
@pytest.mark.parametrize("arch", ["cnn", "resnet18"])
def test_every_kind_and_architecture_has_its_gates(kind, options, gates, arch):
    maps = attention_maps(
        network_of(kind, arch, **options), images_of(2)[:, :, :16, :16] if arch != "cnn" else images_of(2)
    )
    if kind == "none":
        assert maps == {}
        return
    sizes = [(32, 16), (64, 8), (128, 4)]
    if arch == "resnet18":
        sizes = [(64, 16), (64, 16), (128, 8), (128, 8), (256, 4), (256, 4), (512, 2), (512, 2)]
    assert len(maps) == len(sizes)
    if arch == "cnn" and kind in ("se", "eca"):  # before the pool
        sizes = [(channels, 2 * side) for channels, side in sizes]
    for block, (channels, side) in zip(maps.values(), sizes, strict=True):
        assert (block.channel is not None) == ("channel" in gates)
        assert (block.spatial is not None) == ("spatial" in gates)
        for gate, shape in ((block.channel, (2, channels)), (block.spatial, (2, side, side))):
            if gate is not None:
                assert gate.shape == shape
                assert gate.dtype == torch.float32
                assert 0 < gate.min() <= gate.max() < 1
                assert gate.min() < gate.max()


def test_names_are_those_of_the_blocks():
    names = list(attention_maps(network_of(arch="resnet34"), images_of(1)))
    assert names[:4] == ["stages.0.0", "stages.0.1", "stages.0.2", "stages.1.0"]
    assert len(names) == 16
    maps = attention_maps(network_of(arch="resnet20", stages=(2, 3)), images_of(1))
    assert {name: gates.channel.shape[1] for name, gates in maps.items()} == {
        **dict.fromkeys(["stages.1.0", "stages.1.1", "stages.1.2"], 32),
        **dict.fromkeys(["stages.2.0", "stages.2.1", "stages.2.2"], 64),
    }
    inserted = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    insert_attention(inserted, "se", "1")
    assert list(attention_maps(inserted, images_of(1))) == ["1"]
    assert list(attention_maps(CBAM(3), images_of(1))) == ["CBAM"]


def test_a_joint_gate_is_given_by_its_means():
    torch.manual_seed(0)
    x = torch.rand(2, 16, 5, 5) + 0.1
    for module, offset in ((BAM(16), 1), (CBAM(16, order="parallel"), 0)):
        module.eval()
        gate = (module(x) / x - offset).detach()  # (B, C, H, W)
        (maps,) = attention_maps(module, x).values()
        torch.testing.assert_close(maps.channel, gate.mean((2, 3)))
        torch.testing.assert_close(maps.spatial, gate.mean(1))


def test_the_network_is_left_as_it_was():
    network = network_of(preset="official")
    network.train()
    network.blocks[1].eval()  # as a frozen part
    modes = [module.training for module in network.modules()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(5)
    network(images_of()).sum().backward()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    random_state = torch.get_rng_state()
    attention_maps(network, images_of())
    feature_maps(network, images_of())
    grad_cam(network, images_of(), torch.tensor([1, 2, 3]))
    assert [module.training for module in network.modules()] == modes
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert parameter.requires_grad
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


def test_hooks_and_modes_are_given_back_after_an_error():
    network = network_of().train()
    with pytest.raises(RuntimeError):
        attention_maps(network, torch.zeros(1, 3, 40, 40))  # the linear layer is for 32×32
    assert all(module.training for module in network.modules())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_training_mode_does_not_change_the_maps():
    network = network_of(preset="timm")
    assert_same(attention_maps(network, images_of()), attention_maps(network.train(), images_of()))


@pytest.mark.parametrize("way", ["whole", "part", "in place"])
def test_a_compiled_network_gives_the_same_maps(way):
    network, x = network_of(), images_of()
    expected = attention_maps(network, x)
    if way == "whole":
        network = torch.compile(network, backend="eager")
    elif way == "part":
        network.blocks = torch.compile(network.blocks, backend="eager")
    else:
        network.compile(backend="eager")
    with torch.no_grad():
        network(x)  # compiled before anybody looks into it
    assert_same(attention_maps(network, x), expected)
    assert list(feature_maps(network, x).blocks) == ["blocks.0", "blocks.1", "blocks.2"]
    with torch.no_grad():
        network(x)


def test_a_network_in_data_parallel_gives_the_same_maps(tmp_path: Path):
    network, x = network_of(), images_of()
    expected = attention_maps(network, x)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(network)
        wrapped.train()
        assert unwrap(wrapped) is network
        assert_same(attention_maps(wrapped, x), expected)
        assert wrapped.training
    finally:
        torch.distributed.destroy_process_group()


def test_mixed_precision_does_not_change_the_maps():
    network, x = network_of(), images_of()
    expected = attention_maps(network, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(attention_maps(network, x), expected)
        assert torch.is_autocast_enabled("cpu")


def test_weights_in_bfloat16_give_float32_maps_nearby():
    network, x = network_of(), images_of()
    expected = attention_maps(network, x)
    for name, gates in attention_maps(network.bfloat16(), x).items():
        assert gates.spatial.dtype == torch.float32
        torch.testing.assert_close(gates.spatial, expected[name].spatial, atol=0.02, rtol=0)


def test_gates_set_by_hand_give_the_known_map_at_the_known_place():
    attention = SpatialAttention(kernel_size=1)
    attention.conv.weight.data = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)  # twice the maximum over the channels
    x = torch.full((1, 3, 8, 8), -1.0)
    x[0, 1, 2:4, 5:8] = 1.5
    (maps,) = attention_maps(nn.Sequential(attention), x).values()
    expected = torch.full((1, 8, 8), 1 / (1 + math.exp(2)))
    expected[0, 2:4, 5:8] = 1 / (1 + math.exp(-3))
    torch.testing.assert_close(maps.spatial, expected)
    assert maps.channel is None


def test_bad_input():
    with pytest.raises(ValueError, match=r"images of shape \(3, 32, 32\) must be \(B, 3, H, W\)"):
        attention_maps(network_of(), images_of()[0])
    shared = SpatialAttention(3)
    with pytest.raises(ValueError, match="the attention of 0 runs twice in one forward pass"):
        attention_maps(nn.Sequential(shared, shared), images_of())
    with pytest.raises(ValueError, match=r"no module of Sequential gives \(B, C, H, W\), so there are no maps to draw"):
        feature_maps(nn.Sequential(nn.Flatten()), images_of())


def test_a_layer_called_gates_is_not_attention():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gates = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x) * torch.sigmoid(self.gates(x))

    assert attention_maps(Gated(), images_of()) == {}


@pytest.mark.parametrize(
    "gates",
    [
        lambda self, x: x.mean((2, 3)).softmax(1),  # a mixture of experts
        lambda self, x: {"channel": x.mean((2, 3))},
        lambda self, x: {"expert": x},
        lambda self, x: {},
        lambda self, x: torch.add(x, "1"),  # whose error has several lines
        lambda self: {"joint": torch.ones(1, 1, 1, 1)},
        lambda self, x, temperature: {"joint": x / temperature},
    ],
)
def test_gates_of_another_form_are_named(gates):
    network = nn.Sequential(nn.Identity(), type("Own", (nn.Identity,), {"gates": gates})())
    with pytest.raises(
        ValueError, match=r"the attention of 1 has gates of another form.*; gates\(x\) must give"
    ) as one:
        attention_maps(network, images_of())
    assert "\n" not in str(one.value)


def test_gates_need_the_input_as_the_first_argument():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = CBAM(3)

        def forward(self, x):
            return self.attention(x=x)

    with pytest.raises(ValueError, match=r"the attention of CBAM has gates of another form .*missing 1 required"):
        attention_maps(Named(), images_of())


def test_names_lose_a_whole_last_part_alone():
    network = nn.Sequential()
    network.self_attention = nn.Sequential(CBAM(3))
    network.own_attention, network.attention = CBAM(3), CBAM(3)
    assert list(attention_maps(network, images_of())) == ["self_attention.0", "own_attention", "CBAM"]


def test_the_last_map_is_that_of_the_module_that_ran_last():
    class Reuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()

        def forward(self, x):
            return self.relu(self.second(self.relu(self.first(x)))).mean((2, 3))

    torch.manual_seed(0)
    network, x = Reuses(), images_of()
    last = feature_maps(network, x).last
    torch.testing.assert_close(last, torch.relu(network.second(torch.relu(network.first(x)))).detach())
    assert (last == 0).any()


def test_features_are_the_blocks_outputs_and_the_activations_before_the_last_pool():
    network, x = network_of(), images_of()
    features = feature_maps(network, x)
    with torch.no_grad():
        torch.testing.assert_close(features.logits, network(x))
        for index, block in enumerate(network.blocks):
            last = F.relu(block.norm(block.conv(x)))
            x = block(x)
            torch.testing.assert_close(features.blocks[f"blocks.{index}"], x)
    torch.testing.assert_close(features.last, last)
    assert features.last.shape == (3, 128, 8, 8)


@pytest.mark.parametrize(("arch", "stages", "depth"), [("resnet18", 4, 2), ("resnet20", 3, 3)])
def test_features_of_a_resnet_are_its_stem_and_every_residual_block(arch, stages, depth):
    network = network_of("none", arch)
    features = feature_maps(network, images_of(1))
    names = [f"stages.{stage}.{block}" for stage in range(stages) for block in range(depth)]
    assert list(features.blocks) == ["stem", *names]
    with torch.no_grad():
        torch.testing.assert_close(features.blocks[names[-1]], network.stages(network.stem(images_of(1))))
    assert torch.equal(features.last, features.blocks[names[-1]])


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("resnet18", ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]),
        ("mobilenet_v3_small", [f"features.{index}" for index in range(13)]),
    ],
)
def test_features_of_another_network_are_its_top_level_modules_with_maps(arch, names):
    torch.manual_seed(0)
    network, x = torchvision.models.get_model(arch, num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    features = feature_maps(network, x)
    assert list(features.blocks) == names  # not the average pool's 1×1
    with torch.no_grad():
        assert torch.equal(features.logits, network(x))
        first = network.conv1(x) if arch == "resnet18" else network.features[0](x)
        assert torch.equal(features.blocks[names[0]], first)
        if arch == "resnet18":  # before the ReLU in place
            assert torch.equal(features.blocks["bn1"], network.bn1(first))
    assert torch.equal(features.last, features.blocks[names[-1]])


def test_maps_of_attention_that_starts_as_the_identity_are_its_gates():
    for kind in ("cbam", "bam"):
        network = network_of(kind, start="identity")
        maps = attention_maps(network, images_of())
        assert list(maps) == ["blocks.0", "blocks.1", "blocks.2"]
        x = network.blocks[0].relu(network.blocks[0].pool(network.blocks[0].norm(network.blocks[0].conv(images_of()))))
        gates = network.blocks[0].attention.attention.gates(x)
        expected = gates["spatial"][:, 0] if kind == "cbam" else gates["joint"].mean(1) - 1
        torch.testing.assert_close(maps["blocks.0"].spatial, expected.detach())
        nn.init.constant_(network.blocks[1].attention.factor, 0.0312)
        assert identity_factors(network) == {"blocks.0": 0, "blocks.1": pytest.approx(0.0312), "blocks.2": 0}
        assert identity_factors(network_of(kind)) == {}


def test_health_counts_what_is_closed_open_and_uneven():
    spatial = torch.tensor([[[0.01, 0.99], [0.5, 0.5]], [[0.3, 0.3], [0.3, 0.3]]])  # (2, 2, 2)
    channel = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.97, 0.02, 0.001, 0.001]])
    health = gate_health(AttentionMaps(channel, spatial))
    assert health["spatial_mean"] == pytest.approx((0.5 + 0.3) / 2)
    assert health["spatial_below_0.05"] == pytest.approx(1 / 8)
    assert health["spatial_above_0.95"] == pytest.approx(1 / 8)
    assert health["spatial_std"] == pytest.approx(math.sqrt(2 * 0.49**2 / 4) / 2)
    assert health["channel_std"] == pytest.approx(torch.tensor([0.97, 0.02, 0.001, 0.001]).std(correction=0) / 2)
    assert health["channel_below_0.05"] == pytest.approx(3 / 8)
    assert health["channel_above_0.95"] == pytest.approx(1 / 8)
    shares = [value / 0.992 for value in (0.97, 0.02, 0.001, 0.001)]
    uneven = -sum(share * math.log(share) for share in shares) / math.log(4)
    assert health["channel_entropy"] == pytest.approx((1 + uneven) / 2)
    assert not {name for name in gate_health(AttentionMaps(None, spatial)) if name.startswith("channel")}


def test_a_gate_is_constant_only_where_every_image_is_flat():
    flat = torch.full((2, 4, 4), 0.4)
    assert constant_gates(AttentionMaps(None, flat)) == {"spatial": pytest.approx(0.4)}
    assert "spatial" in constant_gates(AttentionMaps(None, flat + 1e-4 * torch.arange(16).view(4, 4) / 16))
    one_alive = flat.clone()
    one_alive[1, 0, 0] = 0.9
    assert not constant_gates(AttentionMaps(None, one_alive))
    assert constant_gates(AttentionMaps(torch.full((2, 4), 0.5), one_alive)) == {"channel": 0.5}
    by_image = torch.tensor([[0.2] * 4, [0.8] * 4])  # which weighs no channel against another either
    assert constant_gates(AttentionMaps(by_image, None)) == {"channel": 0.5}
    assert not constant_gates(AttentionMaps(torch.tensor([[0.5, 0.6], [0.5, 0.5]]), None))
    assert not constant_gates(AttentionMaps(torch.full((2, 1), 0.4), torch.full((2, 1, 1), 0.4)))  # a single place
