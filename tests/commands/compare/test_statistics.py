import math
import statistics

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from benchmarks.simulation import PREFERENCES, false_findings, found_by_adding, simulate
from cbam_pl.commands.compare.statistics import (
    compare_pairs,
    holm,
    interval_over_images,
    least_significant,
    mcnemar,
    power_of_pairs,
    seeds_needed,
    summarise,
)

OURS = [0.8213, 0.8190, 0.8257, 0.8174, 0.8239]
BASELINE = [0.8171, 0.8199, 0.8215, 0.8160, 0.8201]


def test_a_summary_by_the_plain_formulas():
    summary = summarise(OURS)
    mean = sum(OURS) / 5
    assert summary.mean == pytest.approx(mean)
    assert summary.sd == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in OURS) / 4))
    assert summary.n == 5
    assert summarise([0.5]).sd is None


def test_the_interval_is_statsmodels_and_by_hand():
    difference = compare_pairs(OURS, BASELINE)
    pairs = [a - b for a, b in zip(OURS, BASELINE, strict=True)]
    mean, sd = statistics.mean(pairs), statistics.stdev(pairs)
    half = 2.7764451051977987 * sd / math.sqrt(5)  # Student's quantile for 4 degrees of freedom, from a table
    assert difference.interval == pytest.approx((mean - half, mean + half))
    assert difference.interval == pytest.approx(DescrStatsW(pairs).tconfint_mean(0.05))
    assert difference.p == pytest.approx(stats.ttest_rel(OURS, BASELINE).pvalue)
    assert (difference.mean, difference.sd, difference.n) == (pytest.approx(mean), pytest.approx(sd), 5)


def test_one_pair_and_equal_differences_have_no_interval():
    one = compare_pairs([0.5], [0.4])
    assert one.mean == pytest.approx(0.1)
    assert (one.sd, one.interval, one.p) == (None, None, None)
    for ours, baseline, mean in (([0.5, 0.6], [0.5, 0.6], 0), ([81.3, 79.9], [81.2, 79.8], 0.1)):
        same = compare_pairs(ours, baseline)
        assert (same.mean, same.sd, same.interval, same.p) == (pytest.approx(mean), 0, None, None)


@pytest.mark.parametrize("p_values", [[0.04], [0.01, 0.04, 0.03], [0.5, 0.001, 0.9, 0.02], [0.02, 0.02], [0.9, 0.8]])
def test_holm_is_statsmodels(p_values):
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


def test_the_level_holds_where_there_is_no_difference():
    generator = np.random.default_rng(1)
    shown = 0
    for _ in range(300):
        ours, baseline = generator.normal(size=(2, 4))
        low, high = compare_pairs(ours, baseline).interval
        shown += not low <= 0 <= high
    assert 0.02 < shown / 300 < 0.09  # one in twenty, ± 2.5 standard errors


@pytest.mark.parametrize(("n", "comparisons"), [(2, 3), (3, 73), (5, 14)])
def test_only_a_difference_of_the_least_size_is_significant_among_many(n, comparisons):
    pairs = np.linspace(-1, 1, n)
    for factor, significant in ((0.999, False), (1.001, True)):
        mean = factor * least_significant(n, comparisons) * pairs.std(ddof=1)
        p = compare_pairs(mean + pairs, [0] * n).p
        assert (holm([p, *[0.9] * (comparisons - 1)])[0] < 0.05) == significant


@pytest.mark.parametrize(("effect", "sd", "n"), [(0.2, 0.3, 5), (0.2, 0.3, 20), (-1.0, 0.5, 3), (0.1, 1.0, 2)])
def test_the_power_is_statsmodels(effect, sd, n):
    expected = TTestPower().power(abs(effect) / sd, n, 0.05)
    assert power_of_pairs(effect, sd, n) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("effect", "sd"), [(0.2, 0.3), (0.2, 0.05), (0.2, 1.0), (-0.5, 0.4), (3.0, 0.1)])
