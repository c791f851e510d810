"""The documentation: its links, its site as `make docs` builds it, and its notebook, which is run."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from cbam_pl.commands.compare.plan import parse_options
from tests.helpers import REPOSITORY, scalars

NOTEBOOK = REPOSITORY / "docs/notebook.ipynb"
MARKDOWN = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("benchmarks/*.md")]


def test_every_relative_link_leads_to_a_file():
    links = [(page, link) for page in MARKDOWN for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    assert len(links) > 30
    missing = [
        f"{page.name}: {link}"
        for page, link in links
        if not urlsplit(link).scheme and link[0] != "#" and not (page.parent / urlsplit(link).path).exists()
    ]
    assert not missing


def test_the_files_and_tests_that_are_named_are_there():
    pages = [*MARKDOWN, *REPOSITORY.glob("cbam_pl/**/*.py"), *REPOSITORY.glob("configs/**/*.yaml")]
    text = "\n".join(page.read_text() for page in pages)
    files = set(re.findall(r"\b(?:benchmarks|cbam_pl|configs|tests)/[\w/]+\.(?:py|yaml)\b", text))
    assert len(files) > 30
    assert not [name for name in files - {"configs/RECIPE.yaml"} if not (REPOSITORY / name).is_file()]
    tests = "\n".join(path.read_text() for path in REPOSITORY.glob("tests/**/test_*.py"))
    named = {name for page in MARKDOWN for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) > 20
    others = {"test_time_flip", "test_accuracy", "test_images", "test_options", "test_commit"}  # a setting, metadata
    assert not [name for name in named - others if f"def {name}(" not in tests]


def test_the_comparisons_have_the_options_that_compare_needs():
    text = "\n".join(page.read_text() for page in MARKDOWN).replace("\\\n", " ")
    lines = re.findall(r"^python train\.py compare (.*?)(?:  #.*)?$", text, re.MULTILINE)
    assert len(lines) > 15
    for line in lines:
        parse_options(shlex.split(line))


class Page(HTMLParser):
    """The links of a page, and the places that links may lead to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.places = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id":
                self.places.add(value)


def test_what_a_run_writes_is_named(trained, command, tmp_path):
    named = set(re.findall(r"`([^`]+)`", (REPOSITORY / "docs/files.md").read_text()))
    root = shutil.copytree(trained[0], tmp_path / "run")
    options = ["--calibrate", "--corruptions", "fog", "--severities", 1]
    assert command("test", "--trainer.default_root_dir", root, *options).status == 0
    logs = root / "logs/tiny/version_0"
    files = {file.name for file in logs.iterdir() if not file.name.startswith((".", "events"))}
    tags = {re.sub(r"(val_gates|pictures)/.*", "", tag) for tag in scalars(logs)} - {""}
    keys, robustness = (json.loads((logs / f"{name}.json").read_text()) for name in ("test", "robustness"))
    with np.load(logs / "test.npz") as file:
        arrays = {name.removeprefix("calibrated_") for name in file.files}
    columns = (logs / "metrics.csv").read_text().partition("\n")[0].split(",")
    inner = {*keys["measures"], *keys["calibration"], *keys["reliability"][0]}
    assert not {*files, *tags, *keys, *robustness, *robustness["mean"], *inner, *arrays, *columns} - named


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(tmp_path):
    pytest.importorskip("furo", reason="what requirements-docs.txt names is not installed")
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", ".", tmp_path / "site"]
    built = subprocess.run([*words, "-d", tmp_path / "trees"], cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {path: Page(path.read_text()) for path in (tmp_path / "site").rglob("*.html")}
    report = "docs/results/notebooks/report"
    for name in ("index", "docs/api", "docs/compare", "docs/notebook", report, "benchmarks/NOTES"):
        assert tmp_path / f"site/{name}.html" in pages
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].places if target in pages else {"", unquote(parts.fragment)}
            if not parts.scheme and not (target.is_file() and (unquote(parts.fragment) or "") in known | {""}):
                broken.append(f"{path.relative_to(tmp_path)}: {link}")
    assert not broken
    named = Page((tmp_path / "site/docs/api.html").read_text()).places
    assert {"cbam_pl.CBAM", "cbam_pl.Classifier", "cbam_pl.ImageDataModule", "cbam_pl.attention_maps"} <= named
    assert not [name for name in named if re.search(r"\._|configure_optimizers|training_step", name)]


@pytest.mark.slow
def test_the_notebook_runs_and_is_saved_with_its_pictures(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    saved = nbformat.read(NOTEBOOK, 4)
    run = nbclient.NotebookClient(
        nbformat.read(NOTEBOOK, 4), timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [[sorted(kind for out in cell.get("outputs", []) for kind in out.get("data", {})) for cell in book.cells]
             for book in (saved, run)]  # fmt: skip
    assert shown[0] == shown[1]
    assert sum(kinds.count("image/png") for kinds in shown[0]) == 4  # curves, gates, Grad-CAM, those of the ResNet
    texts = "".join(out.get("text", "") for cell in run.cells for out in cell.get("outputs", []))
    accuracies = dict(re.findall(r"(.+): accuracy (0\.\d+) on 2,000 test images", texts))
    assert float(accuracies["with CBAM"]) > 0.5
    assert set(accuracies) == {"without attention", "with CBAM"}
    assert NOTEBOOK.stat().st_size < 1_000_000
