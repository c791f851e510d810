import math
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from cbam_pl.attention import SpatialAttention
from cbam_pl.inspect.drawing import (
    Pictured,
    describe,
    draw_attention,
    draw_confusion,
    draw_features,
    draw_grad_cam,
    draw_heat_maps,
)
from cbam_pl.inspect.gates import AttentionMaps, FeatureMaps, attention_maps, feature_maps, grad_cam
from cbam_pl.inspect.page import COLOURS, DPI, blend, rasterise, save
from cbam_pl.models import build_network

CLASSES = ["airplane", "automobile", "a class with a very long name", "cat", "price in $ or $$"]


def pictured_of(count, value=None):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    if value is not None:
        pixels.fill_(value)
    logits = torch.eye(5)[torch.arange(count) % 5] * 4
    true = [CLASSES[index % 5] for index in range(count)]
    return Pictured(pixels, describe(logits, CLASSES, true, [f"test image {9000 + index}" for index in range(count)]))


def drawn(figure):
    """Where each image of a page lies, left to right and top to bottom, and what the page looks like."""
    pixels = rasterise(figure) / 255
    places = []
    for image in figure.axes[0].images:
        left, right, bottom, top = image.get_extent()
        rows = slice(round(top * DPI), round(bottom * DPI))
        columns = slice(round(left * DPI), round(right * DPI))
        places.append((top, left, pixels[rows, columns]))
    return [pixels for _, _, pixels in sorted(places, key=lambda place: (round(place[0], 3), place[1]))]


def value_of(colours, grey=None):
    """The value in [0, 1] whose colour is nearest, of colours (..., 3), laid over grey where that is given."""
    values = np.linspace(0, 1, 256)
    known = COLOURS(values)[:, :3] if grey is None else blend(np.full((1, 256), grey), values[None])[0]
    return values[((colours[..., None, :] - known) ** 2).sum(-1).argmin(-1)]


