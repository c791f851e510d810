"""The tables that `visualize --measure` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from cbam_pl.inspect.ablation import REPLACEMENTS
from cbam_pl.inspect.scores import DELETED, ROAD_PERCENTS
from cbam_pl.tables import print_table


def print_scores(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what `measure` gives, and how to read it."""
    known = [] if rows[0]["inside"] is None else ["inside", "pointing"]
    cells = []
    for row in rows:
        scores = [f"{100 * row[name]:.1f} ± {100 * row[f'{name}_error']:.1f}" for name in known]
        cells.append([row["map"], *scores, *_percent(row, "accuracy")])
    print_table(["map", *(f"{name} %" for name in known), "whole", *(f"-{percent} %" for percent in DELETED)], cells)
    if known:
        print("inside: fraction of the map's energy (above its minimum) on the object; ± is one standard error")
        print("pointing: how often the map's maximum is on the object")
    print("-10 % …: accuracy in % without the most important pixels; for uniform, without random pixels")
    signs = (f"{sign}{percent} %" for sign in "-+" for percent in ROAD_PERCENTS)
    print_table(["map", "whole", *signs], ([row["map"], *_percent(row, "road_w")] for row in rows))
    print(
        f"ROAD, on {rows[0]['road_images']:,} of the images: missing pixels are interpolated, with noise, and leave no "
        "holes\n-10 % …: accuracy in % without the most important pixels; +10 % …: with them alone"
    )


def print_ablation(ablation: Mapping[str, Any]) -> None:
    """Print what `ablate_gates` gives, and how to read it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for row in ablation["rows"]:
        change = f"({100 * row['change']:+.1f} ± {100 * row['change_error']:.1f})"
        rows.setdefault((row["block"], row["gate"]), []).append(f"{100 * row['accuracy']:.1f} {change:>14}")
    print_table(["block", "gate", *REPLACEMENTS], ([*key, *cells] for key, cells in rows.items()))
    print(
        f"accuracy in % where gates are replaced (as trained: {100 * ablation['accuracy']:.1f}), and its change in "
        "percentage points ± one standard error\n"
        "mean: the gate's mean over the images; constant: 1 rescaled to that mean; other image: another image's gate"
    )


def print_randomisation(randomisation: Mapping[str, Any]) -> None:
    """Print what `cascading_randomisation` gives after three of its steps, and how to read it."""
    layers = randomisation["layers"]
    rows = []
    for name, values in randomisation["spearman"].items():
        place = randomisation["layer"] if name == "Grad-CAM" else name
        # The step of the block that holds the map's module, or of the highest one that this holds.
        pairs = ((step, f"{layer}.", f"{place}.") for step, layer in enumerate(layers))
        found = [step for step, layer, place in pairs if place.startswith(layer) or layer.startswith(place)]
        last = len(layers) - 1  # of weights before and between the blocks; Grad-CAM may be of a module without weights
        own = found[0] if found else min(1, last) if name == "Grad-CAM" else last
        rows.append([name, *("-" if values[step] is None else f"{values[step]:.2f}" for step in (0, own, -1))])
    print_table(["map", "classifier", "to its block", "all layers"], rows)
    print(
        "rank correlation of a map with that of the network after its layers were re-initialised from the top down\n"
        "to its block: the classifier and the blocks down to the map's own (of Grad-CAM its layer's)\n"
        "a map that stays near 1 there does not show what the network has learned"
    )


def _percent(row: Mapping[str, Any], prefix: str) -> list[str]:
    return [f"{100 * value:.1f}" for key, value in row.items() if key.startswith(prefix)]
