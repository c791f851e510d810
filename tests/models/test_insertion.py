"""Attention inserted into networks that were written without it."""

import copy
import pickle

import pytest
import torch
import torchvision
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import Permute

from cbam_pl.attention import BAM, CBAM, AttentionConfig, SpatialAttention, SqueezeExcitation
from cbam_pl.models import insert_attention

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
KINDS = ["se", "channel", "spatial", "cbam", "eca", "bam"]


def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5).eval()


def force_gates_to_one(network):
    """Every logit becomes infinite, and with it the gate one; BAM's, of 1 + sigmoid, minus infinite."""
    for module in network.modules():
        if hasattr(module, "logits"):
            infinity = torch.full((1, 1, 1, 1), float("-inf" if isinstance(module, BAM) else "inf"))
            module.logits = lambda x, infinity=infinity: (x, infinity)


@pytest.mark.parametrize("where", ["layer?.*.bn2", ["bn1", "layer1", "layer4.1"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_as_before_when_the_gates_are_one(kind, where):
    network = resnet()
    before, names = network(IMAGES), list(network.state_dict())
    assert insert_attention(network, kind, where) is network
    changed = network(IMAGES)
    assert not torch.allclose(changed, before, atol=1e-3)
    force_gates_to_one(network)
    assert torch.equal(network(IMAGES), before)
    assert [name for name in network.state_dict() if "attention." not in name] == names


def test_attention_stands_where_it_was_asked_for():
    network = insert_attention(resnet(), AttentionConfig(reduction=4), "layer?.0.bn2")
    places = [name for name, module in network.named_modules() if isinstance(module, CBAM)]
    assert places == [f"layer{n}.0.bn2.attention" for n in (1, 2, 3, 4)]
    assert [network.get_submodule(name).channel.expand.out_features for name in places] == [64, 128, 256, 512]
    x = torch.randn(2, 64, 8, 8)
    block = network.layer1[0]
    plain = resnet().layer1[0]
    inner = block.bn2.attention(plain.bn2(plain.conv2(torch.relu(plain.bn1(plain.conv1(x))))))
    torch.testing.assert_close(block(x), torch.relu(inner + x))


def test_attention_after_blocks_that_have_attention_takes_the_channels_of_the_block():
    network = resnet()
    insert_attention(network, "cbam", "layer?.*.bn2")
    insert_attention(network, AttentionConfig("eca", kernel_size=5), ["layer4.*"])
    inner = network.layer4(network.layer3(network.layer2(network.layer1(torch.randn(2, 64, 8, 8)))))
    assert inner.shape == (2, 512, 1, 1)
    force_gates_to_one(network)
    torch.testing.assert_close(network(IMAGES), resnet()(IMAGES))


def test_sequential_runs_its_attention_once():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU()))
    plain = copy.deepcopy(network)
    insert_attention(network, "se", "1")
    assert isinstance(network[1].attention, SqueezeExcitation)
    torch.testing.assert_close(network(IMAGES), network[1].attention(plain(IMAGES)))


class Concatenation(nn.Module):
    """Declares its layers in another order than it runs them, and joins their outputs."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.norm = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.cat([self.wide(x), self.narrow(self.norm(x))], 1)


def test_example_shows_channels_that_no_layer_declares():
    network = nn.Sequential(Concatenation(), nn.ReLU())
    wrong = insert_attention(copy.deepcopy(network), "cbam", "0")
    with pytest.raises(
        ValueError, match=r"after Concatenation is for \(B, 3, H, W\), but the output is \(2, 16, 32, 32"
    ):
        wrong(IMAGES)
    statistics = network[0].norm.running_mean.clone()
    insert_attention(network, "cbam", ["0", "1"], example=IMAGES)
    assert network[0].attention.channel.expand.out_features == 16
    assert network[1].attention.channel.expand.out_features == 16
    assert torch.equal(network[0].norm.running_mean, statistics)
    assert network.training
    assert network[0].norm.training
    assert network(IMAGES).shape == (2, 16, 32, 32)


def test_copies_and_pickles_have_attention_of_their_own():
    network = insert_attention(resnet(), "cbam", "layer1.*")
    expected = network(IMAGES)
    copies = [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    for module in network.modules():
        if isinstance(module, CBAM):
            nn.init.zeros_(module.channel.expand.weight)
    assert not torch.allclose(network(IMAGES), expected)
    for twin in copies:
        torch.testing.assert_close(twin(IMAGES), expected)


def test_attention_survives_where_batch_norms_are_replaced():
    network = insert_attention(resnet(), "cbam", "layer?.*.bn2")
    expected = network(IMAGES)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    assert isinstance(converted.layer1[0].bn2, nn.SyncBatchNorm)
    for _ in range(2):  # attached once
        torch.testing.assert_close(converted(IMAGES), expected, rtol=0, atol=0)
    reverted = TorchSyncBatchNorm().revert(copy.deepcopy(converted)).eval()
    assert not isinstance(reverted.layer1[0].bn2, nn.SyncBatchNorm)
    for _ in range(2):
        torch.testing.assert_close(reverted(IMAGES), expected, rtol=0, atol=0)
    assert list(converted.state_dict()) == list(network.state_dict())


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_attention_runs_once_where_it_is_wrapped_or_has_another_name():
    network = insert_attention(resnet(), "cbam", "layer?.*.bn2")
    expected = network(IMAGES)
    network.cbam = network.layer4[1].bn2.attention
    network.layer1[0].bn2.attention = Wrapper(network.layer1[0].bn2.attention)
    torch.testing.assert_close(network(IMAGES), expected, rtol=0, atol=0)


def test_what_torch_fx_needs_is_named():
    network = insert_attention(resnet(), "se", "layer?.*")
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace SqueezeExcitation; make it a leaf: tracer_kwargs="):
        create_feature_extractor(network, ["layer4"])
    extractor = create_feature_extractor(network, ["fc"], tracer_kwargs={"leaf_modules": [SqueezeExcitation]})
    torch.testing.assert_close(extractor(IMAGES)["fc"], network(IMAGES))


def test_attention_follows_the_networks_type_and_mode():
    network = resnet().double().train()
    insert_attention(network, AttentionConfig(preset="official"), "layer2.0")
    attention = network.layer2[0].attention
    assert attention.channel.reduce.weight.dtype == torch.float64
    assert attention.training
    assert network(IMAGES.double()).dtype == torch.float64
    assert not insert_attention(resnet(), "cbam", "layer2.0").layer2[0].attention.training


class Merging(nn.Conv2d):
    """A convolution that has other weights in evaluation mode, as LoRA's layers have."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_the_mode_is_restored_by_what_the_network_does_in_train_and_kept_for_each_module():
    network = nn.Sequential(Merging(3, 8, 1), nn.BatchNorm2d(8))
    network[1].eval()
    insert_attention(network, "cbam", "1", IMAGES)
    assert not network[0].merged
    assert (network[0].training, network[1].training) == (True, False)


def test_compiles_and_learns():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), torchvision.models.resnet.BasicBlock(16, 16))
    insert_attention(network, "cbam", ["0", "1"])
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), copy.deepcopy(network)(IMAGES), rtol=1e-4, atol=1e-4)
    compiled(IMAGES).square().sum().backward()
    for module in (network[0], network[1]):
        assert module.attention.spatial.conv.weight.grad.abs().sum() > 0
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "layer9.*"}, r"^where='layer9.\*' matches no module of the network; it has .*layer"),
        ({"where": ["layer1.0", "layer1.bn2"]}, r"^where='layer1.bn2' matches no module"),
        ({"where": []}, r"^where=\[\] must name at least one module$"),
        ({"where": "relu"}, r"^where='relu': the channels of ReLU are unknown; give an example input$"),
        (
            {"where": "fc", "example": IMAGES},
            r"^where='fc': the output of Linear is \(2, 5\); choose a module that gives \(B, C, H, W\)$",
        ),
        ({"kind": "cbma"}, r"^kind='cbma' is unknown; use one of none, se, channel"),
        ({"kind": AttentionConfig(kernel_size=4)}, r"^kernel_size=4 must be odd"),
        ({"kind": AttentionConfig(stages=(1,))}, r"^stages=\(1,\) has no effect in insert_attention; use where$"),
        ({"kind": AttentionConfig(place="after_pool")}, r"^place='after_pool' has no effect in insert_attention; use"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(options, message):
    network = resnet()
    before = [name for name, _ in network.named_modules()]
    with pytest.raises(ValueError, match=message):
        insert_attention(network, **{"kind": "cbam", "where": "layer1.0", **options})
    assert [name for name, _ in network.named_modules()] == before


def test_second_attention_in_one_place_is_rejected():
    network = insert_attention(resnet(), "cbam", "layer1.0")
    with pytest.raises(ValueError, match=r"^where='layer1.0': BasicBlock already has an attribute `attention`; choose"):
        insert_attention(network, "se", "layer1.*")


@pytest.mark.parametrize(
    ("arch", "where", "count"),
    [
        ("resnet18", "layer?.*.bn2", 8),
        ("mobilenet_v3_small", "features.*", 13),
        ("efficientnet_b0", "features.?.*", 22),  # SiLU, which declares no channels, among them
        ("convnext_tiny", "features.[1357].*", 18),  # channels last within the block, first at its end
        ("densenet121", ["features.transition?", "features.denseblock1.denselayer?"], 9),
        ("shufflenet_v2_x0_5", "stage?.*", 16),
        ("swin_t", "permute", 1),  # back to channels first
    ],
)
def test_networks_of_torchvision(arch, where, count):
    torch.manual_seed(0)
    network = torchvision.models.get_model(arch, weights=None, num_classes=5).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = network(images)
    insert_attention(network, "spatial", where, images)
    attentions = [module for module in network.modules() if isinstance(module, SpatialAttention)]
    assert len(attentions) == count
    assert not torch.equal(network(images), before)
    force_gates_to_one(network)
    assert torch.equal(network(images), before)


class RunsItsChildren(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class RunsItsChildrenWithTheInput(RunsItsChildren):
    def forward(self, x):
        return sum(child([x]) if isinstance(child, CBAM) else child(x) for child in self.children())


class ResidualSequential(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def densenet():
    return torchvision.models.densenet121()


def swin():
    return torchvision.models.swin_t()


def with_unused_layer():
    network = nn.ModuleDict({"used": nn.Conv2d(3, 3, 1), "other": nn.Conv2d(3, 3, 1)})
    network.forward = network["used"].forward
    return network


CONTAINER = "does not run its children one after another, so it would not run the attention; choose a module"
LAST = r"is \(B, H, W, C\); choose a module that gives \(B, C, H, W\)$"


def assert_rejected(network, where, example, message):
    before, names = network(IMAGES), list(network.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        insert_attention(network, "cbam", where, example)
    assert "\n" not in str(error.value)
    assert list(network.state_dict()) == names
    assert torch.equal(network(IMAGES), before)


@pytest.mark.parametrize(
    ("make", "where", "message"),
    [
        (densenet, "features.denseblock?", f"_DenseBlock {CONTAINER}"),
        (swin, "features.0", r"the output of Sequential, \(2, 8, 8, 96\), " + LAST),
        (swin, "features.1.0", r"the output of SwinTransformerBlock, \(2, 8, 8, 96\), " + LAST),
        (swin, "features.1.0.attn", r"the output of ShiftedWindowAttention, \(2, 8, 8, 96\), " + LAST),
        (swin, "features.2", r"the output of PatchMerging, \(2, 4, 4, 192\), " + LAST),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Permute([0, 2, 3, 1])),
            "1",
            r"the output of Permute, \(2, 32, 32, 4\), " + LAST,
        ),
        (
            lambda: nn.Sequential(Permute([0, 2, 3, 1]), nn.Linear(3, 32)),
            "1",
            r"Linear, \(2, 32, 32, 32\), may be \(B, C, H, W\) or \(B, H, W, C\); use an example of another size",
        ),
        (
            lambda: nn.Sequential(RunsItsChildren()),
            "0",
            "^where='0': the network runs the attention 2 times, RunsItsChildren 1 times; choose another module$",
        ),
        (
            lambda: nn.Sequential(RunsItsChildrenWithTheInput()),
            "0",
            r"with attention there, the network fails with ValueError: the attention after RunsIt.* is list",
        ),
        (with_unused_layer, "other", "^where='other': Conv2d does not run for the example; choose another module$"),
    ],
)
def test_place_that_cannot_work_is_rejected_by_the_example(make, where, message):
    assert_rejected(make().eval(), where, IMAGES, message)


@pytest.mark.parametrize(
    ("make", "where", "message"),
    [
        (densenet, "features.denseblock?", f"_DenseBlock {CONTAINER}"),
        (lambda: nn.Sequential(ResidualSequential(nn.Conv2d(3, 3, 1))), "0", f"ResidualSequential {CONTAINER}"),
        (swin, "features.0", "the channels of Sequential are unknown; give an example input$"),
        (swin, "features.1.0", "the channels of SwinTransformerBlock are unknown; give an example input$"),
    ],
)
def test_place_that_cannot_work_is_rejected_without_an_example(make, where, message):
    assert_rejected(make().eval(), where, None, message)


def test_sequential_checks_what_its_attention_gets():
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), Permute([0, 2, 3, 1])))
    insert_attention(network, "spatial", "0")
    with pytest.raises(ValueError, match=r"after Sequential is for \(B, 8, H, W\), but the output is \(2, 32, 32, 8\)"):
        network(IMAGES)
