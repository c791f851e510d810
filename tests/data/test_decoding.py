"""How one image file becomes pixels: formats, colour modes, orientation, transparency, and its proportions."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

from cbam_pl.data.folder import decode, fit_image
from tests.helpers import photo


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".PNG", ".jpg", ".JPeG"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    form = {".jpg": "jpeg"}.get(suffix.lower(), suffix.lower()[1:])
    options = {"lossless": True} if form == "webp" else {"quality": 100} if form == "jpeg" else {}
    Image.new("RGB", (8, 8), (200, 100, 50)).save(path, form, **options)
    pixels = decode(path, 8)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 8, 8)
    assert (pixels.float() - torch.tensor([200.0, 100, 50]).view(3, 1, 1)).abs().max() <= (form == "jpeg") * 2


def test_channels_rows_and_columns_are_in_order(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png", 8)
    for channel in range(3):
        for y in range(8):
            assert pixels[channel, y].tolist() == array[y, :, channel].tolist()


def palette_image() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


@pytest.mark.parametrize(
    ("name", "make", "options", "colour"),
    [
        ("grey.png", lambda: Image.new("L", (8, 8), 77), {}, (77, 77, 77)),
        ("grey.jpg", lambda: Image.new("L", (8, 8), 77), {}, (77, 77, 77)),
        ("bit.png", lambda: Image.new("1", (8, 8), 1), {}, (255, 255, 255)),
        ("palette.png", palette_image, {}, (200, 100, 50)),
        ("cmyk.jpg", lambda: Image.new("CMYK", (8, 8), (255, 0, 0, 0)), {"quality": 100}, (0, 255, 255)),
        ("grey16.png", lambda: Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)), {}, (128,) * 3),
        ("white16.png", lambda: Image.fromarray(np.full((8, 8), 65535, np.uint16)), {}, (255,) * 3),
        ("round16.png", lambda: Image.fromarray(np.full((8, 8), 257 * 7 + 129, np.uint16)), {}, (8,) * 3),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path,
    name: str,
    make: Callable[[], Image.Image],
    options: dict[str, object],
    colour: tuple[int, int, int],
) -> None:
    make().save(tmp_path / name, **options)
    difference = decode(tmp_path / name, 8).int() - torch.tensor(colour).view(3, 1, 1)
    assert difference.abs().max() <= name.endswith("jpg")


@pytest.mark.parametrize(
    ("name", "make", "options", "colour", "alpha"),
    [
        ("grey.png", lambda: Image.new("LA", (8, 8), (77, 9)), {}, (77, 77, 77), 9),
        ("rgba.png", lambda: Image.new("RGBA", (8, 8), (200, 100, 50, 128)), {}, (200, 100, 50), 128),
        ("rgba.webp", lambda: Image.new("RGBA", (8, 8), (200, 100, 50, 0)), {"lossless": True}, (200, 100, 50), 0),
        ("opaque.png", lambda: Image.new("RGBA", (8, 8), (200, 100, 50, 255)), {}, (200, 100, 50), 255),
        ("palette.png", palette_image, {"transparency": bytes([0, 128])}, (200, 100, 50), 128),
        ("palette_key.png", palette_image, {"transparency": 1}, (200, 100, 50), 0),
        ("other_key.png", palette_image, {"transparency": 0}, (200, 100, 50), 255),
        ("grey_key.png", lambda: Image.new("L", (8, 8), 77), {"transparency": 77}, (77, 77, 77), 0),
        ("rgb_key.png", lambda: Image.new("RGB", (8, 8), (1, 2, 3)), {"transparency": (1, 2, 3)}, (1, 2, 3), 0),
    ],
)
def test_transparent_pixels_show_white(
    tmp_path: Path,
    name: str,
    make: Callable[[], Image.Image],
    options: dict[str, object],
    colour: tuple[int, int, int],
    alpha: int,
) -> None:
    make().save(tmp_path / name, **options)
    expected = [round(255 + (channel - 255) * alpha / 255) for channel in colour]
    assert (decode(tmp_path / name, 8) == torch.tensor(expected).view(3, 1, 1)).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation(tmp_path: Path, suffix: str) -> None:
    array = np.zeros((16, 16, 3), np.uint8)
    array[:, :8] = 255  # bright on the left as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees for viewing, so bright above
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(array).save(path, exif=exif)
    pixels = decode(path, 16)
    assert pixels[:, :7].min() > 240
    assert pixels[:, 9:].max() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(16, 16).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected = torch.from_numpy(np.array(ImageOps.exif_transpose(image))).permute(2, 0, 1)
        assert torch.equal(fit_image(image, 16), expected)
    assert torch.equal(decode(tmp_path / "a.png", 16), expected)


def turned_with(*entry: object) -> bytes:
    """EXIF of orientation 6 and another tag: its number, type, count and value."""
    entries = struct.pack("<HHI4s", 0x112, 3, 1, b"\6") + struct.pack("<HHI4s", *entry)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("exif", "is_turned"),
    [
        (turned_with(0x11A, 2, 3, b"72"), True),  # XResolution as text
        (turned_with(0x128, 1, 1, b"\2"), True),  # ResolutionUnit as a byte
        (b"Exif\0\0garbage", False),
    ],
    ids=["text", "byte", "garbage"],
)
def test_odd_exif_is_no_reason_to_reject_an_image(tmp_path: Path, exif: bytes, is_turned: bool, suffix: str) -> None:
    array = np.zeros((16, 16, 3), np.uint8)
    array[:, :8] = 255  # bright on the left as stored
    path = tmp_path / f"odd.{suffix}"
    Image.fromarray(array).save(path, exif=exif)
    with Image.open(path) as image:
        for pixels in (decode(path, 16), fit_image(image, 16)):
            bright = pixels[:, :7] if is_turned else pixels[:, :, :7]
            assert bright.min() > 240


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    path = tmp_path / f"film.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert decode(path, 8)[:, 3, 3].tolist() == [250, 0, 0]


def test_shrinking_averages_instead_of_picking(tmp_path: Path) -> None:
    array = np.zeros((64, 64), np.uint8)
    array[:, ::2] = 255  # stripes of one pixel: any 8 columns average to half
    Image.fromarray(array).save(tmp_path / "stripes.png")
    pixels = decode(tmp_path / "stripes.png", 8)
    assert pixels.shape == (3, 8, 8)
    assert ((pixels.float() - 127.5).abs() < 12).all()


def test_other_aspect_ratio_and_enlarging(tmp_path: Path) -> None:
    Image.new("RGB", (3, 50), (9, 8, 7)).save(tmp_path / "a.png")
    assert (decode(tmp_path / "a.png", 8) == torch.tensor([9, 8, 7]).view(3, 1, 1)).all()


# -------------------------------------------------------------------------------------- in proportion


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (300, 300), (90, 61), (256, 400)])
def test_in_proportion_is_what_torchvision_evaluates_on(tmp_path: Path, width: int, height: int) -> None:
    image = photo(width, height)
    image.save(tmp_path / "a.png")
    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])(image)
    difference = (decode(tmp_path / "a.png", 224, in_proportion=True).int() - theirs.int()).abs()
    assert difference.max() <= 1  # rounding inside Pillow and torch
    assert difference.float().mean() < 0.05


@pytest.mark.parametrize(("width", "height"), [(40, 30), (8, 8), (30, 77)])
def test_out_of_proportion_is_what_pillow_resizes_to_a_square(tmp_path: Path, width: int, height: int) -> None:
    image = photo(width, height)
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(decode(tmp_path / "a.png", 32).permute(1, 2, 0).numpy(), expected)


def test_a_strip_does_not_fill_the_memory(tmp_path: Path) -> None:
    Image.new("RGB", (2, 60_000), (9, 8, 7)).save(tmp_path / "a.png")  # 256 × 7,680,000 pixels in proportion
    pixels = decode(tmp_path / "a.png", 224, in_proportion=True)
    assert (pixels == torch.tensor([9, 8, 7]).view(3, 1, 1)).all()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_decoded_at_a_smaller_scale_hardly_differs(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(1030, 800).save(tmp_path / "a.jpg", quality=95, exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    full = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28), transforms.PILToTensor()])(upright)
    difference = (decode(tmp_path / "a.jpg", 28, in_proportion=True).int() - full.int()).abs()
    assert 0 < difference.float().mean() < 1  # of 255, so the scale was another
    assert difference.max() <= 6
