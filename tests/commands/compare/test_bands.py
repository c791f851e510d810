import csv
import shutil

import numpy as np
import pytest

from cbam_pl.commands.compare.bands import FIGURES, Bands
from cbam_pl.commands.compare.jobs import find, jobs_of
from tests.commands.compare.test_jobs import plan_in
from tests.helpers import scalars
from tests.training.test_tensorboard import CHROMIUM, browse, get, tensorboard

PARTS = {"mean": np.mean, "lowest": np.min, "highest": np.max}


def rows_of(root, name):
    """The rows of metrics.csv, by seed."""
    tables = []
    for version in (0, 1):
        with (root / f"logs/{name}/version_{version}/metrics.csv").open() as stream:
            tables.append(list(csv.DictReader(stream)))
    return tables


def assert_bands(root, name, epochs):
    (file,) = (root / "logs/compare/report" / name).iterdir()
    points, tables = scalars(file.parent), rows_of(root, name)
    assert set(points) == {f"seeds_{figure}/{part}" for figure in FIGURES for part in PARTS}
    for figure in FIGURES:
        for part, function in PARTS.items():
            values = [function([float(table[epoch - 1][figure]) for table in tables]) for epoch in epochs]
            found = points[f"seeds_{figure}/{part}"]
            assert [step for step, _ in found] == list(epochs)
            assert [value for _, value in found] == pytest.approx(values, rel=1e-6)


def test_compare_writes_the_bands_of_each_recipe(compared):
    for name in ("none", "se", "cbam"):
        assert_bands(compared[0], name, (1, 2))
    assert not list((compared[0] / "logs/compare").glob("**/config.yaml"))


def test_an_epoch_is_written_once_when_all_seeds_have_it(compared, recipes, tmp_path):
    root = shutil.copytree(compared[0], tmp_path / "copy")
    table = root / "logs/cbam/version_1/metrics.csv"
    whole = table.read_text()
    test = root / "logs/cbam/version_1/test.json"
    test.rename(test.with_suffix(".kept"))  # so that this job is not done
    plan = plan_in(root, recipes)
    bands = Bands(plan, jobs_of(plan))
    for rows in (0, 1, 1, 2):
        table.write_text("".join(whole.splitlines(keepends=True)[: 1 + rows]))
        bands.update()
        if rows:
            assert_bands_of_first(root, whole, rows)
    bands.close()
    assert_bands(root, "cbam", (1, 2))
    # Again, as when the comparison is resumed: in place of the file before.
    test.with_suffix(".kept").rename(test)
    plan = plan_in(root, recipes)
    bands = Bands(plan, jobs_of(plan))
    bands.close()
    assert_bands(root, "cbam", (1, 2))
    assert all(find(job)[0] == "done" for job in jobs_of(plan))


def assert_bands_of_first(root, whole, count):
    points = scalars(root / "logs/compare/report/cbam")
    assert all([step for step, _ in own] == list(range(1, count + 1)) for own in points.values())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it with apt-get install chromium")
def test_a_browser_shows_the_recipes_as_bands(compared, tmp_path):
    logs = compared[0] / "logs"
    with tensorboard(logs, "compare/report/cbam", tmp_path) as address:
        layout = get(address, "data/plugin/custom_scalars/layout")
        (category,) = layout["category"]
        assert [chart["title"] for chart in category["chart"]] == list(FIGURES)
        assert category["chart"][3]["margin"]["series"] == [
            {"value": "seeds_val/acc/mean", "lower": "seeds_val/acc/lowest", "upper": "seeds_val/acc/highest"}
        ]
        pixels = browse(f"{address}?darkMode=false#custom_scalars", tmp_path)
    content = pixels[100:, 360:].astype(int)  # below TensorBoard's own bar, and right of the list of runs
    colours = content[np.ptp(content, axis=-1) > 25]
    pale = colours[colours.min(-1) > 120]  # bands are filled with a run's colour, at a third of its opacity
    assert len(pale) > 20_000
    assert len(colours) - len(pale) > 200  # lines of the means
