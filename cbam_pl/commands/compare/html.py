"""The report as one HTML page that needs no other file: for a phone, a screen and paper."""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from cbam_pl.commands.compare import figures, report
from cbam_pl.commands.compare.plan import Plan, nest
from cbam_pl.commands.visualize import LoadedCheckpoint, pictures_of
from cbam_pl.training.checkpoint import read_checkpoint

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render(plan: Plan, content: dict[str, Any], results: Sequence[report.Result]) -> str:
    """The page."""
    recipes, labels = content["recipes"], content["labels"]
    headings = ["recipe", "seed", "best epoch", "validation, %", "test, %", "test loss", "checkpoint"]
    cells = {"val_acc": ".2f", "test_acc": ".2f", "test_loss": ".4f", "checkpoint": ""}
    runs = [
        (labels[run["recipe"]], run["seed"], run["epoch"], *(format(run[key], form) for key, form in cells.items()))
        for run in content["runs"]
    ]
    differing = [(key, *values) for key, values in content["settings"]["differing"].items()]
    compared = any(recipe["difference"] for recipe in recipes.values())
    classes = figures.draw_classes(recipes)
    costs = [figures.draw_against_cost(recipes, key, *column[:2]) for key, column in report.COSTS.items()]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text()).render(
        content=content,
        accuracy=report.accuracy_table(content),
        costs=report.cost_table(content),
        meaning=report.MEANING,
        cost_meaning=report.cost_meaning(content),
        measured=report.how_measured(content),
        legend=figures.legend(recipes),
        runs=(headings, runs),
        differing=(["differing", *labels.values()], differing),
        epochs=_svg(figures.draw_epochs(recipes)),
        differences=_svg(figures.draw_differences(recipes)) if compared else None,
        classes=None if classes is None else _svg(classes),
        cost_figures=[_svg(figure) for figure in costs],
        pictures=[picture for name in recipes for picture in _pictures(plan, name, results)],
    )


def _svg(figure: Figure) -> Markup:
    return Markup(figures.as_svg(figure))


def _pictures(plan: Plan, name: str, results: Sequence[report.Result]) -> list[dict[str, str]]:
    """Gates and Grad-CAM of a recipe, of the first seed that all recipes have: the same test images for each."""
    seeds = {other: [one["seed"] for one in results if one["recipe"] == other] for other in plan.configs}
    common = [seed for seed in seeds[name] if all(seed in given for given in seeds.values() if given)]
    seed = (common or seeds[name])[0]
    (result,) = (one for one in results if (one["recipe"], one["seed"]) == (name, seed))
    path, data = Path(result["checkpoint"]), {**nest(plan.configs[name])["data"], "seed": seed}
    title = f"{plan.labels[name]}, seed {seed}, epoch {result['epoch']}"
    drawn = pictures_of(LoadedCheckpoint(path, read_checkpoint(path), data), title)
    pictures = []
    for kind, key in (("Grad-CAM and spatial gates", "grad_cam"), ("gates", "attention")):
        if key not in drawn:
            continue
        try:
            image = b64encode(figures.as_png(drawn[key]())).decode()
            pictures.append({"caption": f"{title}: {kind}", "source": f"data:image/png;base64,{image}"})
        except ValueError as error:
            pictures.append({"caption": f"{title}: no picture of the {kind}: {error}", "source": ""})
    return pictures
