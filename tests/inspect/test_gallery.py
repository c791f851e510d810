import json
import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cbam_pl import attention_maps, build_network
from cbam_pl.inspect.gallery import NetworkView, render_gallery, view_network
from cbam_pl.inspect.gates import AttentionMaps
from cbam_pl.inspect.scores import grad_cam

CLASSES = ["cat", "</script>", "dog & co"]


def content_of(page):
    return json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.DOTALL)[1])


def values_of(gate):
    """A gate's values, (N, H, W) or (N, C), from its bytes."""
    numbers = np.frombuffer(b64decode(gate["bytes"]), np.uint8).reshape(-1, *gate["shape"])
    return gate["low"] + numbers / 255 * (gate["high"] - gate["low"])


def noise(count, size=32, channels=3):
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(0)).byte()


def view(name="net", maps=None, count=4, size=8, logits=None):
    logits = torch.eye(3).repeat(2, 1)[:count].double() if logits is None else logits
    return NetworkView(name, "a network", logits, torch.rand(count, size, size), maps or {})


def page_of(*views, pixels=None):
    count = len(views[0].logits)
    pixels = noise(count, 8) if pixels is None else pixels
    return render_gallery("A <title>", pixels, torch.arange(count) % 3, range(count), CLASSES, views)


def test_the_page_holds_what_the_network_computes():
    torch.manual_seed(1)
    network = build_network("resnet20", 3, attention="cbam").eval()
    pixels = noise(3, 16)
    inputs, labels = pixels / 128 - 1.0, torch.tensor([2, 0, 1])
    page = render_gallery("", pixels, labels, [7, 8, 9], CLASSES, [view_network(network, inputs, "net", "")])
    content = content_of(page)
    assert content["classes"] == CLASSES
    assert content["images"]["number"] == [7, 8, 9]
    assert content["images"]["label"] == [2, 0, 1]
    for url, one in zip(content["images"]["picture"], pixels, strict=True):
        decoded = np.asarray(Image.open(BytesIO(b64decode(url.removeprefix("data:image/png;base64,")))))
        assert np.array_equal(decoded, one.permute(1, 2, 0))
    (shown,) = content["networks"]
    with torch.no_grad():
        logits = network(inputs)
    assert shown["loss"] == pytest.approx(F.cross_entropy(logits, labels, reduction="none").tolist(), abs=1e-4)
    for top, probabilities in zip(shown["top"], logits.softmax(1), strict=True):
        order = probabilities.argsort(descending=True).tolist()
        assert [label for label, _ in top] == order
        assert [value for _, value in top] == pytest.approx(probabilities[order].tolist(), abs=1e-4)
    cams = grad_cam(network, inputs, logits.argmax(1)).numpy()
    assert values_of(shown["cam"]) == pytest.approx(cams / cams.max((1, 2), keepdims=True), abs=0.5 / 255 + 1e-6)
    maps = attention_maps(network, inputs)
    assert [block["name"] for block in shown["blocks"]] == list(maps)
    for block, gates in zip(shown["blocks"], maps.values(), strict=True):
        step = (block["spatial"]["high"] - block["spatial"]["low"]) / 255
        assert values_of(block["spatial"]) == pytest.approx(gates.spatial.numpy(), abs=0.5 * step + 1e-6)
        by_mean = gates.channel[:, gates.channel.mean(0).argsort(descending=True)]
        assert values_of(block["channel"]) == pytest.approx(by_mean.numpy(), abs=0.5 / 255 + 1e-6)


def test_with_test_time_flip_the_prediction_is_that_of_both_images():
    torch.manual_seed(0)
    network, inputs = build_network("cnn", 3, attention="none").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = (network(inputs) + network(inputs.flip(3))) / 2
    assert torch.allclose(view_network(network, inputs, "", "", flip=True).logits, expected.double(), atol=1e-6)


def test_the_page_stays_below_its_limit_whatever_the_networks_are():
    def gates(blocks):
        return {
            str(number): AttentionMaps(torch.rand(200, channels), torch.rand(200, size, size))
            for number, (channels, size) in enumerate(blocks)
        }

    deep = gates([(16, 32)] * 18 + [(32, 16)] * 18 + [(64, 8)] * 18)  # resnet110
    wide = gates([(256, 32)] * 3 + [(512, 16)] * 8 + [(1024, 8)] * 36 + [(2048, 4)] * 3)  # resnet152
    logits = torch.randn(200, 3).double()
    for maps in (deep, wide):
        views = [view(name, maps, 200, 32, logits) for name in "abc"]
        page = page_of(*views, pixels=noise(200))
        assert 7_000_000 < len(page.encode()) < 10_000_000
    spatial, channel = (content_of(page)["networks"][0]["blocks"][-1][kind] for kind in ("spatial", "channel"))
    assert spatial["full"] == spatial["shape"] == [4, 4]
    assert channel["full"] == [2048]
    assert channel["shape"] == [len(range(0, 2048, 21))]
    # Few or small networks keep everything.
    few = content_of(page_of(view("a", gates([(256, 32)] * 3), 200, 32, logits), pixels=noise(200)))
    assert [few["networks"][0]["blocks"][0][kind]["shape"] for kind in ("spatial", "channel")] == [[32, 32], [256]]


def test_large_maps_are_means_and_large_images_are_small_photographs():
    large = torch.rand(2, 128, 128)
    smooth = F.interpolate(noise(2, 8).float(), size=(256, 256), mode="bilinear").byte()
    page = page_of(view(maps={"block": AttentionMaps(None, large)}, count=2, size=128), pixels=smooth)
    content = content_of(page)
    gate = content["networks"][0]["blocks"][0]["spatial"]
    assert gate["full"] == [128, 128]
    assert gate["shape"] == [64, 64]
    means = large.view(2, 64, 2, 64, 2).mean((2, 4)).numpy()
    assert values_of(gate) == pytest.approx(means, abs=0.5 * (gate["high"] - gate["low"]) / 255 + 1e-6)
    picture = Image.open(BytesIO(b64decode(content["images"]["picture"][0].removeprefix("data:image/jpeg;base64,"))))
    assert picture.size == (128, 128)


def test_gates_above_one_and_constant_gates_have_their_values():
    channel, spatial = torch.tensor([[0.5, 1.6]] * 4), torch.full((4, 2, 2), 1.5)
    content = content_of(page_of(view(maps={"block": AttentionMaps(channel, spatial)})))
    (block,) = content["networks"][0]["blocks"]
    assert values_of(block["channel"]) == pytest.approx(channel.flip(1).numpy(), abs=0.004)
    assert values_of(block["spatial"]) == pytest.approx(spatial.numpy(), abs=0.001)
    assert block["spatial"]["high"] - block["spatial"]["low"] == pytest.approx(0.05)


def test_a_diverged_network_gets_no_page():
    bad = torch.full((4, 2, 2), float("nan"))
    with pytest.raises(ValueError, match=r"the spatial gate of block in net holds NaN or infinity"):
        page_of(view(maps={"block": AttentionMaps(None, bad)}))
    with pytest.raises(ValueError, match=r"the output of net holds NaN"):
        page_of(view(logits=torch.full((4, 3), float("inf")).double()))


def test_names_are_text_and_nothing_comes_from_outside():
    page = page_of(view())
    assert "A &lt;title&gt;" in page
    assert page.count("</script>") == 2
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=|https?:|url\(|@import|fetch\(", page)
