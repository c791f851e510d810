import math
import os
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from torch import nn

from cbam_pl.attention import SpatialAttention
from cbam_pl.inspect.drawing import (
    COLOURS,
    DPI,
    CaptionedImages,
    cut,
    describe,
    draw_attention,
    draw_confusion,
    draw_features,
    draw_grad_cam,
    draw_heat_maps,
    draw_reliability,
    rasterise,
)
from cbam_pl.inspect.gates import AttentionMaps, FeatureMaps, attention_maps, feature_maps
from cbam_pl.inspect.scores import grad_cam
from cbam_pl.models import build_network

CLASSES = ["airplane", "automobile", "a class with a very long name", "cat", "price in $ or $$"]


def images_of(count, value=None):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    if value is not None:
        pixels.fill_(value)
    logits = torch.eye(5)[torch.arange(count) % 5] * 4
    headings = [f"test image {9000 + index}\ntrue: {CLASSES[index % 5]}" for index in range(count)]
    return CaptionedImages(pixels, describe(logits, CLASSES, headings))


def columns_of(figure):
    """The axes of each column, with their topmost images (B · 142, 128) cut into panels (B, 128, 128)."""
    columns = [axes for axes in figure.axes if axes.images]
    panels = []
    for axes in columns:
        stack = np.ma.filled(axes.images[-1].get_array().astype(float), np.nan)
        side = stack.shape[1]
        panels.append(stack.reshape(-1, side + 14, *stack.shape[1:])[:, :side])
    return columns, panels


def colours_of(values, grey=None):
    """The colours of values, laid over a grey of this brightness, as fractions."""
    colours = np.array(COLOURS(values))[..., :3]
    return colours if grey is None else 0.65 * colours + 0.35 * (0.2 + 0.6 * grey)


def seen(figure, axes, x, y):
    """The colour of the picture at a place of some axes."""
    pixels = rasterise(figure) / 255
    right, up = axes.transData.transform((x, y))
    return pixels[len(pixels) - 1 - int(up), int(right)]


def drawn_texts(axes):
    """The texts of some axes and of the axes in them, but not those of axes that are switched off."""
    yield from (artist for artist in axes.get_children() if isinstance(artist, Text))
    for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
        yield from (axis.label, *(label for label in axis.get_ticklabels() if label.get_visible()))
    for inner in axes.child_axes:
        yield from drawn_texts(inner)


def overlap(a, b):
    """Whether two boxes share more than a pixel in both directions."""
    return min(a.x1, b.x1) - max(a.x0, b.x0) >= 1 and min(a.y1, b.y1) - max(a.y0, b.y0) >= 1


def assert_no_overlap(figure):
    """No two texts touch, none leaves the figure, and none lies on an image, except if it is inside."""
    rasterise(figure)
    texts = [*figure.texts, *(text for axes in figure.axes for text in drawn_texts(axes))]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]
    width, height = figure.get_size_inches() * DPI
    for text, box in boxes:
        assert box.x0 >= -0.5, text
        assert box.y0 >= -0.5, text
        assert box.x1 <= width + 0.5, text
        assert box.y1 <= height + 0.5, text
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not overlap(a, b), (one, other)
    for image in (image for axes in figure.axes for image in axes.images):
        frame = image.get_window_extent()
        for text, box in boxes:
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            assert inside or not overlap(frame, box), text


def test_captions_name_the_predicted_class_below_a_heading():
    captions = describe(torch.tensor([[0.0, math.log(3.0)]]), ["cat", "dog"], ["test image 7\ntrue: cat"])
    assert captions == ["test image 7\ntrue: cat\npredicted: dog\nprobability 75 %"]


def test_attention_shows_a_gate_set_by_hand_at_its_place_and_value():
    attention = SpatialAttention(kernel_size=1)
    attention.conv.weight.data = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)
    x = torch.full((2, 3, 16, 16), -1.0)
    x[0, :, 4:8, 10:16] = 1.0  # a rectangle, right of the middle
    images = images_of(2, value=128)
    figure = draw_attention(images, attention_maps(nn.Sequential(attention), x), "by hand")
    (_, column), (shown, maps) = columns_of(figure)
    assert shown.shape == (2, 128, 128, 3)
    assert (shown == 128).all()
    low, high = 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))
    assert maps[0, 38:58, 86:124] == pytest.approx(high, abs=0.03)  # the rectangle, but for its blurred rim
    assert maps[0, :26] == pytest.approx(low, abs=0.03)
    assert maps[0, :, :74] == pytest.approx(low, abs=0.03)
    assert maps[1] == pytest.approx(low)  # the scale is shared: the second image has no such place
    assert column.images[-1].get_clim() == pytest.approx((low, high))
    assert [text.get_text() for text in column.child_axes[0].get_xticklabels()] == ["0.12", "0.50", "0.88"]
    assert seen(figure, column, 105, 48) == pytest.approx(colours_of(0.99, 128 / 255), abs=0.03)
    assert seen(figure, column, 20, 48) == pytest.approx(colours_of(0.0, 128 / 255), abs=0.03)
    assert seen(figure, column, 20, 135) == pytest.approx(1.0)  # white between two images


