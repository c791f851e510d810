import pytest
import torch
from torch import nn

from cbam_pl.attention import BAM, CBAM, AttentionConfig
from cbam_pl.inspect.ablation import REPLACEMENTS, ablate_gates
from cbam_pl.models import build_network


class OwnGate(nn.Module):
    """Multiplies the first channel by the image's brightness, which is its last channel, and the others by 1."""

    def gates(self, x):
        gate = torch.ones(len(x), x.shape[1], 1, 1)
        gate[:, 0] = x[:, -1, :1, :1]
        return {"channel": gate}

    def forward(self, x):
        return x * self.gates(x)["channel"]


class Threshold(nn.Module):
    """Class 1 where the first channel's mean is above 0.5."""

    def forward(self, x):
        first = x[:, 0].mean((1, 2))
        return torch.stack([0.5 - first, first - 0.5], 1)


def by_row(result):
    return {(row["block"], row["gate"], row["replaced_by"]): row for row in result["rows"]}


def test_accuracy_without_gates_is_known_by_arithmetic():
    # The class is whether the gate is 0.9 or 0.2. Ten images of class 1 and thirty of class 0 have the mean gate 0.375,
    # with which all are class 0; the mean over both channels, 1 and 0.375, is 0.6875, with which all are class 1.
    labels = torch.tensor([1] * 10 + [0] * 30)
    images = torch.ones(40, 2, 2, 2)
    images[:, 1] = torch.where(labels == 1, 0.9, 0.2)[:, None, None]
    result = ablate_gates(nn.Sequential(OwnGate(), Threshold()), images, labels, batch_size=16)
    assert result["images"] == 40
    assert result["accuracy"] == 1.0
    rows = by_row(result)
    assert list(rows) == [(block, "channel", how) for block in ("0", "all") for how in REPLACEMENTS]
    for block in ("0", "all"):
        assert rows[block, "channel", "mean"]["accuracy"] == 0.75
        assert rows[block, "channel", "mean"]["change"] == -0.25
        # ten of forty changes are −1: the sample's standard deviation by √40
        assert rows[block, "channel", "mean"]["change_error"] == pytest.approx((0.25 * 0.75 * 40 / 39 / 40) ** 0.5)
        assert rows[block, "channel", "constant"]["accuracy"] == 0.25
    # The others: an image is right where its neighbour in the shuffled batch (of 14, 13 and 13) has its class.
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    partners = {}
    for batch in (order[:14], order[14:27], order[27:]):
        partners |= dict(zip(batch, batch[1:] + batch[:1], strict=True))
    assert all(image != partner for image, partner in partners.items())
    right = sum(labels[image] == labels[partner] for image, partner in partners.items())
    assert rows["0", "channel", "other image"]["accuracy"] == pytest.approx(int(right) / 40)


