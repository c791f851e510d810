import pytest
import torch
import torch.nn.functional as F
import torchvision
from pytorch_grad_cam.metrics.road import NoisyLinearImputer
from torch import nn

from cbam_pl.inspect.gates import attention_maps, feature_maps, upsample
from cbam_pl.inspect.scores import (
    DELETED,
    ROAD_PERCENTS,
    deletion_curve,
    deletion_order,
    energy_inside,
    grad_cam,
    measure,
    noisy_linear,
    pointing_game,
)
from cbam_pl.models import build_network


def masks_of(*rows):
    return torch.tensor(rows).bool()


def test_grad_cam_is_the_papers_equations():
    torch.manual_seed(1)
    network, x = build_network("cnn", 10, "cbam").eval(), torch.randn(3, 3, 32, 32)
    classes = torch.tensor([3, 0, 7])
    maps = grad_cam(network, x, classes)
    seen = []
    hook = network.blocks[2].relu.register_forward_hook(lambda module, arguments, output: seen.append(output))
    logits = network(x)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[range(3), classes].sum(), seen)
    coarse = F.relu((gradient.mean((2, 3), keepdim=True) * seen[0]).sum(1, keepdim=True))  # (B, 1, 8, 8)
    expected = F.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(maps, expected.detach())
    assert maps.max() > 0


@pytest.mark.parametrize(("layer", "shown"), [(None, "features"), ("features.transition2", "features.transition2")])
def test_grad_cam_of_a_layer_of_any_network(layer, shown):
    torch.manual_seed(1)
    network, x = torchvision.models.densenet121(num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    classes = torch.tensor([3, 0])
    maps = grad_cam(network, x, classes, layer)
    seen = []

    def keep(module, arguments, output):
        seen.append(output)
        return output.clone()  # a ReLU in place follows

    hook = network.get_submodule(shown).register_forward_hook(keep)
    logits = network(x)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[range(2), classes].sum(), seen)
    coarse = F.relu((gradient.mean((2, 3), keepdim=True) * seen[0]).sum(1, keepdim=True))
    expected = F.interpolate(coarse, size=(64, 64), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(maps, expected.detach())


def test_a_layer_without_maps_is_named():
    network = torchvision.models.resnet18().eval()
    for name, near in (("fc", "layer4, avgpool"), ("layr3", "layer3")):
        with pytest.raises(ValueError, match=rf"^--layer {name} is not a module that gives \(B, C, H, W\); .*{near}"):
            grad_cam(network, torch.randn(1, 3, 64, 64), torch.tensor([0]), name)


def test_a_layer_without_a_gradient_is_named():
    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            with torch.no_grad():
                x = self.backbone(x)
            return self.head(x.mean((2, 3)))

    message = "^no gradient of the classes reaches {}; name another with --layer$"
    for layer, which in ((None, "the last map"), ("backbone", "backbone")):
        with pytest.raises(ValueError, match=message.format(which)):
            grad_cam(Probe(), torch.randn(1, 3, 8, 8), torch.tensor([0]), layer)


def test_energy_inside_is_above_the_maps_minimum():
    maps = torch.tensor([[[0.5, 0.5], [0.8, 0.6]], [[0.2, 0.2], [0.2, 0.2]]])
    masks = masks_of([[0, 0], [1, 0]], [[0, 1], [1, 1]])
    # 0.3 of 0.4; and a constant map has the object's fraction of the image, as by chance
    assert energy_inside(maps, masks).tolist() == pytest.approx([0.75, 0.75])


def test_pointing_game_asks_for_the_maximum_and_shares_ties():
    maps = torch.tensor([[[0.1, 0.9], [0.3, 0.2]], [[0.1, 0.2], [0.9, 0.2]], [[0.4, 0.4], [0.4, 0.4]]])
    masks = masks_of([[0, 1], [0, 0]], [[1, 0], [0, 0]], [[1, 0], [0, 0]])
    assert pointing_game(maps, masks).tolist() == [1.0, 0.0, 0.25]


def test_deletion_order_is_by_importance_and_equal_pixels_come_in_any_order():
    maps = torch.arange(9.0).flip(0).view(1, 3, 3)
    assert deletion_order(maps)[0].tolist() == list(range(9))
    order = deletion_order(torch.ones(200, 4, 4))  # (200, 16)
    assert (order.sort(1).values == torch.arange(16)).all()
    first = torch.bincount(order[:, 0], minlength=16)
    assert first.max() < 40  # of 200: no corner is preferred
    assert (first > 0).all()


def test_deletion_removes_the_most_important_pixels_first():
    # The class is whether the left upper pixel is bright: a map that knows it loses all at once, the reverse nothing.
    images = torch.zeros(10, 1, 10, 10)
    labels = torch.arange(10) % 2
    images[:, 0, 0, 0] = 2.0 * labels - 1

    def classify(batch):
        corner = batch[:, 0, 0, 0]
        return torch.where(corner == 0, -1, (corner > 0).long())

    knowing = torch.zeros(10, 10, 10)
    knowing[:, 0, 0] = 1
    assert set(deletion_curve(classify, images, labels, knowing).values()) == {0.0}
    assert set(deletion_curve(classify, images, labels, -knowing).values()) == {1.0}
    at_random = deletion_curve(classify, images.repeat(100, 1, 1, 1), labels.repeat(100), torch.ones(1000, 10, 10))
    assert list(at_random) == list(DELETED)
    assert at_random[30] == pytest.approx(0.7, abs=0.06)  # four standard errors
    assert at_random[90] == pytest.approx(0.1, abs=0.04)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # NumPy's, of pytorch_grad_cam
def test_noisy_linear_imputation_is_that_of_pytorch_grad_cam():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 3, 16, 12, generator=generator)
    missing = torch.rand(40, 1, 16, 12, generator=generator) < torch.arange(1, 41).view(-1, 1, 1, 1) / 42
    missing[5:10, :, :12] = True  # one hole, which three edges cut
    missing[:, :, -1, -1] = False  # in every image something is known
    imputer = NoisyLinearImputer(noise=0.0)
    expected = [imputer(image, (~gap[0]).float()) for image, gap in zip(images, missing, strict=True)]
    filled = noisy_linear(images, missing, noise=0.0)
    torch.testing.assert_close(filled, torch.stack(expected), atol=1e-3, rtol=0)
    noisy = noisy_linear(images, missing)
    assert torch.equal(noisy, noisy_linear(images, missing))
    known = ~missing.expand_as(images)
    assert torch.equal(noisy[known], images[known])
    assert (noisy - filled)[~known].std().item() == pytest.approx(0.01, rel=0.05)
    nothing = noisy_linear(images, torch.ones_like(missing), noise=0.0)
    assert torch.equal(nothing, torch.zeros_like(images))


