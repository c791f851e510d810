"""A report's accuracies on corrupted images: of each recipe, and paired differences, by corruption and their means."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cbam_pl.commands.compare.measures import Result, show_interval, show_mean, signed
from cbam_pl.commands.compare.statistics import compare_pairs, summarise
from cbam_pl.data.corruptions import COMMON, EXTRA, SEVERITIES


def with_robustness(test: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """A run's test.json with its robustness.json, and with the mean over the common corruptions among its measures.

    The mean is a measure where all 15 were tested at all severities, so that it means the same in every report.
    """
    test = test | {"robustness": record}
    accuracy = record.get("accuracy", {})
    if all(len(accuracy.get(name, {})) == len(SEVERITIES) for name in COMMON):
        test["measures"] = test.get("measures", {}) | {"corrupted": record["mean"]["common"]}
    return test


def add_robustness(recipes: dict[str, Any], results: Sequence[Result], baseline: str) -> None:
    """Give each recipe of a report its `robustness`: row → summary over the seeds, and the paired difference.

    Rows are the corruptions that all runs were tested with, each a mean over its severities, and the means of the
    common and of the extra ones. Accuracies are in per cent. Without corruptions that all runs have there is none.
    """
    records = {(one["recipe"], one["seed"]): one["test"].get("robustness", {}) for one in results}
    names = _shared(list(records.values()))
    values = {key: _values(record, names) for key, record in records.items()}
    for name, recipe in recipes.items():
        recipe["robustness"] = {}
        seeds = [seed for own, seed in values if own == name]
        pairs = [seed for seed in seeds if name != baseline and (baseline, seed) in values]
        for row in next(iter(values.values())):
            summary = asdict(summarise([values[name, seed][row] for seed in seeds]))
            difference = None
            if pairs:
                sides = ([values[recipe_name, seed][row] for seed in pairs] for recipe_name in (name, baseline))
                difference = asdict(compare_pairs(*sides))
            recipe["robustness"][row] = summary | {"difference": difference}


def _shared(records: Sequence[dict[str, Any]]) -> list[str]:
    """The corruptions that all records have, at the same severities."""
    measured = [record.get("accuracy", {}) for record in records]
    first = measured[0]
    return [name for name in first if all(name in one and list(one[name]) == list(first[name]) for one in measured)]


def _values(record: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    own = {name: 100 * float(np.mean(list(record["accuracy"][name].values()))) for name in names}
    rows: dict[str, float] = {}
    for kind, members in (("common", COMMON), ("extra", EXTRA)):
        found = {name: value for name, value in own.items() if name in members}
        if found:
            rows |= {f"mean of {len(found)} {kind}": float(np.mean(list(found.values()))), **found}
    return rows


def robustness_table(recipes: dict[str, Any], baseline: str) -> dict[str, Any] | None:
    """A row for each corruption, a column for each recipe; None where the runs were not tested with any.

    A column has differences from the baseline, or the recipe's own accuracy where it has none.
    """
    columns, headings = [], ["corruption"]
    for recipe in recipes.values():
        values = list(recipe["robustness"].values())
        is_paired = any(value["difference"] for value in values)
        columns.append([_show(value["difference"]) if is_paired else show_mean(value) for value in values])
        headings.append(f"{recipe['label']} − {recipes[baseline]['label']}" if is_paired else f"{recipe['label']}, %")
    rows = [list(row) for row in zip(next(iter(recipes.values()))["robustness"], *columns, strict=True)]
    if not rows:
        return None
    meaning = (
        "Test accuracy on corrupted images, mean over the severities, in per cent, with the standard deviation over "
        "seeds; of the others the differences, paired by seed, in percentage points, with their 95 % intervals. The "
        "corruptions are those of CIFAR-10-C, made here (docs/robustness.md); frost is not comparable with the "
        "published one. The intervals are not corrected for their number: one in twenty excludes 0 by chance."
    )
    return {"headings": headings, "rows": rows, "meaning": meaning}


def _show(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    interval = show_interval(difference["interval"])
    return signed(difference["mean"]) + (f" ({interval})" if interval else "")
