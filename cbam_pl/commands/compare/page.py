"""The report as one HTML page that needs no other file, for a phone, a screen and paper."""

from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO, StringIO
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from cbam_pl.commands.compare.plan import Plan, nest, trusted
from cbam_pl.commands.compare.report import COSTS, Result
from cbam_pl.commands.visualize.pictures import LoadedCheckpoint, gallery_of, pictures_of
from cbam_pl.errors import UserError
from cbam_pl.inspect.curves import LINE_COLOURS, label_axes
from cbam_pl.inspect.drawing import DPI, NORMAL, cut, rasterise
from cbam_pl.training.checkpoint import read_checkpoint

_WIDTH = 4.1  # inches, so that a chart's text can be read on a phone
# Six, as there are seven colours: no two of 42 recipes look alike.
_MARKERS, _SIGNS = "osD^vP", "●■◆▲▼✚"
_MAX_CLASSES = 20
# Nothing of these ends the command: the figures are there without pictures. RuntimeError: a GPU's memory, too.
_NO_PICTURE = (UserError, ValueError, OSError, RuntimeError, MemoryError)
_GALLERY_RECIPES = 3  # at most 10 MB, and side by side on a phone


def render(plan: Plan, content: dict[str, Any], results: Sequence[Result], no_gallery: str = "") -> str:
    """The page; with a link to gallery.html beside it, or the reason why there is none."""
    recipes, labels = content["recipes"], content["labels"]
    headings = ["recipe", "seed", "best epoch", "validation, %", "test, %", "test loss", "checkpoint"]
    cells = {"val_acc": ".2f", "test_acc": ".2f", "test_loss": ".4f", "checkpoint": ""}
    runs = [
        (labels[run["recipe"]], run["seed"], run["epoch"], *(format(run[key], form) for key, form in cells.items()))
        for run in content["runs"]
    ]
    differing = [(key, *values) for key, values in content["settings"]["differing"].items()]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(Path(__file__).with_name("report.html.jinja").read_text("utf-8")).render(
        content=content,
        legend=[(one["label"], _style(n)["color"], _SIGNS[n % len(_SIGNS)]) for n, one in enumerate(recipes.values())],
        runs={"headings": headings, "rows": runs},
        differing={"headings": ["setting", *labels.values()], "rows": differing},
        epochs=_svg(_draw_epochs(recipes)),
        differences=_svg(_draw_differences(recipes, content["controls"])),
        classes=_svg(_draw_classes(recipes)),
        costs=[_svg(_draw_against_cost(recipes, key, *column[:2])) for key, column in COSTS.items()],
        pictures=[picture for name in recipes for picture in _pictures(plan, name, results)],
        no_gallery=no_gallery,
        in_gallery=[labels[name] for name in _in_gallery(plan, results)],
    )


def _svg(figure: Figure | None) -> Markup | None:
    if figure is None:
        return None
    # "none": text can be searched and read aloud.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "compare", "font.family": "sans-serif"}):
        stream = StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    return Markup(text[text.index("<svg") :])


def write_gallery(path: Path, plan: Plan, results: Sequence[Result]) -> str:
    """Write the page to look through test images, as the first recipes' networks see them.

    Returns:
        Why there is none, or empty.
    """
    try:
        loaded = {plan.labels[name]: _load(plan, name, results)[1] for name in _in_gallery(plan, results)}
        path.write_text(gallery_of(loaded), "utf-8")
    except _NO_PICTURE as error:
        with suppress(OSError):
            path.unlink()  # what an earlier report left, or a full disk
        return _reason(error)
    return ""


def _in_gallery(plan: Plan, results: Sequence[Result]) -> list[str]:
    recipes = {result["recipe"] for result in results}
    return [name for name in plan.given if name in recipes][:_GALLERY_RECIPES]


def _load(plan: Plan, name: str, results: Sequence[Result]) -> tuple[int, LoadedCheckpoint]:
    """The seed and the network of a recipe: of the first seed with every recipe's checkpoint, else with its own."""
    paths = {(one["recipe"], one["seed"]): Path(one["checkpoint"]) for one in results}
    recipes = {recipe for recipe, _ in paths}
    there = {run for run, path in paths.items() if path.is_file()}
    own = [seed for seed in plan.seeds if (name, seed) in paths]
    # max takes the first of equals.
    seed = max(own, key=lambda seed: (all((one, seed) in there for one in recipes), (name, seed) in there))
    path, data = paths[name, seed], {**nest(plan.configs[name])["data"], "seed": seed}
    if (name, seed) not in there:
        raise UserError(f"{path} is not there")
    return seed, LoadedCheckpoint(path, read_checkpoint(path), data, trusted(plan.configs[name]))


def _pictures(plan: Plan, name: str, results: Sequence[Result]) -> list[dict[str, str]]:
    """Gates and Grad-CAM of a recipe's network: the same test images for each."""
    try:
        seed, loaded = _load(plan, name, results)
        title = f"{plan.labels[name]}, seed {seed}, epoch {loaded.content['epoch'] + 1}"
        drawn = pictures_of(loaded, title)
    except _NO_PICTURE as error:
        return [{"caption": f"{plan.labels[name]}: no pictures: {_reason(error)}", "source": ""}]
    pictures = []
    for kind, key in (("Grad-CAM, and spatial gates if there are any", "grad_cam"), ("gates", "attention")):
        try:
            if key in drawn:
                small, image = BytesIO(), Image.fromarray(rasterise(drawn[key]()))
                image.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
                source = f"data:image/png;base64,{b64encode(small.getvalue()).decode()}"
                pictures.append({"caption": f"{title}: {kind}", "source": source})
        except _NO_PICTURE as error:
            pictures.append({"caption": f"{title}: no picture of the {kind}: {_reason(error)}", "source": ""})
    return pictures