def test_cbams_second_gate_is_computed_from_what_the_replaced_first_one_passes_on():
    torch.manual_seed(0)
    attention, images = CBAM(8, reduction=2), 3 * torch.randn(12, 8, 5, 5)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 200))
    network = nn.Sequential(attention, head)
    with torch.no_grad():
        labels = network(images).argmax(1)
    result = by_row(ablate_gates(network, images, labels))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    with torch.no_grad():
        gates = attention.gates(images)
        channel, spatial = gates["channel"], gates["spatial"]

        def changed(channel, spatial=None):
            x = images * channel
            classes = head(x * (attention.spatial.gate(x) if spatial is None else spatial)).argmax(1)
            return (classes == labels).double().mean().item()

        of_channel = [channel.mean(0, keepdim=True), channel.mean(), channel.roll(-1, 0)]
        of_spatial = [spatial.mean(0, keepdim=True), spatial.mean(), spatial.roll(-1, 0)]
        for how, one, other in zip(REPLACEMENTS, of_channel, of_spatial, strict=True):
            expected = {"channel": changed(one), "spatial": changed(channel, other), "both": changed(one, other)}
            for gate, accuracy in expected.items():
                assert 0 < accuracy < 1
                assert result["0", gate, how]["accuracy"] == pytest.approx(accuracy)
                assert result["all", gate, how]["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("kind", "options", "gates"),
    [
        ("se", {}, ["channel"]),
        ("eca", {}, ["channel"]),
        ("spatial", {}, ["spatial"]),
        ("bam", {}, ["joint"]),
        ("cbam", {"order": "parallel"}, ["joint"]),
        ("cbam", {"order": "spatial_channel"}, ["spatial", "channel", "both"]),
        ("cbam", {"preset": "official"}, ["channel", "spatial", "both"]),
        ("cbam", {"preset": "timm"}, ["channel", "spatial", "both"]),
        ("cbam", {"preset": "keras"}, ["channel", "spatial", "both"]),
    ],
)
def test_equal_images_have_their_own_gates_as_mean_and_as_other_image(kind, options, gates):
    torch.manual_seed(0)
    network = build_network("cnn", 10, AttentionConfig(kind, **options)).train()
    images = torch.randn(1, 3, 32, 32).expand(3, -1, -1, -1)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    label = network.eval()(images[:1]).argmax(1)
    network.train()
    result = ablate_gates(network, images, label.expand(3))
    rows = by_row(result)
    blocks = ["blocks.0", "blocks.1", "blocks.2", "all"]
    assert list(rows) == [(block, gate, how) for block in blocks for gate in gates for how in REPLACEMENTS]
    assert result["accuracy"] == 1.0
    for (_, _, how), row in rows.items():
        assert how == "constant" or row["accuracy"] == 1.0
    assert network.training  # and nothing else of it has changed
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_bams_gate_is_what_it_multiplies_by():
    # Without weights it is 1 + 1/2 everywhere.
    attention = BAM(4)
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    images = torch.full((4, 4, 2, 2), 0.4)  # times 1.5 it is above Threshold's 0.5, times 0.5 below
    result = ablate_gates(nn.Sequential(attention, Threshold()), images, torch.ones(4, dtype=torch.long))
    assert result["accuracy"] == 1.0
    assert {row["accuracy"] for row in result["rows"]} == {1.0}


def test_without_attention_or_a_second_image():
    network = build_network("cnn", 10, "none")
    result = ablate_gates(network, torch.randn(3, 3, 32, 32), torch.zeros(3, dtype=torch.long))
    assert result["rows"] == []
    with pytest.raises(ValueError, match="at least two images"):
        ablate_gates(network, torch.randn(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
    shared = OwnGate()
    with pytest.raises(ValueError, match="the attention of 0 runs twice"):
        ablate_gates(nn.Sequential(shared, shared, Threshold()), torch.rand(2, 2, 2, 2), torch.zeros(2))


@pytest.mark.parametrize(("count", "batch_size"), [(3, 1), (5, 2)])
def test_no_image_keeps_its_gate_whatever_the_batches(count, batch_size):
    torch.manual_seed(0)
    network, images = nn.Sequential(CBAM(4, reduction=2), Threshold()), torch.randn(count, 4, 5, 5)
    sizes = []
    network[1].register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    ablate_gates(network, images, torch.zeros(count), batch_size)
    assert min(sizes) >= 2


class Residual(CBAM):
    def forward(self, x):
        return x + super().forward(x)


class Pair(OwnGate):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("attention", [Residual(2, reduction=1), Pair()])
def test_attention_that_is_not_its_input_times_its_gates_is_rejected(attention):
    class Head(Threshold):
        def forward(self, x):
            return super().forward(x[0] if isinstance(x, tuple) else x)

    with pytest.raises(ValueError, match="the attention of 0 does not give its input times its gates, so they cannot"):
        ablate_gates(nn.Sequential(attention, Head()), torch.rand(2, 2, 2, 2), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_order_of_the_same_products_differs_by_rounding_alone(dtype):
    class Reordered(CBAM):
        def forward(self, x):
            gates = self.gates(x)
            return x * (gates["channel"] * gates["spatial"])

    torch.manual_seed(0)
    network, images = nn.Sequential(Reordered(8, reduction=2), Threshold()).to(dtype), torch.randn(6, 8, 5, 5)
    assert ablate_gates(network, images, torch.zeros(6))["rows"]


def test_gates_of_another_form_are_rejected():
    class Experts(OwnGate):
        def gates(self, x):
            return x.mean((2, 3)).softmax(1)

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="the attention of 0 has gates of another form; gates"):
        ablate_gates(nn.Sequential(Experts(), Threshold()), torch.rand(2, 2, 2, 2), torch.zeros(2))