def test_a_picture_has_four_by_four_pixels_for_each_of_the_images():
    images = images_of(3)
    figure = draw_attention(images, {"block": AttentionMaps(torch.rand(3, 4), None)}, "pixels")
    left, bottom, _, _ = figure.axes[0].get_window_extent().bounds
    pixels = rasterise(figure)
    height, x = len(pixels), round(left)
    for index in range(3):
        top = height - round(bottom) - (3 - index) * 142
        shown = pixels[top : top + 128, x : x + 128].reshape(32, 4, 32, 4, 3)
        expected = images.pixels[index].permute(1, 2, 0).numpy()
        assert (shown == expected[:, None, :, None]).all()


def test_attention_shows_channel_gates_as_sorted_bars():
    channel = torch.tensor([[0.25, 1.0, 0.5, 0.75], [0.0, 0.0, 0.0, 0.125]])
    figure = draw_attention(images_of(2, value=128), {"block": AttentionMaps(channel, None)}, "bars")
    (_, column), (_, bars) = columns_of(figure)
    heights = np.isfinite(bars).sum(1)  # (2, 128), in pixels of 128
    assert heights[0].tolist() == [128] * 32 + [96] * 32 + [64] * 32 + [32] * 32
    assert heights[1].tolist() == [16] * 32 + [0] * 96
    assert np.isfinite(bars[0, -32:]).all()  # they stand on the lower edge
    assert seen(figure, column, 16, 100) == pytest.approx(colours_of(0.35), abs=0.01)
    assert seen(figure, column, 112, 80) == pytest.approx(1.0)


def test_channel_gates_above_one_keep_their_order():
    gate = torch.tensor([[1.6, 0.8, 0.4, 0.0]])
    figure = draw_attention(images_of(1, value=128), {"block": AttentionMaps(gate, None)}, "bars")
    (_, column), (_, bars) = columns_of(figure)
    assert np.isfinite(bars)[0].sum(0).tolist() == [128] * 32 + [64] * 32 + [32] * 32 + [0] * 32
    assert [text.get_text() for text in column.texts] == ["1.6", "0"]


def test_a_name_that_is_no_text_is_drawn_with_its_bytes():
    assert cut(os.fsdecode(b"caf\xe9"), 16) == "caf\\udce9"
    counts = torch.eye(2, dtype=torch.int64)
    rasterise(draw_confusion(counts, [os.fsdecode(b"caf\xe9"), "tea"], ""))


def test_a_nearly_constant_gate_looks_nearly_constant():
    generator = torch.Generator().manual_seed(0)
    flat = 0.5 + 1e-3 * torch.rand(2, 8, 8, generator=generator)
    columns, _ = columns_of(draw_attention(images_of(2), {"block": AttentionMaps(None, flat)}, "flat"))
    low, high = columns[1].images[-1].get_clim()
    assert (high - low, (high + low) / 2) == pytest.approx((0.05, 0.5005), abs=1e-4)


