"""The gallery in Chromium, with real clicks and keys; test_gallery.py tests what the page holds."""

import shutil

import numpy as np
import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from cbam_pl.inspect.drawing import COLOURS
from cbam_pl.inspect.gallery import NetworkView, render_gallery
from cbam_pl.inspect.gates import AttentionMaps, upsample

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver"),
]

CLASSES = ["bird", "cat", "<b>dog</b>"]
TRUE = [0, 1, 2, 0, 1, 2, 0, 1]
PREDICTED = {"plain": [0, 1, 2, 1, 1, 0, 0, 2], "gated": [0, 1, 1, 0, 1, 0, 2, 2]}
CONFIDENCE = {"plain": [0.9, 0.8, 0.7, 0.6, 0.5, 0.95, 0.85, 0.75], "gated": [0.5] * 8}
LOSS = {  # the rest of the probability is shared by the two other classes
    name: [
        -np.log(value if true == guess else (1 - value) / 2)
        for true, guess, value in zip(TRUE, PREDICTED[name], CONFIDENCE[name], strict=True)
    ]
    for name in PREDICTED
}


def logits_of(name):
    probabilities = torch.tensor([[(1 - value) / 2] * 3 for value in CONFIDENCE[name]], dtype=torch.float64)
    probabilities[range(8), PREDICTED[name]] = torch.tensor(CONFIDENCE[name], dtype=torch.float64)
    return probabilities.log()


SPATIAL = torch.rand(8, 4, 4, generator=torch.Generator().manual_seed(0))
CHANNEL = torch.rand(8, 6, generator=torch.Generator().manual_seed(1))
CAMS = torch.rand(8, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    views = [
        NetworkView("plain", "without attention", logits_of("plain"), CAMS, {}),
        NetworkView("gated", "with attention", logits_of("gated"), CAMS, {"block": AttentionMaps(CHANNEL, SPATIAL)}),
    ]
    pixels = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(3)).byte()
    path = tmp_path_factory.mktemp("page") / "gallery.html"
    path.write_text(
        render_gallery("Eight images", pixels, torch.tensor(TRUE), range(100, 108), CLASSES, views), "utf-8"
    )
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", profile):
        options.add_argument(word)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    resize(browser, 1200)
    browser.get(address)
    yield browser
    assert browser.get_log("browser") == [], "the page reports an error"


def resize(browser, width, scheme="light"):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)


def choose(page, name, text):
    """With the keyboard: selenium's own Select sets the value without the events of real input."""
    select = page.find_element(By.NAME, name)
    place = [option.text for option in select.find_elements(By.TAG_NAME, "option")].index(text)
    select.send_keys(Keys.HOME, *[Keys.ARROW_DOWN] * place)


def shown(page):
    """The images in the list, from 0, in their order."""
    names = page.find_elements(By.CSS_SELECTOR, ".card .column:first-child .name")
    return [int(name.text.removeprefix("image ")) - 100 for name in names]


def press(page, *keys):
    page.switch_to.active_element.send_keys(*keys)


def opened(page):
    """The number of the enlarged image, from 0; None where none is."""
    heading = page.find_element(By.CSS_SELECTOR, "dialog h2")
    return int(heading.text.split()[2].rstrip(":")) - 100 if heading.is_displayed() else None


def focused(page):
    return page.switch_to.active_element.text


def test_cards_have_true_and_predicted_class_probability_and_loss(page):
    assert shown(page) == list(range(8))
    text = page.find_elements(By.CLASS_NAME, "card")[2].text.split("\n")
    assert text == [
        *("image 102", "<b>dog</b>"),
        *("plain", "✓ right", "<b>dog</b> 70.0 %", f"loss {LOSS['plain'][2]:.2f}"),
        *("gated", "✗ wrong", "cat 50.0 %", f"loss {LOSS['gated'][2]:.2f}"),
    ]
    networks = page.find_element(By.ID, "networks").text
    assert "plain: without attention; 5 of these 8 images right" in networks
    assert "gated: with attention; 4 of these 8 images right" in networks


def test_filters_and_order(page):
    choose(page, "class", "cat")
    assert shown(page) == [1, 4, 7]
    choose(page, "result", "wrong")
    assert shown(page) == [7]
    page.find_element(By.ID, "all").click()
    assert shown(page) == list(range(8))
    choose(page, "result", "right")
    assert shown(page) == [0, 1, 2, 4, 6]
    choose(page, "network", "gated")
    assert shown(page) == [0, 1, 3, 4]
    choose(page, "result", "all")
    choose(page, "network", "plain")
    choose(page, "order", "highest loss first")
    assert shown(page) == sorted(range(8), key=lambda image: -LOSS["plain"][image])
    choose(page, "order", "lowest loss first")
    assert shown(page) == sorted(range(8), key=lambda image: LOSS["plain"][image])
    choose(page, "order", "as in the test split")
    lowest, highest = (page.find_element(By.NAME, name) for name in ("from", "to"))
    lowest.clear()
    lowest.send_keys("75")
    assert shown(page) == [0, 1, 5, 6, 7]
    highest.clear()
    highest.send_keys("85")
    assert shown(page) == [1, 6, 7]
    assert page.find_element(By.NAME, "count").text == "3 of 8 images"
    choose(page, "class", "<b>dog</b>")
    assert page.find_element(By.NAME, "count").text == "no images match the filters"


