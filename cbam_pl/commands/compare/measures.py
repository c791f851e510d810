"""What a report compares beside the accuracy: the measures of test.json, and two recipes' answers image by image."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cbam_pl.commands.compare.statistics import compare_pairs, interval_over_images, mcnemar, summarise

Result = dict[str, Any]  # of one run
Pairs = Sequence[tuple[Result, Result]]  # runs of a recipe and of what it is compared with, of the same seed each


@dataclass(frozen=True)
class Measure:
    """How a measure is shown."""

    heading: str
    factor: float  # from the value in test.json to the one that is shown
    digits: int
    higher_is_better: bool = False


MEASURES = {  # name in test.json and test.npz → how it is shown; a run that lacks a measure leaves it out of the report
    "nll": Measure("NLL", 1, 4),
    "brier": Measure("Brier score", 1, 4),
    "ece": Measure("ECE, %", 100, 2),
    "calibrated_nll": Measure("NLL, calibrated", 1, 4),
    "calibrated_brier": Measure("Brier score, calibrated", 1, 4),
    "calibrated_ece": Measure("ECE, calibrated, %", 100, 2),
    "top5": Measure("top-5 accuracy, %", 100, 2, higher_is_better=True),
    "corrupted": Measure("accuracy on corrupted images, %", 100, 2, higher_is_better=True),  # of robustness.json
}


def read_measures(test: dict[str, Any]) -> dict[str, float | None]:
    """The measures of a run's test, as they are shown; None for those that it lacks."""
    calibrated = test.get("calibration", {}).get("measures", {})
    found = test.get("measures", {}) | {f"calibrated_{name}": value for name, value in calibrated.items()}
    return {name: one.factor * found[name] if name in found else None for name, one in MEASURES.items()}


def compare_measures(own: Sequence[Result], pairs: Pairs) -> dict[str, dict[str, Any]]:
    """A recipe's measures: of each its summary over the seeds, and its difference where there are pairs."""
    intervals = intervals_over_images(pairs, {name: measure.factor for name, measure in MEASURES.items()})
    measures = {}
    for name in MEASURES:
        if all(run.get(name) is not None for run in (*own, *(run for pair in pairs for run in pair))):
            difference = None
            if pairs:
                difference = compare_runs(pairs, name, intervals.get(name))
            measures[name] = asdict(summarise([run[name] for run in own])) | {"difference": difference}
    return measures


def compare_runs(pairs: Pairs, name: str, images_interval: list[float] | None) -> dict[str, Any]:
    """The paired difference of a figure; its interval over seeds and images, too, needs a spread of the seeds."""
    difference = compare_pairs(*([run[name] for run in side] for side in zip(*pairs, strict=True)))
    interval = None if difference.interval is None else images_interval
    return asdict(difference) | {"images_interval": interval, "significant": False}


def intervals_over_images(pairs: Pairs, factors: dict[str, float]) -> dict[str, list[float]]:
    """Intervals over seeds and images of mean differences, each times its factor: of "correct", or of measures.

    Empty with fewer than two pairs, or where the runs' predictions are missing or not of the same images; without the
    measures that are not those of single images.
    """
    if len(pairs) < 2 or not _can_be_paired(pairs):
        return {}
    intervals = {}
    for name, factor in factors.items():
        if all(name in run["predictions"] for pair in pairs for run in pair):
            differences = np.array([ours["predictions"][name] - other["predictions"][name] for ours, other in pairs])
            intervals[name] = [factor * end for end in interval_over_images(differences)]
    return intervals


def count_images(pairs: Pairs) -> dict[int, dict[str, Any]]:
    """McNemar's counts and p value of each pair, by seed; empty without predictions of the same images."""
    if not _can_be_paired(pairs):
        return {}
    correct = [[run["predictions"]["correct"] > 0 for run in pair] for pair in pairs]
    return {ours["seed"]: asdict(mcnemar(*both)) for (ours, _), both in zip(pairs, correct, strict=True)}


def distinct(runs: Iterable[Result], key: str) -> set[Any]:
    """The values of a key of test.json, which those of earlier versions may lack."""
    return {value for run in runs if (value := run["test"].get(key)) is not None}