def test_a_missing_pixel_is_the_weighted_mean_of_its_neighbours():
    image = torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, 5.0], [6.0, 7.0, 99.0]]).view(1, 1, 3, 3)
    missing = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    missing[..., 1, 1] = missing[..., 2, 2] = True
    # middle = (2 + 4 + 5 + 7) / 6 + (1 + 3 + 6 + corner) / 12; corner = (5 / 6 + 7 / 6 + middle / 12) / (5 / 12)
    middle = (18 / 6 + 10 / 12 + 24 / 5 / 12) / (1 - 1 / 60)
    corner = (2 + middle / 12) * 12 / 5
    filled = noisy_linear(image, missing, noise=0.0)
    assert filled[0, 0, 1, 1].item() == pytest.approx(middle, abs=1e-4)
    assert filled[0, 0, 2, 2].item() == pytest.approx(corner, abs=1e-4)


def test_measure_has_every_gate_grad_cam_and_the_uniform_map():
    torch.manual_seed(0)
    network = build_network("cnn", 10).eval()
    images, labels = torch.randn(30, 3, 32, 32), torch.arange(30) % 10
    masks = torch.zeros(30, 1, 32, 32, dtype=torch.bool)
    masks[:, :, 8:16, 8:24] = True
    measures = {row["map"]: row for row in measure(network, images, labels, masks, batch_size=7)}
    assert list(measures) == ["blocks.0", "blocks.1", "blocks.2", "Grad-CAM", "uniform"]
    logits = feature_maps(network, images).logits
    assert measures["uniform"]["inside"] == pytest.approx(1 / 8)
    assert measures["uniform"]["pointing"] == pytest.approx(1 / 8)
    gates = upsample(attention_maps(network, images)["blocks.1"].spatial, (32, 32))
    inside = energy_inside(gates, masks[:, 0])
    assert measures["blocks.1"]["inside"] == pytest.approx(inside.mean().item())
    assert measures["blocks.1"]["inside_error"] == pytest.approx(inside.std().item() / 30**0.5)
    cams = grad_cam(network, images, logits.argmax(1))
    assert measures["Grad-CAM"]["pointing"] == pytest.approx(pointing_game(cams, masks[:, 0]).mean().item())
    # ROAD, on every fourth image: without the 30 % most important pixels, and with the 30 % most important alone
    some, order = images[::4], deletion_order(cams[::4])
    for key, removed in (("road_without_30_percent", order[:, :307]), ("road_with_30_percent", order[:, 307:])):
        missing = torch.zeros(8, 1024).scatter(1, removed, 1).bool().view(8, 1, 32, 32)
        classes = feature_maps(network, noisy_linear(some, missing)).logits.argmax(1)
        assert measures["Grad-CAM"][key] == pytest.approx((classes == labels[::4]).double().mean().item())
    names = [f"road_{what}_{percent}_percent" for what in ("without", "with") for percent in ROAD_PERCENTS]
    for row in measures.values():
        assert list(row)[5:15] == [f"accuracy_without_{percent}_percent" for percent in (0, *DELETED)]
        assert list(row)[15:] == ["road_images", "road_without_0_percent", *names]
        assert row["road_images"] == 8
        assert row["accuracy_without_0_percent"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_measure_without_gates_or_masks():
    network = build_network("cnn", 10, "se").eval()
    measures = measure(network, torch.randn(5, 3, 32, 32), torch.arange(5), None)
    assert [row["map"] for row in measures] == ["Grad-CAM", "uniform"]
    assert all(row["inside"] is None and row["pointing"] is None for row in measures)
