"""The report: its content as one plain value, made once, and report.md, .csv and .json; page.py makes report.html."""

import csv
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from cbam_pl.commands.compare.controls import describe
from cbam_pl.commands.compare.jobs import (
    Job,
    find,
    read_best,
    read_epochs,
    read_predictions,
    read_test,
)
from cbam_pl.commands.compare.measures import (
    Result,
    are_of_same_images,
    compare_measures,
    compare_runs,
    count_images,
    distinct,
    intervals_over_images,
    mcnemar_table,
    measures_table,
    read_measures,
    show_interval,
    show_mean,
    show_p,
    signed,
)
from cbam_pl.commands.compare.plan import Plan, split_settings
from cbam_pl.commands.compare.robustness import add_robustness, robustness_table, with_robustness
from cbam_pl.commands.compare.statistics import (
    LEVEL,
    POWER,
    compare_pairs,
    holm,
    least_significant,
    seeds_needed,
    summarise,
)
from cbam_pl.commands.robustness import read_robustness
from cbam_pl.environment import UNKNOWN, commit, environments_by_key
from cbam_pl.errors import UserError
from cbam_pl.tables import print_table
from cbam_pl.training.run import Run, write_text

EFFECT = 0.2  # percentage points of accuracy, for the number of seeds that would detect it
COSTS = {  # name → heading, divisor, digits
    "parameters": ("parameters", 1, 0),
    "flops": ("MFLOP / image", 1e6, 1),
    "train_images_per_second": ("training images/s", 1, 0),
    "latency_1": ("latency of 1 image, ms", 1, 2),
    "latency_256": ("latency of 256, ms", 1, 0),
    "memory": ("peak memory, MB", 1, 0),
}


def read_results(jobs: Iterable[Job]) -> list[Result]:
    """Of each job that is done: its row in report.csv, in per cent, and what its files hold.

    Those are `test`, `predictions`, None after the test of an earlier version, and `epochs`.
    """
    results = []
    for job in jobs:
        state, run = find(job)
        tested = state in ("tested", "done")
        if tested and run is not None and (best := read_best(run)) and (test := read_test(run)):
            try:
                results.append(_result_of(job, run, best, test))
            except (AttributeError, ArithmeticError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"test.json or robustness.json in {run.logs} is damaged ({error!r}); restore it, or delete it: "
                    "compare then tests the run again, or trains it where its checkpoints are gone"
                ) from error
    return results


def _result_of(job: Job, run: Run, best: dict[str, Any], test: dict[str, Any]) -> Result:
    path, here = run.best, Path.cwd()
    test = with_robustness(test, read_robustness(run.logs, test))
    trained_on = environments_by_key(test.get("trained_on", [UNKNOWN]))
    confusion = np.asarray(test["confusion"])
    return {
        "recipe": job.name,
        "seed": job.seed,
        "epoch": test["epoch"],
        "val_acc": 100 * best["val/acc"],
        # Exact on every device: test/acc is a float32 quotient on some, and equal differences would seem to vary.
        "test_acc": 100 * int(confusion.trace()) / int(confusion.sum()),
        "test_loss": test["test/loss"],
        **read_measures(test),
        "checkpoint": str(path.relative_to(here) if path.is_relative_to(here) else path),
        **test["environment"],
        **{f"trained_{key}": text for key, text in trained_on.items()},
        "test": test,
        "predictions": read_predictions(run, test),
        "epochs": read_epochs(run),
    }


