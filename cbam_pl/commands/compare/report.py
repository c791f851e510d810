"""What the runs say, as figures and sentences, and the files that tell it: report.md, .csv, .json and .html."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cbam_pl.commands.compare.jobs import Job, find, read_epochs, threads_per_job
from cbam_pl.commands.compare.plan import Plan
from cbam_pl.commands.compare.statistics import LEVEL, POWER, compare_pairs, holm, seeds_needed, summarise
from cbam_pl.errors import UserError

SEEN_EFFECT = 0.2  # points of accuracy, for the number of seeds that would show it
_COSTS = {  # key of Cost → heading, divisor, digits
    "parameters": ("parameters", 1, 0),
    "flops": ("MFLOP / image", 1e6, 1),
    "train_images_per_second": ("training images/s", 1, 0),
    "latency_1": ("latency of 1 image, ms", 1, 2),
    "latency_256": ("latency of 256, ms", 1, 0),
    "memory": ("peak memory, MB", 1, 0),
}


@dataclass(frozen=True)
class Result:
    """One run that is done.

    Args:
        name: of the recipe.
        seed: of the run.
        checkpoint: best.ckpt.
        epoch: of the checkpoint, from 1: the one with the highest validation accuracy.
        val_acc: of that epoch, as a fraction.
        test_acc: on the test images, as a fraction.
        test_loss: likewise.
        epochs: rows of metrics.csv.
        classes: names.
        confusion: test images by true class (rows) and predicted class (columns).
        environment: what it was tested with.
    """

    name: str
    seed: int
    checkpoint: Path
    epoch: int
    val_acc: float
    test_acc: float
    test_loss: float
    epochs: list[dict[str, float]]
    classes: list[str]
    confusion: list[list[int]]
    environment: dict[str, str]


def read_results(jobs: Sequence[Job]) -> list[Result]:
    """The results of all jobs that are done."""
    results = []
    for job in jobs:
        state, run = find(job)
        if state != "done" or run is None:
            continue
        tested = json.loads((run.logs / "test.json").read_text())
        epochs = read_epochs(run)
        results.append(
            Result(
                job.name,
                job.seed,
                run.checkpoints / "best.ckpt",
                tested["epoch"],
                next((row["val/acc"] for row in epochs if row["epoch"] == tested["epoch"]), float("nan")),
                tested["test/acc"],
                tested["test/loss"],
                epochs,
                tested["classes"],
                tested["confusion"],
                tested["environment"],
            )
        )
    return results


def analyse(plan: Plan, results: Sequence[Result], costs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All that the report says, as plain values; accuracies and differences in points (per cent).

    Args:
        plan: the comparison.
        results: the runs that are done, at least one.
        costs: recipe → the fields of Cost.
    """
    runs = {(result.name, result.seed): result for result in results}
    names = [name for name in plan.configs if any((name, seed) in runs for seed in plan.seeds)]
    labels, baseline = plan.labels, next(iter(plan.configs))
    images = sum(map(sum, results[0].confusion))
    recipes: dict[str, Any] = {}
    for name in names:
        own = [runs[name, seed] for seed in plan.seeds if (name, seed) in runs]
        recipes[name] = {
            "label": labels[name],
            "test_acc": asdict(summarise([100 * one.test_acc for one in own])),
            "val_acc": asdict(summarise([100 * one.val_acc for one in own])),
            "difference": None,
            "cost": costs.get(name),
            "curve": _curve(own),
            "per_class": None,
        }
        pairs = [(runs[name, seed], runs[baseline, seed]) for seed in plan.seeds if _paired(runs, name, baseline, seed)]
        if name == baseline or not pairs:
            continue
        difference = compare_pairs([100 * ours.test_acc for ours, _ in pairs], [100 * one.test_acc for _, one in pairs])
        recipes[name]["difference"] = asdict(difference) | {
            "pairs": [100 * (ours.test_acc - one.test_acc) for ours, one in pairs],
            "images": difference.mean / 100 * images,
            "seeds_needed": None if difference.sd is None else seeds_needed(SEEN_EFFECT, difference.sd),
        }
        if pairs[0][0].classes == pairs[0][1].classes:
            recipes[name]["per_class"] = _per_class(pairs)
    compared = [name for name in names if recipes[name]["difference"] and recipes[name]["difference"]["p"] is not None]
    for name, p in zip(compared, holm([recipes[name]["difference"]["p"] for name in compared]), strict=True):
        recipes[name]["difference"]["p_holm"] = p
    sentences = []
    for name in names:
        difference = recipes[name]["difference"]
        if difference:
            shown = difference.get("p_holm") is not None and difference["p_holm"] < 1 - LEVEL
            difference["shown"] = shown
            difference["sentence"] = _sentence(labels[name], labels[baseline], difference, len(compared))
            sentences.append(difference["sentence"])
    missing = [f"{name} seed {seed}" for seed in plan.seeds for name in plan.configs if (name, seed) not in runs]
    common, differing = _split_settings(plan.configs)
    return {
        "title": " against ".join([_listed([labels[name] for name in names if name != baseline]), labels[baseline]]),
        "baseline": baseline,
        "labels": labels,
        "seeds": plan.seeds,
        "test_images": images,
        "sentences": sentences,
        "notes": _notes(plan, missing, results),
        "recipes": recipes,
        "runs": [
            {
                "recipe": one.name,
                "seed": one.seed,
                "epoch": one.epoch,
                "val_acc": 100 * one.val_acc,
                "test_acc": 100 * one.test_acc,
                "test_loss": one.test_loss,
                "checkpoint": _short_path(one.checkpoint),
                **one.environment,
            }
            for one in results
        ],
        "settings": {"common": common, "differing": differing},
        "classes": results[0].classes,
        "confusion": {f"{one.name} seed {one.seed}": one.confusion for one in results},
        "threads": threads_per_job(),
    }


