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
    """Paired differences, in the unit of the measurements; without interval and p where they have no spread."""

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
    # Of one pair, or of equal differences, which are chance: accuracies are multiples of one image.
    if summary.sd is None or summary.sd <= 1e-12 * max(1.0, abs(summary.mean)):
        return Difference(summary.mean, summary.sd and 0.0, summary.n)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(LEVEL)
    return Difference(summary.mean, summary.sd, summary.n, (float(low), float(high)), float(test.pvalue))


def interval_over_images(differences: np.ndarray) -> tuple[float, float]:
    """The interval of a mean difference over other seeds and other images than those that were measured.

    A nested bootstrap draws seeds and images with replacement: the same images for all seeds, as all were measured on
    the same. Its deviation has a part of the seeds, one of the images, and a rest, the noise of single predictions. The
    variances of the first two contain that noise already, each once (Owen, "The pigeonhole bootstrap", Annals of
    Applied Statistics 2007, arXiv:0712.1111), so the variance of the mean is s² = seeds + max(0, images − rest).
    Nothing needs to be drawn: of infinitely many resamples, images − rest is the mean covariance of two seeds' means
    over images. The interval is mean ± t · s, since percentiles of three seeds say little, with (n − 1) (s² / seeds)²
    degrees of freedom (Satterthwaite 1946), at most N − 1. It is never narrower than the interval over seeds alone.

    Shape:
        differences (n, N), of n ≥ 2 seeds and N images, paired.
    """
    n, num_images = differences.shape
    means = differences.mean(1, dtype=np.float64)
    centred = differences - means[:, None]
    covariances = centred @ centred.T / num_images**2  # (n, n)
    of_seeds = means.var(ddof=1) / n
    of_images = (covariances.sum() - covariances.trace()) / (n * (n - 1))
    variance = of_seeds + max(0.0, of_images)
    freedom = min((n - 1) * (variance / max(of_seeds, 1e-30)) ** 2, num_images - 1)
    quantiles = stats.t.ppf((1 + LEVEL) / 2, [max(freedom, 1), n - 1])
    half = (quantiles * np.sqrt([variance, of_seeds])).max()
    return float(means.mean() - half), float(means.mean() + half)


@dataclass(frozen=True)
class McNemar:
    """How two networks classify the same images."""

    both: int  # images that both classify correctly
    ours: int  # that ours alone does
    baseline: int
    neither: int
    p: float  # of the exact two-sided test that `ours` and `baseline` are equally likely


def mcnemar(ours: np.ndarray, baseline: np.ndarray) -> McNemar:
    """Counts and test of two networks from whether each classifies an image correctly, (N,) bool each.

    Source: McNemar 1947; exact, by the binomial distribution of the images on which they differ.
    """
    only = int((ours & ~baseline).sum()), int((baseline & ~ours).sum())
    p = float(stats.binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0
    return McNemar(int((ours & baseline).sum()), *only, int((~ours & ~baseline).sum()), p)


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


def least_significant(n: int, comparisons: int) -> float:
    """The mean of n ≥ 2 pairs, in their standard deviations, from which Holm may call one of so many significant."""
    return float(stats.t.isf((1 - LEVEL) / (2 * comparisons), n - 1) / n**0.5)


def power_of_pairs(effect: float, sd: float, n: int) -> float:
    """Probability that a two-sided paired t-test of n ≥ 2 pairs detects a true mean difference; sd is above 0."""
    # t² has the F distribution with 1 and n − 1 degrees of freedom, shifted by n · (effect / sd)².
    critical = stats.f.ppf(LEVEL, 1, n - 1)
    return float(stats.ncf.sf(critical, 1, n - 1, n * (effect / sd) ** 2))


def seeds_needed(effect: float, sd: float) -> int:
    """The least number of pairs at which `power_of_pairs` reaches POWER, for an effect other than 0."""
    candidates = range(2, 1_000_000_000)
    return candidates[bisect_left(candidates, POWER, key=lambda n: power_of_pairs(effect, sd, n))]