def test_the_seeds_needed_are_the_first_with_enough_power(effect, sd):
    n = seeds_needed(effect, sd)
    assert TTestPower().power(abs(effect) / sd, n, 0.05) >= 0.8 - 1e-9
    assert n == 2 or TTestPower().power(abs(effect) / sd, n - 1, 0.05) < 0.8


def interval_by_loops(differences, resamples, seed):
    """The nested bootstrap with its three resampled means, one image at a time."""
    n, num_images = len(differences), len(differences[0])
    draw = np.random.default_rng(seed)
    parts = []
    for _ in range(resamples):
        seeds, images = draw.integers(n, size=n).tolist(), draw.integers(num_images, size=num_images).tolist()
        of_both = sum(differences[s][i] for s in seeds for i in images) / n / num_images
        of_seeds = sum(sum(differences[s]) for s in seeds) / n / num_images
        of_images = sum(differences[s][i] for s in range(n) for i in images) / n / num_images
        parts.append((of_seeds, of_images, of_both - of_seeds - of_images))
    of_seeds, of_images, rest = (statistics.pvariance(part) for part in zip(*parts, strict=True))
    of_seeds, rest = of_seeds * n / (n - 1), rest * n / (n - 1)
    variance = of_seeds + max(0, of_images - rest)
    freedom = min((n - 1) * (variance / of_seeds) ** 2, num_images - 1)
    half = max(stats.t.ppf(0.975, df) * math.sqrt(v) for df, v in ((freedom, variance), (n - 1, of_seeds)))
    mean = statistics.mean(map(statistics.mean, differences))
    return mean - half, mean + half


@pytest.mark.parametrize("preference", [0.0, 3.0])
def test_the_interval_over_images_by_plain_loops(preference):
    generator = np.random.default_rng(3)
    differences = 0.3 + generator.normal(size=(4, 40)) + 0.2 * generator.normal(size=(4, 1))
    differences += preference * generator.normal(size=40)
    found = interval_over_images(differences)
    expected = interval_by_loops(differences.tolist(), 4000, 1)
    width = expected[1] - expected[0]
    assert found == pytest.approx(expected, abs=0.05 * width)  # which has the noise of 4,000 resamples
    over_seeds = compare_pairs(differences.mean(1), [0] * 4).interval
    assert found[0] <= over_seeds[0] + 1e-9
    assert found[1] >= over_seeds[1] - 1e-9


def test_equal_predictions_have_an_interval_without_width():
    assert interval_over_images(np.zeros((3, 10))) == (0, 0)


def test_mcnemar_is_statsmodels():
    generator = np.random.default_rng(0)
    ours, baseline = generator.random((2, 200)) < [[0.8], [0.65]]
    found = mcnemar(ours, baseline)
    table = [[int((a & b).sum()) for b in (baseline, ~baseline)] for a in (ours, ~ours)]
    assert [[found.both, found.ours], [found.baseline, found.neither]] == table
    assert found.p == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue)
    assert mcnemar(ours, ours).p == 1


@pytest.mark.slow
def test_false_findings_over_seeds_and_images_are_one_in_twenty():
    found = {
        (name, seeds): false_findings(simulate(400, seeds, 2000, preference, np.random.default_rng(0)))
        for name, preference in PREFERENCES.items()
        for seeds in (3, 5)
    }
    for shares in found.values():
        assert 2 < shares["over seeds and images"] < 8.5  # ± three standard errors
    # Where each recipe has images of its own, seeds alone are not enough.
    assert found["each recipe has images of its own", 5]["paired t over seeds"] > 8.5


def test_adding_seeds_until_a_difference_is_significant_finds_more_than_one_in_twenty():
    share = found_by_adding(3, 5, 500, np.random.default_rng(0))
    found = 0
    for differences in np.random.default_rng(0).standard_normal((500, 5)).tolist():
        found += any(compare_pairs(differences[:n], [0.0] * n).p < 0.05 for n in (3, 4, 5))
    assert share == pytest.approx(100 * found / 500)
    assert share > 7.5