def analyse(plan: Plan, results: Sequence[Result], costs: dict[str, Any]) -> dict[str, Any]:
    """All that the report says, figures and text; accuracies in per cent, differences in percentage points."""
    runs = {(result["recipe"], result["seed"]): result for result in results}
    names = [name for name in plan.configs if any((name, seed) in runs for seed in plan.seeds)]
    labels, baseline = plan.labels, next(iter(plan.configs))
    compared = [name for name in plan.given if name != baseline]
    test = results[0]["test"]
    images = test["images"] if len(distinct(results, "images")) == 1 else None
    recipes: dict[str, Any] = {}
    for name in names:
        own = [runs[name, seed] for seed in plan.seeds if (name, seed) in runs]
        pairs = _pairs(runs, name, baseline) if name != baseline else []
        recipes[name] = {
            "label": labels[name],
            "test_acc": asdict(summarise([one["test_acc"] for one in own])),
            "val_acc": asdict(summarise([one["val_acc"] for one in own])),
            "difference": _difference(pairs, images) if pairs else None,
            "measures": compare_measures(own, pairs),
            "mcnemar": count_images(pairs),
            "cost": costs.get(name),
            "curve": _curve(own),
            "per_class": _per_class(pairs) if pairs else None,
        }
    add_robustness(recipes, results, baseline)
    # By recipe and what it is compared with. Where the baseline itself is a control, that is one comparison, not two.
    differences = {(name, baseline): recipe["difference"] for name, recipe in recipes.items() if recipe["difference"]}
    for control in plan.controls:
        key = (control.recipe, control.name)
        if key not in differences and (pairs := _pairs(runs, *key)):
            differences[key] = _difference(pairs, images)
    differences = dict(sorted(differences.items(), key=lambda one: one[0][0] in plan.added))  # the controls' own last
    others = [measure["difference"] for recipe in recipes.values() for measure in recipe["measures"].values()]
    tested = [one for one in (*differences.values(), *others) if one and one["p"] is not None]
    for difference, p in zip(tested, holm([difference["p"] for difference in tested]), strict=True):
        difference |= {"p_holm": p, "significant": p < 1 - LEVEL}
    for (name, other), difference in differences.items():
        difference["sentence"] = _sentence(labels[name], labels[other], difference, len(tested))
    controls = [
        asdict(control) | describe(control, plan) | {"difference": differences.get((control.recipe, control.name))}
        for control in plan.controls
    ]
    findings = _findings(controls, differences, labels)
    missing = [f"{name} seed {seed}" for seed in plan.seeds for name in plan.configs if (name, seed) not in runs]
    content = {
        "title": f"{_listed([labels[name] for name in names if name in compared])} against {labels[baseline]}"
        + (" and its controls" if controls else ""),
        "baseline": baseline,
        "labels": labels,
        "seeds": plan.seeds,
        "test_images": images,
        "comparisons": len(tested),
        "pairs": max((one["n"] for one in tested), default=0),  # fewer than the seeds while runs are missing
        "sentences": [finding["sentence"] for finding in findings],
        "findings": findings,
        "notes": [*_notes(plan, missing, results), *filter(None, (control["note"] for control in controls))],
        "measured": _how_measured(plan, results),
        "recipes": recipes,
        "controls": controls,
        "runs": [
            {key: value for key, value in one.items() if key not in ("test", "predictions", "epochs")}
            for one in results
        ],
        "settings": dict(zip(("common", "differing"), split_settings(plan.configs), strict=True)),
        "classes": test["classes"],
        "confusion": {f"{one['recipe']} seed {one['seed']}": one["test"]["confusion"] for one in results},
    }
    tables = {
        "accuracy": _accuracy_table(content),
        "controls": _control_table(content) if controls else None,
        "measures": measures_table(recipes, labels[baseline]),
        "robustness": robustness_table(recipes, baseline),
        "mcnemar": mcnemar_table(recipes, labels[baseline]),
        "costs": _cost_table(content),
    }
    return content | {"tables": {name: table for name, table in tables.items() if table is not None}}


def _pairs(runs: dict[tuple[str, int], Result], name: str, other: str) -> list[tuple[Result, Result]]:
    """The runs of two recipes with the same seed."""
    seeds = [seed for recipe, seed in runs if recipe == name and (other, seed) in runs]
    return [(runs[name, seed], runs[other, seed]) for seed in seeds]


def _difference(pairs: Sequence[tuple[Result, Result]], images: int | None) -> dict[str, Any]:
    difference = compare_runs(pairs, "test_acc", intervals_over_images(pairs, {"correct": 100}).get("correct"))
    return difference | {
        "pairs": [ours["test_acc"] - baseline["test_acc"] for ours, baseline in pairs],
        "images": None if images is None else difference["mean"] / 100 * images,
        "seeds_needed": seeds_needed(EFFECT, difference["sd"]) if difference["sd"] else None,
    }


def _curve(own: Sequence[Result]) -> dict[str, list[float]]:
    values = [{row["epoch"]: 100 * row["val/acc"] for row in one["epochs"] if "val/acc" in row} for one in own]
    epochs = sorted(set.intersection(*map(set, values)))
    summaries = [summarise([one[epoch] for one in values]) for epoch in epochs]
    means, sds = [summary.mean for summary in summaries], [summary.sd or 0.0 for summary in summaries]
    return {"epoch": epochs, "mean": means, "sd": sds}