def assert_no_overlap(figure):
    """No two texts touch, none leaves the page, and none lies on an image, except where it is drawn in it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.findobj(lambda a: hasattr(a, "get_text"))]
    boxes = [(text, box) for text, box in boxes if text.strip()]
    width, height = figure.get_size_inches() * DPI
    for text, box in boxes:
        assert box.x0 >= -0.5, text
        assert box.y0 >= -0.5, text
        assert box.x1 <= width + 0.5, text
        assert box.y1 <= height + 0.5, text
    for (one, a), (other, b) in combinations(boxes, 2):
        assert min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1, (one, other)
    for image in figure.axes[0].images:
        frame = image.get_window_extent()
        for text, box in boxes:
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            apart = (
                min(frame.x1, box.x1) - max(frame.x0, box.x0) < 1 or min(frame.y1, box.y1) - max(frame.y0, box.y0) < 1
            )
            assert apart or inside, text


def test_captions_name_the_true_and_the_predicted_class():
    captions = describe(torch.tensor([[0.0, math.log(3.0)]]), ["cat", "dog"], ["cat"], ["test image 7"])
    assert captions == ["test image 7\ntrue: cat\npredicted: dog\nprobability 75 %"]
    assert describe(torch.tensor([[9.0, -9.0]]), ["cat", "dog"]) == ["predicted: cat\nprobability 100 %"]


def test_attention_shows_a_gate_set_by_hand_at_its_place_and_value():
    attention = SpatialAttention(kernel_size=1)
    attention.conv.weight.data = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)
    x = torch.full((2, 3, 16, 16), -1.0)
    x[0, :, 4:8, 10:16] = 1.0  # a rectangle, right of the middle
    maps = attention_maps(nn.Sequential(attention), x)
    figure = draw_attention(pictured_of(2, value=128), maps, "by hand")
    first_image, first, second_image, second, scale = drawn(figure)
    assert first.shape == (128, 128, 3)  # each of the 16×16 places is 8 pixels wide
    assert np.allclose(first_image, 128 / 255, atol=0.01)
    grey = 128 / 255
    values = value_of(first, grey)
    assert values[38:58, 86:124].min() > 0.97  # the rectangle, but for its blurred rim
    assert values[:26].max() < 0.03
    assert values[:, :74].max() < 0.03
    assert value_of(second, grey).max() < 0.03  # shared scale: the second image has no such place
    assert np.allclose(second_image, grey, atol=0.01)
    assert value_of(scale, 0.5)[5].tolist() == pytest.approx(np.linspace(0, 1, 128), abs=0.03)
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert {"0.12", "0.50", "0.88"} <= set(numbers)  # sigmoid(-2) and sigmoid(2)


def test_attention_shows_channel_gates_as_sorted_bars():
    channel = torch.tensor([[0.25, 1.0, 0.5, 0.75]])
    figure = draw_attention(pictured_of(1, value=128), {"block": AttentionMaps(channel, None)}, "bars")
    (outline,) = figure.axes[0].patches
    left, top = outline.get_xy()[:, 0].min(), outline.get_xy()[:, 1].min()
    pixels = rasterise(figure)
    x0, y0 = round(left * DPI), round(top * DPI)
    filled = (pixels[y0 : y0 + 128, x0 : x0 + 128].astype(int) - pixels[y0 + 120, x0 + 5]).__abs__().sum(-1) < 30
    heights = [int(filled[:, 16 + 32 * bar].sum()) for bar in range(4)]
    assert heights == pytest.approx([128, 96, 64, 32], abs=4)


def test_a_flat_gate_is_not_stretched_until_it_looks_alive():
    generator = torch.Generator().manual_seed(0)
    flat = 0.5 + 1e-3 * torch.rand(2, 8, 8, generator=generator)
    figure = draw_attention(pictured_of(2, value=128), {"block": AttentionMaps(None, flat)}, "flat")
    _, first, *_ = drawn(figure)
    assert np.ptp(value_of(first, 128 / 255)) < 0.05
    assert {"0.475", "0.500", "0.525"} <= {text.get_text() for text in figure.axes[0].texts} or {
        "0.48",
        "0.53",
    } <= {text.get_text() for text in figure.axes[0].texts}


def test_features_show_the_first_nine_channels_each_at_its_place():
    output = torch.zeros(1, 12, 4, 4)
    output[0, torch.arange(9)] = (torch.arange(9.0) / 8).view(9, 1, 1)
    output[0, 9:] = 1.0  # never shown
    output[0, 3, 0, 0] = 1.0
    features = FeatureMaps(torch.zeros(1, 5), {"block": output}, output)
    image, mosaic, _ = drawn(draw_features(pictured_of(1), features, "features"))
    assert mosaic.shape == (200, 200, 3)
    for channel in range(9):
        y, x = 68 * (channel // 3), 68 * (channel % 3)
        assert value_of(mosaic[y + 40 : y + 62, x + 40 : x + 62]) == pytest.approx(channel / 8, abs=0.01)
    assert value_of(mosaic[70:82, 2:14]) == pytest.approx(1.0, abs=0.01)  # channel 3's left upper place
    assert (mosaic[65:67] > 0.99).all()  # white between
    assert image.std() > 0.2


def test_heat_maps_take_each_images_own_three_most_active_channels():
    last = torch.zeros(2, 6, 8, 8)
    last[0, 4], last[0, 1], last[0, 2] = 3.0, 2.0, 1.0
    last[1, 5], last[1, 0], last[1, 3] = 4.0, 2.5, 0.5
    last[1, 5, :, :4] = 0.0
    features = FeatureMaps(torch.zeros(2, 5), {}, last)
    figure = draw_heat_maps(pictured_of(2, value=128), features, "heat")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [text for text in texts if text.startswith("channel")] == [
        "channel 4\nmean 3.00",
        "channel 0\nmean 2.50",
        "channel 1\nmean 2.00",
        "channel 5\nmean 2.00",
        "channel 2\nmean 1.00",
        "channel 3\nmean 0.50",
    ]
    _, *first = drawn(figure)[:4]
    assert [value_of(panel, 128 / 255).mean() for panel in first] == pytest.approx([3 / 4, 2 / 4, 1 / 4], abs=0.01)
    _, _, second, _ = drawn(figure)[4:8]
    values = value_of(second, 128 / 255)
    assert values[:, :50].max() < 0.03
    assert values[:, 80:].min() > 0.97
    assert values[64, 64] == pytest.approx(0.5, abs=0.1)  # bilinear in between


def test_grad_cam_is_relative_to_each_images_maximum_and_stands_beside_the_gates():
    cams = torch.zeros(2, 32, 32)
    cams[0, 8:16, 8:16] = 5.0
    cams[1, 16:24, 0:8] = 0.1
    gate = torch.linspace(0.2, 0.8, 16).view(1, 4, 4).repeat(2, 1, 1)
    maps = {"one": AttentionMaps(None, gate), "bars": AttentionMaps(torch.rand(2, 4), None)}
    panels = drawn(draw_grad_cam(pictured_of(2, value=128), cams, maps, "cam"))
    first, gate_panel, second = value_of(panels[1], 0.502), value_of(panels[2], 0.502), value_of(panels[4], 0.502)
    assert first[36:60, 36:60].min() > 0.97
    assert first[80:].max() < 0.03
    assert second[68:92, 4:28].min() > 0.97
    assert second[:60].max() < 0.03
    assert gate_panel[2, 2] < 0.03
    assert gate_panel[-3, -3] > 0.97
    assert len(panels) == 2 * 3 + 2  # two rows of image, Grad-CAM and the one spatial gate; two scales


def test_confusion_shows_counts_and_shares_of_the_row():
    counts = torch.tensor([[6, 2, 0], [0, 5, 0], [1, 1, 2]])
    figure = draw_confusion(counts, ["cat", "dog", "ship"], "confusion")
    matrix, _ = drawn(figure)
    cell = len(matrix) / 3
    corner = [[matrix[int(row * cell) + 3, int(column * cell) + 3] for column in range(3)] for row in range(3)]
    shares = value_of(np.array(corner))
    assert shares == pytest.approx(np.array([[0.75, 0.25, 0], [0, 1, 0], [0.25, 0.25, 0.5]]), abs=0.01)
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert [text for text in numbers if text.isdigit()] == ["6", "2", "0", "0", "5", "0", "1", "1", "2"]
    assert numbers.count("cat") == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_map_that_is_not_finite_is_an_error(bad):
    maps = torch.rand(2, 4, 4)
    broken = maps.clone()
    broken[1, 2, 3] = bad
    pictured, logits = pictured_of(2), torch.zeros(2, 5)
    with pytest.raises(
        ValueError, match="the spatial gate of block holds NaN or infinity: the network has diverged; choose"
    ):
        draw_attention(pictured, {"block": AttentionMaps(None, broken)}, "")
    with pytest.raises(ValueError, match="the channel gate of block holds NaN or infinity"):
        draw_attention(pictured, {"block": AttentionMaps(torch.tensor([[0.5, bad]] * 2), maps)}, "")
    with pytest.raises(ValueError, match="Grad-CAM holds NaN or infinity"):
        draw_grad_cam(pictured, broken, {}, "")
    with pytest.raises(ValueError, match="the output of block holds NaN or infinity"):
        draw_features(pictured, FeatureMaps(logits, {"block": broken[:, None]}, maps[:, None]), "")
    with pytest.raises(ValueError, match="the last convolution's output holds NaN or infinity"):
        draw_heat_maps(pictured, FeatureMaps(logits, {}, broken[:, None]), "")


def test_a_blank_map_is_an_error():
    blank, pictured, logits = torch.full((2, 4, 4), 0.5), pictured_of(2), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"the spatial gate of block is 0\.500 everywhere in every image"):
        draw_attention(pictured, {"block": AttentionMaps(None, blank)}, "")
    with pytest.raises(ValueError, match=r"Grad-CAM is 0\.000 everywhere in every image"):
        draw_grad_cam(pictured, torch.zeros(2, 32, 32), {}, "")
    with pytest.raises(ValueError, match=r"the output of block is 0\.500 everywhere"):
        draw_features(pictured, FeatureMaps(logits, {"block": blank[:, None]}, blank[:, None]), "")
    with pytest.raises(ValueError, match="the last convolution's output is"):
        draw_heat_maps(pictured, FeatureMaps(logits, {}, blank[:, None]), "")
    with pytest.raises(ValueError, match="this network has no gates"):
        draw_attention(pictured, {}, "")


@pytest.mark.parametrize(
    ("arch", "kind", "count"),
    [("cnn", "cbam", 3), ("cnn", "cbam", 1), ("cnn", "se", 2), ("cnn", "none", 2), ("resnet18", "cbam", 8)],
)
def test_nothing_overlaps_and_everything_is_on_the_page(arch, kind, count):
    torch.manual_seed(0)
    network = build_network(arch, 5, kind).eval()
    pictured = pictured_of(count)
    images = pictured.pixels / 128 - 1
    features, maps = feature_maps(network, images), attention_maps(network, images)
    title = "a_recipe_with_a_long_name-version_12 (cnn, attention cbam, epoch 50) " + "and more " * 20
    figures = [draw_features(pictured, features, f"Features\n{title}")]
    figures.append(draw_heat_maps(pictured, features, f"Most active channels\n{title}"))
    figures.append(
        draw_grad_cam(pictured, grad_cam(network, images, features.logits.argmax(1)), maps, f"Grad-CAM\n{title}")
    )
    if maps:
        figures.append(draw_attention(pictured, maps, f"Attention\n{title}"))
    for figure in figures:
        assert_no_overlap(figure)


@pytest.mark.parametrize("count", [2, 10, 100])
def test_confusion_has_no_overlap(count):
    classes = [f"some class number {index}" for index in range(count)]
    assert_no_overlap(
        draw_confusion(torch.eye(count).long() * 1000, classes, "Confusion of 5,000 validation images\nepoch 5")
    )


def test_the_colours_rise_in_brightness_so_that_no_colour_vision_is_needed():
    linear = COLOURS(np.linspace(0, 1, 64))[:, :3] ** 2.2
    assert (np.diff(linear @ [0.2126, 0.7152, 0.0722]) > 0).all()


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_every_format_is_written(tmp_path, suffix, start):
    path = tmp_path / f"confusion.{suffix}"
    save(draw_confusion(torch.eye(3).long(), ["a", "b", "c"], "confusion"), path)
    assert path.read_bytes().startswith(start)
