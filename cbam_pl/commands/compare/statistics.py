"""What repeated trainings say about a difference, and how surely. Nothing here knows of networks."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval; a difference is shown where its adjusted p is below 1 − LEVEL
POWER = 0.8  # chance of showing a difference that is there, for `seeds_needed`
_RESAMPLES = 10_000


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
        sd: standard deviation of the differences; None for one pair, and so are the four below.
        n: number of pairs.
        interval: Student's interval for the mean.
        bootstrap: percentile bootstrap interval for the mean, over pairs.
        p: of the two-sided paired t-test that the mean is 0.
    """

    mean: float
    sd: float | None
    n: int
    interval: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
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
        ValueError: no pairs, or not equally many values.
    """
    differences = np.subtract(ours, baseline, dtype=np.float64) if len(ours) == len(baseline) else np.array([])
    if not differences.size:
        raise ValueError(f"{len(ours)} and {len(baseline)} values make no pairs")
    summary = summarise(differences.tolist())
    if summary.sd is None:
        return Difference(summary.mean, None, 1, None, None, None)
    if summary.sd <= 1e-12 * max(1.0, abs(summary.mean)):
        # Without any spread there is no t; all pairs say the same.
        same = (summary.mean, summary.mean)
        return Difference(summary.mean, 0.0, summary.n, same, same, 0.0 if summary.mean else 1.0)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(LEVEL)
    resampled = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",  # with this few pairs, BCa's correction is itself uncertain
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(
        summary.mean,
        summary.sd,
        summary.n,
        (float(low), float(high)),
        (float(resampled.low), float(resampled.high)),
        float(test.pvalue),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, so that the chance of any false finding among all stays at the level of each.

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
    """Chance that a two-sided paired t-test with n pairs shows a true mean difference.

    Args:
        effect: the true mean of the differences.
        sd: their standard deviation, above 0.
        n: pairs, at least 2.
    """
    critical = stats.t.ppf((1 + LEVEL) / 2, n - 1)
    shift = abs(effect) / sd * math.sqrt(n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a lower tail too small to be a number
        below = stats.nct.cdf(-critical, n - 1, shift)
    return float(stats.nct.sf(critical, n - 1, shift) + (below if math.isfinite(below) else 0.0))


def seeds_needed(effect: float, sd: float) -> int:
    """The least number of pairs at which `power_of_pairs` reaches POWER.

    Args:
        effect: the true mean difference that is to be shown, other than 0.
        sd: the standard deviation of the differences.

    Raises:
        ValueError: `effect` is 0, which no number shows.
    """
    if effect == 0:
        raise ValueError("effect=0 is shown by no number of seeds")
    if sd == 0:
        return 2
    high = 2
    while power_of_pairs(effect, sd, high) < POWER:
        high *= 2
    low = max(2, high // 2)
    while low < high:  # the power rises with n
        middle = (low + high) // 2
        low, high = (low, middle) if power_of_pairs(effect, sd, middle) >= POWER else (middle + 1, high)
    return low