def _per_class(pairs: Sequence[tuple[Result, Result]]) -> dict[str, dict[str, Any]] | None:
    ours, baseline = ([one["test"] for one in side] for side in zip(*pairs, strict=True))
    if ours[0]["classes"] != baseline[0]["classes"]:
        return None
    rows = {}
    for index, name in enumerate(ours[0]["classes"]):
        # With --unequal, the two sides may not have the same images.
        of_class = [[one["confusion"][index] for one in side] for side in (ours, baseline)]
        if all(sum(row) for side in of_class for row in side):
            difference = compare_pairs(*([100 * row[index] / sum(row) for row in side] for side in of_class))
            rows[name] = {"mean": difference.mean, "interval": difference.interval}
    return rows


def _notes(plan: Plan, missing: Sequence[str], results: Sequence[Result]) -> list[str]:
    notes = [*plan.notes]
    if len(plan.seeds) == 1:
        notes.append("One seed: there are no intervals and no significance tests. Give several with --seeds.")
    if plan.unequal:
        notes.append(f"The recipes do not have the same data and budget: {'; '.join(plan.unequal)}.")
    if missing:
        notes.append(f"Not done, so missing: {', '.join(missing)}. A pair without both runs is left out.")
    same_data = not any(difference.startswith("data.") for difference in plan.unequal)
    if same_data and not are_of_same_images(results):
        notes.append("The runs were not tested on the same images, so their figures cannot be compared.")
    if same_data and len(distinct(results, "trained_images")) > 1:
        notes.append("The runs were not trained on the same images: their folder has changed between them.")
    trained = [{key: one[f"trained_{key}"] for key in UNKNOWN} for one in results]
    unknown = sum("unknown" in one["device"] for one in trained)
    if 0 < unknown < len(trained):
        notes.append(f"Where {unknown} of {len(trained)} runs were trained, in part or all, was not noted.")
    corrupted = [one["test"].get("robustness", {}).get("environment", {}) for one in results]
    sides = {
        "runs were not trained": trained,
        "runs were not tested": results,
        "corrupted images were not tested": corrupted,
    }
    for key in ("device", "versions", "commit", "libraries"):
        found = []
        for what, environments in sides.items():
            labels: dict[str, dict[str, None]] = {}  # value → the recipes that have it, in order
            for run, one in zip(results, environments, strict=True):
                if "unknown" not in (value := one.get(key, "unknown")):
                    labels.setdefault(value, {})[plan.labels[run["recipe"]]] = None
            if len(labels) > 1 and labels not in found:  # mostly, a run is trained and tested in one place
                which = "; ".join(f"{value} ({', '.join(recipes)})" for value, recipes in labels.items())
                notes.append(f"The {what} with the same {key}: {which}.")
            found.append(labels)
    return notes


def _sentence(label: str, baseline: str, difference: dict[str, Any], comparisons: int) -> str:
    begin = f"{label} − {baseline}: {signed(difference['mean'])} percentage points"
    if difference["interval"] is None:
        reason = "one pair has" if difference["n"] == 1 else "equal differences have"
        return f"{begin}, n = {difference['n']}: {reason} no interval, so its significance is unknown"
    begin += f", {100 * LEVEL:.0f} % interval {show_interval(difference['interval'])}, n = {difference['n']}: "
    if difference["significant"]:
        return f"{begin}{label} is {'better' if difference['mean'] > 0 else 'worse'}"
    corrected = f" after correction for {comparisons} comparisons" if difference["p"] < 1 - LEVEL else ""
    return f"{begin}no significant difference{corrected}"


def _findings(
    controls: Sequence[dict[str, Any]], differences: dict[tuple[str, str], dict[str, Any]], labels: dict[str, str]
) -> list[dict[str, Any]]:
    """Each sentence, and whether its difference is significant: first whether attention beats the same cost."""
    findings = []
    for name in dict.fromkeys(control["recipe"] for control in controls):
        own = [control for control in controls if control["recipe"] == name]
        if any(control["difference"] for control in own):
            findings.append(_verdict(labels[name], own, labels))
    return findings + [{key: one[key] for key in ("sentence", "significant")} for one in differences.values()]


