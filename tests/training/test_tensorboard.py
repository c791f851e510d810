"""TensorBoard itself, started over the logs of a real run: through its HTTP interface, and as a browser shows it."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from cbam_pl.inspect.drawing import COLOURS, OPACITY
from tests.helpers import RUN

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def tensorboard(logs, run, folder):
    """Where TensorBoard listens, on a free port of this machine alone, once it has read a run of the logs."""
    log = folder / "log"
    arguments = ["--logdir", logs, "--host", "127.0.0.1", "--port", "0", "--load_fast", "false"]
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *arguments], stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 120
        url = None
        while time.monotonic() < deadline and process.poll() is None:
            found = re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())
            if found:
                url = found[0]
                if run in get(url, "data/runs"):
                    break
            time.sleep(0.2)
        else:
            pytest.fail(f"TensorBoard did not start: {log.read_text()}")
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory):
    with tensorboard(trained[0] / "logs", RUN, tmp_path_factory.mktemp("tensorboard")) as url:
        yield url


def fetch(url, path, body=None, **query):
    # Without the proxies that the environment may name: this machine talks to itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}?{urllib.parse.urlencode(query)}", data)
    request.add_header("Content-Type", "application/json")
    with opener.open(request, timeout=30) as answer:
        return answer.read()


def get(url, path, body=None, **query):
    return json.loads(fetch(url, path, body, **query))


def test_scalars_have_their_tags_and_step_axes(address):
    tags = set(get(address, "data/plugin/scalars/tags")[RUN])
    figures = {"train/loss", "train/acc", "val/loss", "val/acc", "lr"}
    gates = {tag for tag in tags if tag.startswith("val_gates/")}
    assert tags == figures | gates | {"train/loss_step"}
    assert len(gates) == 3 * 9

    def steps(tag):
        return [step for _, step, _ in get(address, "data/plugin/scalars/scalars", run=RUN, tag=tag)]

    assert steps("train/loss_step") == list(range(1, 13))
    for tag in figures | gates:
        assert steps(tag) == [1, 2], tag


def test_images_are_the_pictures_by_epoch(address):
    tags = get(address, "data/plugin/images/tags")[RUN]
    assert set(tags) == {"pictures/attention", "pictures/features", "pictures/confusion"}
    for tag in tags:
        entries = get(address, "data/plugin/images/images", run=RUN, tag=tag, sample=0)
        assert [entry["step"] for entry in entries] == [1, 2]
        for entry in entries:
            query = dict(urllib.parse.parse_qsl(entry["query"]))
            pixels = image_of(fetch(address, "data/plugin/images/individualImage", **query))
            assert pixels.shape[0] > 300
            assert pixels.shape[1] > 300
            assert count_map_colours(pixels, overlay=tag == "pictures/attention") > 30, tag


def test_hyperparameters_and_the_graph_are_there(address):
    names = {info["name"] for info in get(address, "data/plugin/hparams/experiment", {})["hparamInfos"]}
    assert {"model.arch", "model.attention.kind", "optimizer", "lr", "data.batch_size"} <= names
    query = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"],
    }
    columns = [{"metric": {"tag": "val/acc", "group": ""}}]
    groups = get(address, "data/plugin/hparams/session_groups", {**query, "colParams": columns, "sliceSize": 9})
    (session,) = groups["sessionGroups"]
    assert session["hparams"]["model.attention.kind"] == "cbam"
    (last,) = [
        point[2] for point in get(address, "data/plugin/scalars/scalars", run=RUN, tag="val/acc") if point[1] == 2
    ]
    shown = {value["name"]["tag"]: value["value"] for value in session["metricValues"]}
    assert shown["val/acc"] == pytest.approx(last)
    assert get(address, "data/plugin/graphs/info")[RUN]["run_graph"]
    assert b"attention" in fetch(address, "data/plugin/graphs/graph", run=RUN, conceptual="false")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it with apt-get install chromium")
@pytest.mark.parametrize("page", ["scalars", "images"])
def test_a_browser_shows_the_charts_and_the_pictures(address, tmp_path, page):
    pixels = browse(f"{address}?darkMode=false#{page}", tmp_path)
    content = pixels[100:, 360:].astype(int)  # below TensorBoard's own bar, and right of the list of runs
    if page == "scalars":
        lines = np.abs(content - [255, 112, 67]).max(-1) < 40  # in the colour of the first run
        rows = np.flatnonzero(lines.any(1))
        # Charts of lr, of train/acc beside train/loss, and of train/loss_step stand in three rows.
        bands = np.split(rows, np.flatnonzero(np.diff(rows) > 60) + 1)
        assert len(bands) == 3
        _, two, one = (np.flatnonzero(lines[band].any(0)) for band in bands)
        assert np.diff(two).max() > 60 > np.diff(one).max()
    else:
        assert count_map_colours(content, overlay=False) > 30
        assert (np.ptp(content, axis=-1) > 60).mean() > 0.05


def image_of(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def count_map_colours(pixels, overlay):
    """How many of the maps' colours, or of these over medium grey, are in the image; to 5 bits a channel."""
    known = COLOURS(np.linspace(0, 1, 128))[:, :3]
    if overlay:
        known = OPACITY * known + (1 - OPACITY) * 0.5
    codes, present = ((colours.astype(int) >> 3) @ [1024, 32, 1] for colours in (255 * known, pixels.reshape(-1, 3)))
    return int(np.isin(np.unique(codes), present).sum())


def browse(url, folder):
    """The page as headless Chromium draws it (H, W, 3); nothing but this machine can be reached."""
    picture = folder / "page.png"
    options = [
        *["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"],
        *["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}"],
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        *["--virtual-time-budget=30000", "--window-size=1400,1500", f"--screenshot={picture}"],
    ]
    subprocess.run([CHROMIUM, *options, url], capture_output=True, timeout=150, check=True)
    return image_of(picture.read_bytes())
