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
    """Repeated measurements of one quantity.

    Args:
        mean: arithmetic mean.
        sd: standard deviation of single measurements (n − 1 in the denominator); None for one measurement.
        n: number of measurements.
    """

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Paired differences, in the unit of the measurements.

    Args:
        mean: mean of the differences.
        sd: standard deviation of the differences; None for one pair, and so are interval and p.
        n: number of pairs.
        interval: Student's interval for the mean.
        p: of the two-sided paired t-test that the mean is 0.
    """

    mean: float
    sd: float | None
    n: int
    interval: tuple[float, float] | None
    p: float | None


def summarise(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and number of one or more values."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), sd, len(values))


def compare_pairs(ours: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The differences ours − baseline, pair by pair.

    Args:
        ours: (n,) one value a pair.
        baseline: (n,) the values to compare with, in the same order of pairs.

    Raises:
        ValueError: no pairs, or different numbers of values.
    """
    differences = np.subtract(ours, baseline, dtype=np.float64) if len(ours) == len(baseline) else np.array([])
    if not differences.size:
        raise ValueError(f"{len(ours)} and {len(baseline)} values do not make pairs")
    summary = summarise(differences.tolist())
    if summary.sd is None:
        return Difference(summary.mean, None, 1, None, None)
    if summary.sd <= 1e-12 * max(1.0, abs(summary.mean)):
        # Without any spread t is not defined.
        return Difference(summary.mean, 0.0, summary.n, (summary.mean,) * 2, 0.0 if summary.mean else 1.0)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(LEVEL)
    return Difference(summary.mean, summary.sd, summary.n, (float(low), float(high)), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, so that the probability of any false positive among all stays at the level of each.

    Source: Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.

    Args:
        p_values: one for each comparison.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def power_of_pairs(effect: float, sd: float, n: int) -> float:
    """Probability that a two-sided paired t-test with n pairs detects a true mean difference.

    Args:
        effect: the true mean of the differences.
        sd: their standard deviation, above 0.
        n: pairs, at least 2.
    """
    # t² has the F distribution with 1 and n − 1 degrees of freedom, shifted by n · (effect / sd)².
    critical = stats.f.ppf(LEVEL, 1, n - 1)
    return float(stats.ncf.sf(critical, 1, n - 1, n * (effect / sd) ** 2))


def seeds_needed(effect: float, sd: float) -> int:
    """The least number of pairs at which `power_of_pairs` reaches POWER.

    Args:
        effect: the true mean difference to detect, other than 0.
        sd: the standard deviation of the differences.

    Raises:
        ValueError: `effect` is 0, which no number of pairs detects.
    """
    if effect == 0:
        raise ValueError("effect=0 is detected by no number of seeds")
    if sd == 0:
        return 2
    candidates = range(2, 1_000_000_000)
    return candidates[bisect_left(candidates, POWER, key=lambda n: power_of_pairs(effect, sd, n))]