def test_features_show_the_first_nine_channels_each_at_its_place():
    output = torch.zeros(1, 12, 4, 4)
    output[0, torch.arange(9)] = (torch.arange(9.0) / 8).view(9, 1, 1)
    output[0, 9:] = 1.0  # never shown
    output[0, 3, 0, 0] = 1.0
    features = FeatureMaps(torch.zeros(1, 5), {"block": output}, output)
    figure = draw_features(images_of(1), features, "features")
    (_, column), (_, (mosaic,)) = columns_of(figure)
    assert mosaic.shape == (200, 200)
    for channel in range(9):
        y, x = 68 * (channel // 3), 68 * (channel % 3)
        expected = np.full((64, 64), channel / 8)
        if channel == 3:
            expected[:16, :16] = 1.0  # its left upper place
        assert mosaic[y : y + 64, x : x + 64] == pytest.approx(expected)
    assert np.isnan(mosaic[64:68]).all()
    assert np.isnan(mosaic[:, 132:136]).all()
    assert seen(figure, column, 66, 20) == pytest.approx(1.0)  # white between
    assert seen(figure, column, 100, 100) == pytest.approx(colours_of(0.5), abs=0.01)


def test_heat_maps_show_each_images_own_three_most_active_channels():
    last = torch.zeros(2, 6, 8, 8)
    last[0, 4], last[0, 1], last[0, 2] = 3.0, 2.0, 1.0
    last[1, 5], last[1, 0], last[1, 3] = 4.0, 2.5, 0.5
    last[1, 5, :, :4] = 0.0
    figure = draw_heat_maps(images_of(2), FeatureMaps(torch.zeros(2, 5), {}, last), "heat")
    columns, (_, *ranks) = columns_of(figure)
    texts = [[text.get_text() for text in column.texts] for column in columns[1:]]
    assert texts == [
        ["channel\n4\nmean\n3.00", "channel\n0\nmean\n2.50"],
        ["channel\n1\nmean\n2.00", "channel\n5\nmean\n2.00"],
        ["channel\n2\nmean\n1.00", "channel\n3\nmean\n0.50"],
    ]
    assert [panel[0].mean() for panel in ranks] == pytest.approx([3, 2, 1])
    second = ranks[1][1]
    assert second[:, :50].max() < 0.1
    assert second[:, 80:].min() > 3.9
    assert second[64, 64] == pytest.approx(2, abs=0.3)  # bilinear in between
    assert {column.images[-1].get_clim() for column in columns[1:]} == {(0.0, 4.0)}


def test_grad_cam_is_relative_to_each_images_maximum_and_beside_the_gates():
    cams = torch.zeros(2, 32, 32)
    cams[0, 8:16, 8:16] = 5.0
    cams[1, 16:24, 0:8] = 0.1
    gate = torch.linspace(0.2, 0.8, 16).view(1, 4, 4).repeat(2, 1, 1)
    maps = {"one": AttentionMaps(None, gate), "bars": AttentionMaps(torch.rand(2, 4), None)}
    _, panels = columns_of(draw_grad_cam(images_of(2), cams, maps, "cam"))
    assert len(panels) == 3  # the images, Grad-CAM and the one spatial gate
    assert panels[1][0, 36:60, 36:60] == pytest.approx(1)
    assert panels[1][0, 80:] == pytest.approx(0)
    assert panels[1][1, 68:92, 4:28] == pytest.approx(1)
    assert panels[1][1, :60] == pytest.approx(0)
    assert (panels[2][0, 0, 0], panels[2][0, -1, -1]) == pytest.approx((0.2, 0.8))


def test_confusion_shows_counts_and_fractions_of_the_row():
    counts = torch.tensor([[6, 2, 0], [0, 5, 0], [1, 1, 2]])
    figure = draw_confusion(counts, ["cat", "dog", "ship"], "confusion")
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 1, 0], [0.25, 0.25, 0.5]]
    assert axes.images[0].get_clim() == (0, 1)
    texts = [(text.get_text(), text.get_position()) for text in axes.texts]
    expected = [(str(int(counts[true, predicted])), (predicted, true)) for true in range(3) for predicted in range(3)]
    assert [text for text in texts if text[0].isdigit()] == expected
    assert [text for text, _ in texts].count("cat") == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_map_that_is_not_finite_is_an_error(bad):
    maps = torch.rand(2, 4, 4)
    broken = maps.clone()
    broken[1, 2, 3] = bad
    images, logits = images_of(2), torch.zeros(2, 5)
    with pytest.raises(
        ValueError, match="the spatial gate of block holds NaN or infinity: the network has diverged; choose"
    ):
        draw_attention(images, {"block": AttentionMaps(None, broken)}, "")
    with pytest.raises(ValueError, match="the channel gate of block holds NaN or infinity"):
        draw_attention(images, {"block": AttentionMaps(torch.tensor([[0.5, bad]] * 2), maps)}, "")
    with pytest.raises(ValueError, match="Grad-CAM holds NaN or infinity"):
        draw_grad_cam(images, broken, {}, "")
    with pytest.raises(ValueError, match="the output of block holds NaN or infinity"):
        draw_features(images, FeatureMaps(logits, {"block": broken[:, None]}, maps[:, None]), "")
    with pytest.raises(ValueError, match="the last convolution's output holds NaN or infinity"):
        draw_heat_maps(images, FeatureMaps(logits, {}, broken[:, None]), "")