def _verdict(label: str, controls: Sequence[dict[str, Any]], labels: dict[str, str]) -> dict[str, Any]:
    """Attention beats its controls where it is better than each; the sentence gives the strongest that decides."""
    done = sorted((one for one in controls if one["difference"]), key=lambda one: one["difference"]["mean"])
    missing = dict.fromkeys(labels[one["name"]] for one in controls if not one["difference"])
    lost = [one for one in done if one["difference"]["significant"] and one["difference"]["mean"] < 0]
    undecided = [one for one in done if not one["difference"]["significant"]]
    strongest = (lost or undecided or done)[0]
    difference = strongest["difference"]
    worse, better = bool(lost), not (lost or undecided or missing)
    if difference["interval"] is None or (missing and not (lost or undecided)):
        begin = f"Whether {label} beats the same cost spent otherwise is unknown"
    elif worse:
        begin = f"The same cost spent otherwise beats {label}"
    else:
        begin = f"{label} {'beats' if better else 'does not significantly beat'} the same cost spent otherwise"
    means = (
        {"width": "wider", "epochs": "trained for longer"}[strongest["means"]] if strongest["change"] else "as it is"
    )
    control = f"{labels[strongest['name']]} (the baseline {means}, same {strongest['cost']})"
    figures = f"{signed(difference['mean'])} percentage points"
    if difference["interval"] is not None:
        figures += f", {100 * LEVEL:.0f} % interval {show_interval(difference['interval'])}"
    count = len({one["name"] for one in done})
    which = f", {'the strongest' if strongest is done[0] else 'one'} of {count} controls" if count > 1 else ""
    if missing:
        which += f"; not done: {', '.join(missing)}"
    sentence = f"{begin}: {figures}, n = {difference['n']}, against {control}{which}"
    return {"sentence": sentence, "significant": better or worse}


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0] if names else "nothing"


def _accuracy_table(content: dict[str, Any]) -> dict[str, Any]:
    images = content["test_images"]  # None where recipes were tested on other numbers of them, with --unequal
    headings = ["recipe", "test accuracy, %", "n", f"− {content['labels'][content['baseline']]}, pp"]
    headings += ["95 % interval over seeds", "over seeds and images", "p (Holm)"]
    headings += [] if images is None else [f"of {images:,} test images"]
    headings += [f"seeds to detect {EFFECT} pp"]
    rows = []
    for recipe in content["recipes"].values():
        test, difference = recipe["test_acc"], recipe["difference"]
        row = [recipe["label"], show_mean(test), str(test["n"])]
        if difference:
            p, needed = difference.get("p_holm"), difference["seeds_needed"]
            row += [signed(difference["mean"]), show_interval(difference["interval"])]
            row += [show_interval(difference["images_interval"]), show_p(p)]
            row += [] if images is None else [signed(difference["images"], 0)]
            row += ["" if needed is None else f"{needed:,}"]
        rows.append(row + [""] * (len(headings) - len(row)))
    meaning = (
        "Test accuracy of the epoch with the highest validation accuracy: mean ± standard deviation over n seeds. "
        "Differences are paired by seed; pp: percentage points. No significant difference does not mean no "
        f"difference: the interval gives the differences that remain possible. Seeds to detect {EFFECT} pp: pairs at "
        f"which a true difference of that size would be significant with a probability of {100 * POWER:.0f} %, before "
        "the correction, if the pairs vary as they did here. p, better and worse: over seeds, on these test images."
        + _threshold(content)
    )
    return {"headings": headings, "rows": rows, "meaning": meaning}


def _threshold(content: dict[str, Any]) -> str:
    """How large a difference must be, which few seeds and many comparisons raise above what one expects."""
    n, comparisons = content["pairs"], content["comparisons"]
    if comparisons < 2:
        return ""
    return (
        f" With n = {n} and {comparisons} comparisons, no p is below {1 - LEVEL:.2f} unless a mean difference is at "
        f"least {least_significant(n, comparisons):.1f} times the standard deviation of its pairs."
    )


def _control_table(content: dict[str, Any]) -> dict[str, Any]:
    labels, baseline = content["labels"], content["labels"][content["baseline"]]
    headings = ["recipe", "its cost", "same", "control", "its cost", "more, %", "recipe − control, pp"]
    headings += ["95 % interval", "p (Holm)"]
    rows = []
    for control in content["controls"]:
        costs = [control["recipe_cost"], control["cost"], labels[control["name"]], control["control_cost"]]
        row = [labels[control["recipe"]], *costs, signed(100 * control["excess"], 1)]
        if difference := control["difference"]:
            row += [signed(difference["mean"]), show_interval(difference["interval"]), show_p(difference.get("p_holm"))]
        rows.append(row + [""] * (len(headings) - len(row)))
    meaning = (
        f"Controls: {baseline} at the cost of a recipe with attention, made wider or trained for longer with its "
        "schedule stretched; its budget differs on purpose. Steps were timed in turns when the controls were chosen. "
        "More: by what share the control costs more than the recipe, in training steps or parameters."
    )
    return {"headings": headings, "rows": rows, "meaning": meaning}