def _short_path(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _paired(runs: dict[tuple[str, int], Result], name: str, baseline: str, seed: int) -> bool:
    return (name, seed) in runs and (baseline, seed) in runs


def _curve(own: Sequence[Result]) -> dict[str, list[float]]:
    """Validation accuracy by epoch in points: mean and, of several seeds, standard deviation."""
    epochs = sorted(set.intersection(*({int(row["epoch"]) for row in one.epochs} for one in own)))
    values = [{int(row["epoch"]): 100 * row["val/acc"] for row in one.epochs} for one in own]
    summaries = [summarise([one[epoch] for one in values]) for epoch in epochs]
    return {
        "epoch": [float(epoch) for epoch in epochs],
        "mean": [summary.mean for summary in summaries],
        "sd": [summary.sd or 0.0 for summary in summaries],
    }


def _per_class(pairs: Sequence[tuple[Result, Result]]) -> list[dict[str, Any]]:
    """Difference of each class's accuracy, in points."""
    rows = []
    for index, name in enumerate(pairs[0][0].classes):
        if not sum(pairs[0][0].confusion[index]):
            continue  # no test image is of this class
        ours, baseline = (
            [100 * one.confusion[index][index] / sum(one.confusion[index]) for one in side]
            for side in zip(*pairs, strict=True)
        )
        difference = compare_pairs(ours, baseline)
        rows.append({"class": name, "mean": difference.mean, "interval": difference.interval})
    return rows


def _split_settings(configs: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The settings that all recipes share, and the others with each recipe's value."""
    keys = {key: None for settings in configs.values() for key in settings}
    common, differing = {}, {}
    for key in keys:
        values = [settings.get(key) for settings in configs.values()]
        if all(value == values[0] for value in values):
            common[key] = values[0]
        else:
            differing[key] = values
    return common, differing


def _notes(plan: Plan, missing: Sequence[str], results: Sequence[Result]) -> list[str]:
    """What a reader must know before believing the figures."""
    notes = []
    if len(plan.seeds) == 1:
        notes.append("One seed: there are no intervals, and no difference can be shown. Give several with --seeds.")
    if plan.unequal:
        notes.append(f"The recipes do not have the same data and budget: {'; '.join(plan.unequal)}.")
    if missing:
        notes.append(f"Missing, since they are not done: {', '.join(missing)}. A pair without both runs is left out.")
    for key in ("device", "versions", "commit"):
        if len(values := {one.environment[key]: None for one in results}) > 1:
            notes.append(f"The runs do not have the same {key}: {'; '.join(values)}.")
    return notes


# In words


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign."""
    text = f"{value:+.{digits}f}"
    # Neither +0.00 nor -0.00 is a direction.
    return text[1:] if not float(text) else text.replace("-", "−")


def _sentence(label: str, baseline: str, difference: dict[str, Any], comparisons: int) -> str:
    """The comparison of one recipe with the baseline, and what it shows."""
    begin = f"{label} − {baseline}: {signed(difference['mean'])} points"
    if difference["interval"] is None:
        return f"{begin}, n = 1: one pair has no interval, so no difference is shown"
    low, high = map(signed, difference["interval"])
    begin += f", {100 * LEVEL:.0f} % interval {low} to {high}, n = {difference['n']}: "
    if difference["shown"]:
        return f"{begin}{label} is {'better' if difference['mean'] > 0 else 'worse'}"
    if difference["p"] < 1 - LEVEL:
        return f"{begin}no difference shown, once corrected for {comparisons} comparisons"
    return f"{begin}no difference shown"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "nothing"


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{signed(interval[0])} to {signed(interval[1])}"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def accuracy_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the accuracies and differences."""
    base = content["labels"][content["baseline"]]
    headings = [
        "recipe",
        "test accuracy, %",
        "n",
        f"− {base}, points",
        "95 % interval (t)",
        "95 % interval (bootstrap)",
    ]
    headings += ["p (Holm)", f"of {content['test_images']:,} test images", f"seeds to show {SEEN_EFFECT} points"]
    rows = []
    for recipe in content["recipes"].values():
        test, difference = recipe["test_acc"], recipe["difference"] or {}
        spread = "" if test["sd"] is None else f" ± {test['sd']:.2f}"
        row = [recipe["label"], f"{test['mean']:.2f}{spread}", str(test["n"])]
        if difference:
            needed = difference["seeds_needed"]
            row += [signed(difference["mean"]), _interval(difference["interval"]), _interval(difference["bootstrap"])]
            row += [
                _p(difference.get("p_holm")),
                signed(difference["images"], 0),
                "" if needed is None else f"{needed:,}",
            ]
        else:
            row += [""] * 6
        rows.append(row)
    return headings, rows


def cost_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the costs."""
    rows = []
    for recipe in content["recipes"].values():
        cost = recipe["cost"] or {}
        row = [recipe["label"]]
        for key, (_, divisor, digits) in _COSTS.items():
            value = cost.get(key)
            row.append("" if value is None else f"{value / divisor:,.{digits}f}")
        rows.append(row)
    return ["recipe", *(heading for heading, _, _ in _COSTS.values())], rows


def how_measured(content: dict[str, Any]) -> list[str]:
    """On what, with how many seeds, where, when."""
    settings = content["settings"]["common"]
    first = content["runs"][0]
    dates = sorted({run["date"] for run in content["runs"]})
    data = settings.get("data.dataset")
    known = {
        "data": f"images of {settings.get('data.root')}" if data == "folder" else data,
        "epochs": settings.get("trainer.max_epochs"),
        "seeds": " ".join(map(str, content["seeds"])),
        "device": first["device"],
        "versions": first["versions"],
        "commit": first["commit"],
        "tested": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
    }
    return [f"{name}: {value}" for name, value in known.items() if value is not None]


# Files


def earlier_costs(plan: Plan) -> dict[str, dict[str, Any]] | None:
    """The costs that the report there holds already; None where there are none of all recipes."""
    try:
        recipes = json.loads((plan.output / "report.json").read_text())["recipes"]
        costs = {name: recipes[name]["cost"] for name in plan.configs}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return costs if all(costs.values()) else None


def write_report(plan: Plan, content: dict[str, Any], results: Sequence[Result]) -> None:
    """Write report.md, report.csv, report.json and report.html into the output folder.

    Raises:
        UserError: it cannot be written.
    """
    from cbam_pl.commands.compare.html import render

    folder = plan.output
    try:
        (folder / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        with (folder / "report.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(content["runs"][0]))
            writer.writeheader()
            writer.writerows(content["runs"])
        (folder / "report.md").write_text(markdown(content))
        (folder / "report.html").write_text(render(plan, content, results))
    except OSError as error:
        raise UserError(
            f"cannot write the report to {folder} ({error.strerror}); make room, or name another"
        ) from error


def markdown(content: dict[str, Any]) -> str:
    """The report as Markdown: sentences and tables."""
    parts = [f"# {content['title']}", "\n".join(f"- {sentence}" for sentence in content["sentences"])]
    parts += ["\n".join(f"> {note}" for note in content["notes"])] if content["notes"] else []
    parts += [_markdown_table(*accuracy_table(content)), f"{MEANING}\n"]
    parts += [
        _markdown_table(*cost_table(content)),
        f"{cost_meaning(content)}\n",
        "; ".join(how_measured(content)) + ".",
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


MEANING = (
    "Test accuracy of the epoch with the highest validation accuracy: mean ± standard deviation over n seeds. "
    'Differences are paired by seed. "No difference shown" does not mean that there is none: the interval tells which '
    f"differences remain possible. Seeds to show {SEEN_EFFECT} points: pairs at which such a difference would be shown "
    f"with a chance of {100 * POWER:.0f} %, if the pairs spread as they did here."
)


def cost_meaning(content: dict[str, Any]) -> str:
    """What the costs are."""
    device = content["runs"][0]["device"]
    threads = "" if device.startswith("cuda") else f", threads: {content['threads']}"
    return (
        "A multiplication and an addition are two FLOP; one forward pass. Speeds: medians of interleaved rounds on "
        f"{device}{threads}. Memory: of a process that trains."
    )


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_report(content: dict[str, Any]) -> None:
    """The tables and sentences, for the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 160)
    for headings, rows in (accuracy_table(content), cost_table(content)):
        table = Table()
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in (*content["notes"], *content["sentences"]):
        console.print(line, highlight=False, markup=False)
