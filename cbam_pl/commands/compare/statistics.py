"""Statistics of repeated trainings: paired differences with intervals and p values, for any quantity."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval; a difference is significant where its adjusted p is below 1 − LEVEL
POWER = 0.8  # probability of detecting a true difference, for `seeds_needed`


@dataclass(frozen=True)
class Summary:
    """Repeated measurements of one quantity."""

    mean: float
    sd: float | None  # of single measurements, with n − 1 in the denominator; None for one measurement
    n: int


@dataclass(frozen=True)
class Difference(Summary):
    """Paired differences, in the unit of the measurements; without sd, interval and p where there is one pair."""

    interval: tuple[float, float] | None = None  # Student's, for the mean
    p: float | None = None  # of the two-sided paired t-test that the mean is 0


def summarise(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and number of one or more values."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), sd, len(values))


def compare_pairs(ours: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The differences ours − baseline, of n ≥ 1 values each in the same order of pairs."""
    differences = [one - other for one, other in zip(ours, baseline, strict=True)]
    summary = summarise(differences)
    if summary.sd is None:
        return Difference(summary.mean, None, 1)
    if summary.sd <= 1e-12 * max(1.0, abs(summary.mean)):
        # Without any spread t is not defined.
        return Difference(summary.mean, 0.0, summary.n, (summary.mean,) * 2, 0.0 if summary.mean else 1.0)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(LEVEL)
    return Difference(summary.mean, summary.sd, summary.n, (float(low), float(high)), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, so that the probability of any false positive among all stays at the level of each.

    Source: Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def power_of_pairs(effect: float, sd: float, n: int) -> float:
    """Probability that a two-sided paired t-test of n ≥ 2 pairs detects a true mean difference; sd is above 0."""
    # t² has the F distribution with 1 and n − 1 degrees of freedom, shifted by n · (effect / sd)².
    critical = stats.f.ppf(LEVEL, 1, n - 1)
    return float(stats.ncf.sf(critical, 1, n - 1, n * (effect / sd) ** 2))


def seeds_needed(effect: float, sd: float) -> int:
    """The least number of pairs at which `power_of_pairs` reaches POWER, for an effect other than 0."""
    if sd == 0:
        return 2
    candidates = range(2, 1_000_000_000)
    return candidates[bisect_left(candidates, POWER, key=lambda n: power_of_pairs(effect, sd, n))]
