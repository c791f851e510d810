"""The documentation as a site: `make docs`. Its source folder is the repository, so that links are those of GitHub."""

import shutil
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule
from sphinx.application import Sphinx

project = "cbam_pl"
root_doc = "README"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["README.md", "docs/**", "benchmarks/NOTES.md", "weights/**"]
exclude_patterns = [".*", "**/configs", "**/_build", "checkpoints", "data", "logs", "tests", "cbam_pl", "build", "dist"]

# Markdown as on GitHub, and the notebook with the outputs that it was saved with.
myst_heading_anchors = 4
nb_execution_mode = "off"

# Public names alone, from their docstrings, in which `…` is code.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_custom_sections = ["Shape"]
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "cbam_pl"
html_copy_source = False
html_show_copyright = False

# Page → heading → patterns of the pages below it in the site's contents: whatever file is added is found.
CONTENTS = {
    "README": {
        "Guides": ["docs/*", "docs/samples/README"],
        "Trained networks": ["weights/*/README"],
        "Results": ["docs/results/README", "benchmarks/NOTES"],
    },
    "docs/results/README": {"Reports": ["*/report", "*"]},
}


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """End a page with the contents of the pages below it, which GitHub would show as text."""
    folder = (Path(app.srcdir) / name).parent
    for caption, patterns in CONTENTS.get(name, {}).items():
        found = [pattern for pattern in patterns if any(folder.glob(f"{pattern}.*"))]
        if found:
            source[0] += "\n".join(["\n```{toctree}", ":hidden:", ":glob:", f":caption: {caption}", "", *found, "```"])


def is_hook(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what Lightning calls, which is not an interface for users."""
    of_lightning = hasattr(LightningModule, name) or hasattr(LightningDataModule, name)
    return True if of_lightning and name != "forward" else None


def copy_pages(app: Sphinx, error: Exception | None) -> None:
    """Give the entrance the name that servers open, and a report the gallery that it has beside it."""
    if error is None:
        site = Path(app.outdir)
        shutil.copy(site / f"{root_doc}.html", site / "index.html")
        for report in site.glob("_downloads/*/report.html"):  # which has a folder of its own there
            shutil.copy(Path(app.srcdir) / "docs/results/notebooks/gallery.html", report.parent)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-skip-member", is_hook)
    app.connect("build-finished", copy_pages)
