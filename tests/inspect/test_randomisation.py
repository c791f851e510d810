from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from cbam_pl.attention import AttentionConfig
from cbam_pl.inspect import randomisation
from cbam_pl.inspect.gates import attention_maps, feature_maps
from cbam_pl.inspect.randomisation import cascading_randomisation, rank_correlation
from cbam_pl.inspect.scores import grad_cam
from cbam_pl.models import build_network, insert_attention


def test_rank_correlation_is_scipys():
    torch.manual_seed(0)
    maps = torch.randn(5, 4, 6).relu()  # many ties at zero
    others = 0.5 * maps + torch.randn(5, 4, 6).relu()
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(maps.flatten(1), others.flatten(1), strict=True)]
    np.testing.assert_allclose(rank_correlation(maps, others), expected, atol=1e-12)
    np.testing.assert_allclose(rank_correlation(maps[:1], maps[:1].exp()), 1)
    np.testing.assert_allclose(rank_correlation(maps[:1], -maps[:1]), -1)
    maps[2] = 0.3
    assert np.isnan(rank_correlation(maps, others)).tolist() == [False, False, True, False, False]


def test_a_gate_changes_when_its_own_block_is_randomised_and_not_before():
    torch.manual_seed(1)
    network, images = build_network("cnn", 10, "cbam").eval(), torch.randn(6, 3, 32, 32)
    result = cascading_randomisation(network, images, batch_size=4)
    assert result["images"] == 6
    assert result["layers"] == ["classifier", "blocks.2", "blocks.1", "blocks.0"]
    spearman = result["spearman"]
    assert list(spearman) == ["Grad-CAM", "blocks.0", "blocks.1", "blocks.2"]
    assert spearman["Grad-CAM"][0] is not None
    for name, unchanged in (("Grad-CAM", 0), ("blocks.2", 1), ("blocks.1", 2), ("blocks.0", 3)):
        assert spearman[name][:unchanged] == pytest.approx([1] * unchanged)
        assert all(value is None or abs(value) < 0.9 for value in spearman[name][unchanged:])
        assert [value is None for value in spearman[name]] == [count == 0 for count in result["compared"][name]]
        assert name == "Grad-CAM" or result["compared"][name] == [6] * 4
    assert cascading_randomisation(network, images)["spearman"]["blocks.1"] == pytest.approx(spearman["blocks.1"])
    assert cascading_randomisation(network, images, seed=1)["spearman"] != spearman


def test_each_step_is_the_network_with_fresh_layers_at_the_top():
    torch.manual_seed(1)
    network, images = build_network("resnet20", 10, "spatial").eval(), torch.randn(2, 3, 16, 16)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random_state = torch.get_rng_state()
    result = cascading_randomisation(network, images, seed=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    stages = [f"stages.{stage}.{block}" for stage in (2, 1, 0) for block in (2, 1, 0)]
    assert result["layers"] == ["classifier", *stages, "stem"]
    classes = feature_maps(network, images).logits.argmax(1)
    maps = grad_cam(network, images, classes), attention_maps(network, images)["stages.2.0"].spatial
    torch.manual_seed(3)
    fresh = build_network("resnet20", 10, "spatial").eval()
    torch.manual_seed(3)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh.stem, fresh.stages[0], fresh.stages[1] = network.stem, network.stages[0], network.stages[1]
    others = grad_cam(fresh, images, classes), attention_maps(fresh, images)["stages.2.0"].spatial
    step = result["layers"].index("stages.2.0")
    for name, one, other in zip(("Grad-CAM", "stages.2.0"), maps, others, strict=True):
        values = rank_correlation(one, other)
        assert result["spearman"][name][step] == pytest.approx(values[~np.isnan(values)].mean(), abs=1e-6)


class Parts(nn.Module):
    """Convolutions, of which the middle one is inside a module that gives no map, a pool, and a head."""

    def __init__(self, convolutional_head=False):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.between = nn.MultiheadAttention(8, 2, batch_first=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(8, 4, 1) if convolutional_head else nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        rows = x.flatten(2).transpose(1, 2)
        rows = self.between(rows, rows, rows)[0]
        x = self.pool(torch.relu(self.last(rows.transpose(1, 2).view(x.shape))))
        return self.head(x).flatten(1) if isinstance(self.head, nn.Conv2d) else self.head(x.flatten(1))


class Twice(Parts):
    """The same modules by two names."""

    def __init__(self):
        super().__init__()
        self.features = nn.ModuleList([self.first, self.last])


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.classifier_head = Parts(), nn.Linear(4, 3)

    def forward(self, x):
        return self.classifier_head(torch.relu(self.backbone(x)))


class Listed(nn.Module):
    """All convolutions are in a list, with attention after the first."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)])
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 3)
        insert_attention(self, AttentionConfig("se"), "layers.0", torch.zeros(1, 3, 16, 16))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(self.pool(x).flatten(1))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Parts, ["head", "last", "first", "between"]),
        (partial(Parts, True), ["head", "last", "first", "between"]),
        (Twice, ["head", "last", "first", "between"]),
        (Wrapped, ["head", "backbone.last", "backbone.first", "backbone.between"]),
        (Listed, ["head", "layers.1", "layers.0"]),
    ],
)
def test_a_network_of_another_is_randomised_from_its_top_down(make, expected, monkeypatch):
    torch.manual_seed(1)
    trained, seen = make(), []
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    whole = {name: tensor.clone() for name, tensor in trained.state_dict().items()}

    def note(changed, *_):
        seen.append({name for name, tensor in changed.state_dict().items() if not torch.equal(tensor, whole[name])})
        return {"Grad-CAM": torch.rand(2, 4, 4)}

    monkeypatch.setattr(randomisation, "_maps", note)
    layers = cascading_randomisation(trained, torch.rand(2, 3, 16, 16))["layers"]
    assert layers == ["classifier", *("the rest" if "between" in name else name for name in expected[1:])]
    # MultiheadAttention has no public reset_parameters, but for that of its part.
    resettable = {name for name in whole if "in_proj" not in name}
    for step, after in enumerate(seen[1:], 1):
        assert {name.replace("features.0", "first").replace("features.1", "last") for name in after} == {
            name for name in resettable if any(part in name for part in expected[:step]) and "features" not in name
        }