def _cost_table(content: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for recipe in content["recipes"].values():
        values = [((recipe["cost"] or {}).get(key), *column) for key, column in COSTS.items()]
        cells = ["" if value is None else f"{value / divisor:,.{digits}f}" for value, _, divisor, digits in values]
        rows.append([recipe["label"], *cells])
    # Not of the machine that trained; unknown for costs that an earlier version measured.
    costs = [recipe["cost"] for recipe in content["recipes"].values() if recipe["cost"]]
    place = next((f" on {cost['measured_on']}" for cost in costs if "measured_on" in cost), "")
    meaning = (
        "A multiplication and an addition are two FLOP; one forward pass. Latencies: of both mirror images where "
        "test_time_flip takes them. Speeds: medians of interleaved rounds"
        f"{place}. Memory: of a process that trains."
    )
    return {"headings": ["recipe", *(column[0] for column in COSTS.values())], "rows": rows, "meaning": meaning}


def _how_measured(plan: Plan, results: Sequence[Result]) -> str:
    settings = split_settings(plan.given)[0]
    dates = sorted({run["date"] for run in results})
    data, steps = settings.get("data.dataset"), settings.get("trainer.max_steps", -1)
    trained, tested = _places(results, "trained_"), _places(results)
    same = {"trained and tested on": tested}
    known = {
        "data": f"images of {settings.get('data.root')}" if data == "folder" else data,
        "epochs": settings.get("trainer.max_epochs"),
        "steps": f"at most {steps:,}" if steps >= 0 else None,
        "seeds": " ".join(map(str, plan.seeds)),
        **(same if trained == tested else {"trained on": trained, "tested on": tested}),
        "date": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
        "report": f"commit {commit()}, {time.strftime('%Y-%m-%d')}",
    }
    return "; ".join(f"{name}: {value}" for name, value in known.items() if value is not None) + "."


def _places(results: Sequence[Result], prefix: str = "") -> str:
    """Where the runs were trained, or tested; where these are several places, with the number of runs of each."""
    texts: Counter[str] = Counter()
    for run in results:
        device, versions, made_by = (run[prefix + key] for key in ("device", "versions", "commit"))
        texts[device if device == "unknown" else f"{device}, with {versions}, commit {made_by}"] += 1
    if len(texts) == 1:
        return next(iter(texts))
    return "; or ".join(f"{text} ({count} {'run' if count == 1 else 'runs'})" for text, count in texts.items())


def earlier_costs(folder: Path, names: Iterable[str]) -> dict[str, Any] | None:
    """The costs in the report that exists already; None if they are not those of all these recipes."""
    try:
        recipes = json.loads((folder / "report.json").read_text("utf-8"))["recipes"]
        costs = {name: recipes[name]["cost"] for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return costs if all(costs.values()) else None


def write_report(folder: Path, content: dict[str, Any]) -> None:
    """Write report.md, report.csv and report.json."""
    table = StringIO(newline="")
    writer = csv.DictWriter(table, list(content["runs"][0]))
    writer.writeheader()
    for run in content["runs"]:
        # Ten digits: 100 times an accuracy is otherwise 71.41999999999999.
        writer.writerow({name: f"{one:.10g}" if isinstance(one, float) else one for name, one in run.items()})
    texts = {
        "report.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        "report.csv": table.getvalue(),
        "report.md": markdown(content),
    }
    for name, text in texts.items():
        write_text(folder / name, text)


def markdown(content: dict[str, Any]) -> str:
    """The report as Markdown: sentences and tables."""
    parts = [
        f"# {_literal(content['title'])}",
        "\n".join(f"- {_literal(sentence)}" for sentence in content["sentences"]),
        "\n".join(f"> {_literal(note)}" for note in content["notes"]),
        *(part for table in content["tables"].values() for part in (_markdown_table(table), table["meaning"])),
        _literal(content["measured"]),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _literal(text: str) -> str:
    """Text in which Markdown finds no table, link, tag or emphasis; recipes are named as users like."""
    return re.sub(r"[\\`*|\[\]]|<(?! )", r"\\\g<0>", text)


def _markdown_table(table: dict[str, Any]) -> str:
    ruler = ["---", *["---:"] * (len(table["headings"]) - 1)]
    lines = [map(_literal, table["headings"]), ruler, *(map(_literal, row) for row in table["rows"])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_report(content: dict[str, Any]) -> None:
    """Print the tables and sentences."""
    for table in content["tables"].values():
        print_table(table["headings"], table["rows"])
    print("\n".join([*content["notes"], *content["sentences"]]))