def test_where_two_networks_disagree(page):
    choose(page, "pair", "plain and gated differ")
    assert shown(page) == [2, 3, 6]
    choose(page, "pair", "plain right, gated wrong")
    assert shown(page) == [2, 6]
    choose(page, "pair", "gated right, plain wrong")
    assert shown(page) == [3]


def test_a_click_enlarges_arrow_keys_go_on_and_escape_goes_back(page):
    choose(page, "class", "bird")
    page.find_elements(By.CLASS_NAME, "card")[1].click()
    assert opened(page) == 3
    assert page.find_element(By.CSS_SELECTOR, "dialog output").text == "2 of 3"
    press(page, Keys.ARROW_RIGHT)
    assert opened(page) == 6
    press(page, Keys.ARROW_RIGHT)
    assert opened(page) == 0  # from the last to the first
    press(page, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert opened(page) == 3
    page.find_element(By.ID, "next").click()
    assert opened(page) == 6
    press(page, Keys.ESCAPE)
    assert opened(page) is None
    assert focused(page).startswith("image 106")  # where one was
    page.find_elements(By.CLASS_NAME, "card")[0].click()
    page.find_element(By.ID, "close").click()
    assert opened(page) is None


def test_the_keyboard_alone_reaches_everything(page):
    reached = []
    for _ in range(20):
        page.switch_to.active_element.send_keys(Keys.TAB)
        active = page.switch_to.active_element
        reached.append(active.get_attribute("name") or active.text.split("\n")[0])
        outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", reached
        if len(reached) == 9:
            break
    assert reached == ["class", "network", "result", "from", "to", "pair", "order", "map", "Reset"]
    press(page, Keys.TAB)
    assert focused(page) == "How to read this page"
    press(page, Keys.TAB)
    assert focused(page).startswith("image 100")
    press(page, Keys.ARROW_RIGHT)
    assert focused(page).startswith("image 101")
    columns = page.execute_script("return getComputedStyle(document.getElementById('images')).gridTemplateColumns")
    press(page, Keys.ARROW_DOWN)
    assert focused(page).startswith(f"image {101 + len(columns.split())}")
    press(page, Keys.ARROW_UP, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    press(page, Keys.ENTER)
    assert opened(page) == 0
    press(page, Keys.TAB, Keys.ENTER)  # from Next to Close
    assert opened(page) is None


def test_the_maps_side_by_side_are_the_networks(page):
    choose(page, "map", "spatial gate of block")
    assert page.find_elements(By.CSS_SELECTOR, ".card .slot")[0].text == "no such gate"
    page.find_elements(By.CLASS_NAME, "card")[5].click()
    sections = page.find_elements(By.CSS_SELECTOR, "dialog section")
    assert [section.find_element(By.TAG_NAME, "h3").text for section in sections] == ["Grad-CAM", "block"]
    left, right = sections[1].find_elements(By.CSS_SELECTOR, ".networks > div")
    assert left.text.split("\n") == ["plain", "no attention here"]
    assert right.text.split("\n")[-2:] == ["4×4", "6 channels, 0–1"]
    boxes = [frame.rect for frame in sections[0].find_elements(By.CLASS_NAME, "map")]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    # The spatial gate as drawing.py draws it, but for the rounding to bytes.
    canvas = right.find_element(By.TAG_NAME, "canvas")
    script = "return [...arguments[0].getContext('2d').getImageData(0, 0, 128, 128).data]"
    drawn = np.array(page.execute_script(script, canvas)).reshape(128, 128, 4)
    values = upsample(SPATIAL[5:6], (128, 128))[0]
    expected = COLOURS(((values - SPATIAL.min()) / (SPATIAL.max() - SPATIAL.min())).numpy(), bytes=True)
    assert np.abs(drawn - expected.astype(int)).max() <= 4
    # Bars in the order of their mean over the images: "M0 255", then "V height H right end" for each.
    bars = right.find_element(By.CLASS_NAME, "bars").get_attribute("d")
    heights = [float(part.split("H")[0]) for part in bars.split("V")[1:-1]]
    expected = CHANNEL[5, CHANNEL.mean(0).argsort(descending=True)]
    assert 1 - np.array(heights) / 255 == pytest.approx(expected.numpy(), abs=0.003)
    means = right.find_element(By.CLASS_NAME, "means").get_attribute("d")
    heights = [float(part.split("H")[0]) for part in means.split("V")[1:]]
    assert 1 - np.array(heights) / 255 == pytest.approx(sorted(CHANNEL.mean(0).tolist(), reverse=True), abs=0.003)


@pytest.mark.parametrize("width", [1200, 900, 400])
def test_it_fits_every_width_light_and_dark(page, width):
    brightness = {}
    for scheme in ("light", "dark"):
        resize(page, width, scheme)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        page.find_elements(By.CLASS_NAME, "card")[0].click()
        dialog = page.find_element(By.TAG_NAME, "dialog")
        assert page.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", dialog)
        assert dialog.rect["width"] <= width
        colours = "const style = getComputedStyle(arguments[0]); return [style.color, style.backgroundColor]"
        text, back = (
            sum(map(int, colour.strip("rgb()").split(",")[:3])) for colour in page.execute_script(colours, dialog)
        )
        brightness[scheme] = back - text
        press(page, Keys.ESCAPE)
    assert brightness["light"] > 500
    assert brightness["dark"] < -500