def test_a_blank_map_is_an_error():
    blank, images, logits = torch.full((2, 4, 4), 0.5), images_of(2), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"Grad-CAM is 0\.000 everywhere in every image"):
        draw_grad_cam(images, torch.zeros(2, 32, 32), {}, "")
    with pytest.raises(ValueError, match=r"the output of block is 0\.500 everywhere"):
        draw_features(images, FeatureMaps(logits, {"block": blank[:, None]}, blank[:, None]), "")
    with pytest.raises(ValueError, match="the last convolution's output is"):
        draw_heat_maps(images, FeatureMaps(logits, {}, blank[:, None]), "")


def test_a_blank_gate_says_so_beside_the_others():
    blank, map_ = torch.full((2, 4, 4), 0.5), torch.rand(2, 4, 4)
    gates = {"dead": AttentionMaps(None, blank), "alive": AttentionMaps(None, map_)}
    for draw in (draw_attention, partial(_draw_cam, cams=torch.rand(2, 32, 32))):
        titles = {axes.get_title(loc="left") for axes in draw(images_of(2), gates, "").axes}
        assert {"dead\n4×4, 0.500 everywhere", "alive\n4×4"} <= titles


def _draw_cam(images, gates, title, cams):
    return draw_grad_cam(images, cams, gates, title)


@pytest.mark.parametrize(
    ("arch", "kind", "count"),
    [
        ("cnn", "cbam", 3),
        ("cnn", "cbam", 1),
        ("cnn", "se", 2),
        ("cnn", "none", 2),
        ("cnn", "bam", 2),
        pytest.param("resnet18", "cbam", 8, marks=pytest.mark.slow),
    ],
)
def test_nothing_overlaps_and_everything_is_on_the_page(arch, kind, count):
    torch.manual_seed(0)
    network = build_network(arch, 5, kind).eval()
    images = images_of(count)
    inputs = images.pixels / 128 - 1
    features, maps = feature_maps(network, inputs), attention_maps(network, inputs)
    title = "r$e$c[v1]<b>|ipe-version_12 (cnn, attention cbam, epoch 50) " + "and more " * 20
    figures = [draw_features(images, features, f"Features\n{title}")]
    figures.append(draw_heat_maps(images, features, f"Most active channels\n{title}"))
    figures.append(
        draw_grad_cam(images, grad_cam(network, inputs, features.logits.argmax(1)), maps, f"Grad-CAM\n{title}")
    )
    if maps:
        figures.append(draw_attention(images, maps, f"Attention\n{title}"))
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
    draw_confusion(torch.eye(3).long(), ["a", "b", "c"], "confusion").savefig(path)
    assert path.read_bytes().startswith(start)


def test_names_with_signs_of_mathematics_and_markup_are_written_as_they_are(tmp_path):
    name = "r$e$c[v1]<b>|x"
    figure = draw_attention(images_of(1), {name: AttentionMaps(torch.rand(1, 4), None)}, f"Attention\n{name} (cnn)")
    figure.savefig(tmp_path / "attention.svg")  # in which matplotlib notes each line that it writes
    text = (tmp_path / "attention.svg").read_text()
    assert "<!-- r$e$c[v1]&lt;b&gt;|x -->" in text
    assert "<!-- r$e$c[v1]&lt;b&gt;|x (cnn) -->" in text
    assert "price" not in text
    draw_confusion(torch.eye(2).long(), [name, "$5 or $6"], "confusion").savefig(tmp_path / "confusion.svg")
    assert (tmp_path / "confusion.svg").read_text().count("<!-- $5 or $6 -->") == 2


def test_reliability_shows_each_bin_and_leaves_few_images_out_of_the_line():
    before = [{"images": count, "confidence": 0.1, "accuracy": 0.2 * count / 50} for count in (0, 50, 9, 100)]
    after = [{"images": count, "confidence": c, "accuracy": 0.5} for count, c in ((10, 0.2), (9, 0.5), (40, 0.9))]
    figure = draw_reliability(before, after, "Reliability\nof $ a network")
    upper, lower = figure.axes
    assert [(bar.get_height(), bar.get_alpha()) for bar in upper.patches] == [
        (pytest.approx(0.2), None), (pytest.approx(0.4), None), (pytest.approx(0.036), 0.3)
    ]  # fmt: skip
    assert upper.patches[0].get_x() + upper.patches[0].get_width() / 2 == pytest.approx(0.375)
    assert [bar.get_height() for bar in lower.patches] == [0, 50, 9, 100]
    assert upper.lines[1].get_xydata().tolist() == [[0.2, 0.5], [0.9, 0.5]]
    rasterise(figure)
    assert len(draw_reliability(before, None, "").axes[0].lines) == 1
