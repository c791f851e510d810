import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from cbam_pl.inspect import randomisation
from cbam_pl.inspect.gates import attention_maps, feature_maps
from cbam_pl.inspect.randomisation import cascading_randomisation, rank_correlation
from cbam_pl.inspect.scores import grad_cam
from cbam_pl.models import build_network


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


class Backbone(nn.Module):
    """Convolutions, one of them inside a list, which gives no map itself."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.between = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1)])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.last(torch.relu(self.between[0](torch.relu(self.first(x)))))).mean((2, 3)))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.backbone(x)))


@pytest.mark.parametrize(("network", "prefix"), [(Backbone, ""), (Wrapped, "backbone.")])
def test_a_network_of_another_keeps_what_runs_before_its_last_block(network, prefix, monkeypatch):
    torch.manual_seed(1)
    trained, seen = network(), []

    def note(changed, *_):
        seen.append({name for name, tensor in changed.state_dict().items() if not torch.equal(tensor, whole[name])})
        return {"Grad-CAM": torch.rand(2, 4, 4)}

    whole = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    monkeypatch.setattr(randomisation, "_maps", note)
    found = cascading_randomisation(trained, torch.rand(2, 3, 16, 16))
    assert found["layers"] == ["classifier", f"{prefix}last", f"{prefix}first", "the rest"]
    heads = {name for name in whole if "head" in name}
    last, first, between = (
        {f"{prefix}{name}.{kind}" for kind in ("weight", "bias")} for name in ("last", "first", "between.0")
    )
    assert seen == [set(), heads, heads | last, heads | last | first, heads | last | first | between]