def are_of_same_images(runs: Sequence[Result]) -> bool:
    """Whether the runs were tested on the same images, as far as is known: earlier versions stored only how many."""
    known = [predictions for run in runs if (predictions := run.get("predictions"))]
    return all(len(distinct(runs, key)) <= 1 for key in ("images", "tested_images")) and all(
        np.array_equal(one[name], known[0][name]) for one in known for name in ("image", "label")
    )


def _can_be_paired(pairs: Pairs) -> bool:
    runs = [run for pair in pairs for run in pair]
    return bool(runs) and all(run.get("predictions") for run in runs) and are_of_same_images(runs)


# As tables


def measures_table(recipes: dict[str, Any], baseline: str) -> dict[str, Any] | None:
    """A row for each measure and recipe; None where the runs have no measures."""
    rows = []
    for name, measure in MEASURES.items():
        for recipe in recipes.values():
            if name not in recipe["measures"]:
                continue
            values, digits = recipe["measures"][name], measure.digits
            row = [measure.heading, recipe["label"], show_mean(values, digits)]
            if difference := values["difference"]:
                row.append(signed(difference["mean"], digits))
                row += [show_interval(difference[key], digits) for key in ("interval", "images_interval")]
                row.append(show_p(difference.get("p_holm")))
            rows.append(row + [""] * (7 - len(row)))
    if not rows:
        return None
    headings = ["measure", "recipe", "mean ± sd", f"− {baseline}"]
    headings += ["95 % interval over seeds", "over seeds and images", "p (Holm)"]
    names = [name for name in MEASURES if any(name in recipe["measures"] for recipe in recipes.values())]
    better = [MEASURES[name].heading.partition(",")[0] for name in names if MEASURES[name].higher_is_better]
    meaning = (
        "NLL: mean negative log-likelihood of the true class, in nats. Brier score: squared error of the "
        "probabilities, summed over the classes. ECE: expected calibration error, 15 bins of equal width. "
        + ("Calibrated: with the temperature that fits the validation images. " if "calibrated_nll" in names else "")
        + ("Corrupted images: mean over 15 corruptions at 5 severities. " if "corrupted" in names else "")
        + f"Lower is better{', except for: ' if better else ''}{', '.join(better)}. "
        "The p values of all measures, and of the accuracy, are corrected together."
    )
    return {"headings": headings, "rows": rows, "meaning": meaning}


def mcnemar_table(recipes: dict[str, Any], baseline: str) -> dict[str, Any] | None:
    """McNemar's counts, a row for each pair; None where there are none."""
    rows = [
        [
            recipe["label"],
            str(seed),
            *(f"{one[key]:,}" for key in ("both", "ours", "baseline", "neither")),
            show_p(one["p"]),
        ]
        for recipe in recipes.values()
        for seed, one in recipe["mcnemar"].items()
    ]
    headings = ["recipe", "seed", "both correct", "only the recipe", f"only {baseline}", "neither", "p (McNemar)"]
    meaning = (
        "Test images that the two networks of a seed classify correctly. p: exact, of McNemar's test that these two "
        "networks are equally accurate; it says nothing of other seeds, and is not corrected."
    )
    return {"headings": headings, "rows": rows, "meaning": meaning} if rows else None


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign."""
    text = f"{value:+.{digits}f}"
    # Neither +0.00 nor -0.00 is a direction.
    return text[1:] if not float(text) else text.replace("-", "−")


def show_mean(summary: dict[str, Any], digits: int = 2) -> str:
    """A mean with its standard deviation, if there is one."""
    spread = "" if summary["sd"] is None else f" ± {summary['sd']:.{digits}f}"
    return f"{summary['mean']:.{digits}f}{spread}"


def show_interval(interval: Sequence[float] | None, digits: int = 2) -> str:
    """Both ends, or nothing."""
    return "" if interval is None else f"{signed(interval[0], digits)} to {signed(interval[1], digits)}"


def show_p(p: float | None) -> str:
    """A p value, or nothing."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