def _reason(error: BaseException) -> str:
    return str(error) or "out of memory"  # as Python's own MemoryError has no text


def _draw_epochs(recipes: dict[str, Any]) -> Figure:
    figure, axes = _new(2.9)
    for number, recipe in enumerate(recipes.values()):
        epochs, mean, sd = (np.array(recipe["curve"][name]) for name in ("epoch", "mean", "sd"))
        every = max(1, len(epochs) // 6)
        (line,) = axes.plot(epochs, mean, **_style(number, markersize=4, markevery=every))
        axes.fill_between(epochs, mean - sd, mean + sd, color=line.get_color(), alpha=0.18, lw=0)
    _label(axes, "epoch", "validation accuracy, %")
    return figure


def _draw_differences(recipes: dict[str, Any], controls: Sequence[dict[str, Any]]) -> Figure | None:
    numbers = {name: number for number, name in enumerate(recipes)}
    shown = [(numbers[name], one["label"], one["difference"]) for name, one in recipes.items() if one["difference"]]
    for control in controls:
        if control["change"] and control["difference"]:
            names = [recipes[control[key]]["label"] for key in ("recipe", "name")]
            shown.append((numbers[control["recipe"]], " minus ".join(names), control["difference"]))
    if not shown:
        return None
    names = [fill(label, 16) for _, label, _ in shown]
    most_lines = max(name.count("\n") + 1 for name in names)
    figure, axes = _new(1.05 + max(0.5, 0.17 * most_lines) * len(shown))
    for row, (number, _, difference) in enumerate(shown):
        axes.plot(difference["pairs"], [row + 0.2] * len(difference["pairs"]), "o", color="0.55", markersize=3.5)
        if difference["images_interval"]:
            axes.plot(difference["images_interval"], [row, row], color="0.4", linewidth=1)
        _draw_interval(axes, row, difference, _style(number, markersize=7, linewidth=2.5))
    _label_rows(axes, names)
    other = "difference of test accuracy" if controls else "test accuracy minus baseline's"
    _label(axes, f"{other},\npercentage points", "")  # beside long labels, one line is too long
    return figure


def _draw_against_cost(recipes: dict[str, Any], key: str, heading: str, divisor: float) -> Figure | None:
    figure, axes = _new(2.4)
    costs = []
    for number, recipe in enumerate(recipes.values()):
        if recipe["cost"] is None or recipe["cost"][key] is None:
            continue
        test = recipe["test_acc"]
        costs.append(recipe["cost"][key] / divisor)
        axes.errorbar(costs[-1], test["mean"], yerr=test["sd"] or None, **_style(number, markersize=6, capsize=3))
    if not costs:
        return None
    if max(costs) - min(costs) < 0.02 * max(costs):
        middle = (max(costs) + min(costs)) / 2
        axes.set_xlim(0.985 * middle, 1.015 * middle)  # nearly equal costs must not look far apart
    axes.margins(0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if max(costs) >= 10_000:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:.4g} M" if value >= 1e6 else f"{value:,.0f}")
    _label(axes, heading, "test accuracy, %")
    return figure


def _draw_classes(recipes: dict[str, Any]) -> Figure | None:
    shown = [(number, recipe) for number, recipe in enumerate(recipes.values()) if recipe["per_class"]]
    if not shown:
        return None
    rows = [recipe["per_class"] for _, recipe in shown]
    largest = {name: max(abs(row[name]["mean"]) for row in rows) for name in rows[0]}
    chosen = sorted(largest, key=lambda name: -largest[name])[:_MAX_CLASSES]
    classes = [name for name in largest if name in chosen]
    figure, axes = _new(1.05 + len(classes) * (0.16 + 0.1 * len(shown)))
    for place, (number, recipe) in enumerate(shown):
        offset = 0.6 * ((place + 0.5) / len(shown) - 0.5)
        for height, name in enumerate(classes):
            style = _style(number, markersize=4, linewidth=1.2)
            _draw_interval(axes, height + offset, recipe["per_class"][name], style)
    _label_rows(axes, [cut(name, 16) for name in classes])
    _label(axes, "class's accuracy minus baseline's,\npercentage points", "")
    return figure


def _new(height: float) -> tuple[Figure, Axes]:
    figure = Figure((_WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def _draw_interval(axes: Axes, y: float, row: dict[str, Any], style: dict[str, Any]) -> None:
    if row["interval"]:
        axes.plot(row["interval"], [y, y], **{**style, "marker": None})
    axes.plot(row["mean"], y, **style)


def _label_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.axvline(0, color="0.4", linewidth=1, zorder=1)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _label(axes: Axes, x: str, y: str) -> None:
    label_axes(axes, x, y)
    axes.tick_params(labelsize=NORMAL)
    axes.spines[["top", "right"]].set_visible(False)


def _style(number: int, **more: Any) -> dict[str, Any]:
    return {"color": LINE_COLOURS[number % len(LINE_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)], **more}
