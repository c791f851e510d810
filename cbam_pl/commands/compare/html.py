"""The report as one page that needs no other file: for a phone, a screen and paper."""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from cbam_pl.commands.compare import figures
from cbam_pl.commands.compare.plan import Plan, nest
from cbam_pl.commands.compare.report import (
    _COSTS,
    MEANING,
    Result,
    accuracy_table,
    cost_meaning,
    cost_table,
    how_measured,
)

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render(plan: Plan, content: dict[str, Any], results: Sequence[Result]) -> str:
    """The page."""
    recipes = content["recipes"]
    compared = any(recipe["difference"] for recipe in recipes.values())
    classes = figures.draw_classes(recipes)
    costs = [figures.draw_against_cost(recipes, key, heading, divisor) for key, (heading, divisor, _) in _COSTS.items()]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text()).render(
        content=content,
        accuracy=accuracy_table(content),
        costs=cost_table(content),
        meaning=MEANING,
        cost_meaning=cost_meaning(content),
        measured=how_measured(content),
        legend=figures.legend(recipes),
        epochs=_svg(figures.draw_epochs(recipes)),
        differences=_svg(figures.draw_differences(recipes)) if compared else None,
        classes=None if classes is None else _svg(classes),
        cost_figures=[_svg(figure) for figure in costs],
        pictures=_pictures(plan, content, results),
    )


def _svg(figure: Figure) -> Markup:
    return Markup(figures.as_svg(figure))


def _pictures(plan: Plan, content: dict[str, Any], results: Sequence[Result]) -> list[dict[str, str]]:
    """Gates and Grad-CAM of the same test images for each recipe, of the first seed that all have."""
    from cbam_pl.commands.visualize import Choice, LoadedCheckpoint, look
    from cbam_pl.inspect.drawing import draw_attention, draw_grad_cam
    from cbam_pl.inspect.gates import attention_maps, feature_maps
    from cbam_pl.inspect.grad_cam import grad_cam
    from cbam_pl.training.checkpoint import read_checkpoint

    recipes = content["recipes"]
    done = {(one.name, one.seed): one for one in results}
    seed = next((seed for seed in plan.seeds if all((name, seed) in done for name in recipes)), None)
    pictures: list[dict[str, str]] = []
    for name, recipe in recipes.items():
        own = next(
            one for one in results if one.name == name and one.seed in (seed, one.seed if seed is None else seed)
        )
        data = nest(plan.configs[name])["data"]
        loaded = LoadedCheckpoint(
            own.checkpoint, own.checkpoint.stem, read_checkpoint(own.checkpoint), {**data, "seed": own.seed}
        )
        network, pictured, inputs = look(loaded, Choice())
        maps = attention_maps(network, inputs)
        title = f"{recipe['label']}, seed {own.seed}, epoch {own.epoch}"
        cams = grad_cam(network, inputs, feature_maps(network, inputs).logits.argmax(1))
        drawings = [("Grad-CAM and spatial gates", lambda: draw_grad_cam(pictured, cams, maps, f"Grad-CAM\n{title}"))]  # noqa: B023
        if maps:
            drawings.append(("gates", lambda: draw_attention(pictured, maps, f"Attention\n{title}")))  # noqa: B023
        for kind, draw in drawings:
            try:
                image = b64encode(figures.as_png(draw())).decode()
                pictures.append({"caption": f"{title}: {kind}", "source": f"data:image/png;base64,{image}"})
            except ValueError as error:
                pictures.append({"caption": f"{title}: no picture of the {kind}: {error}", "source": ""})
    return pictures
