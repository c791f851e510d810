import math
import statistics

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from cbam_pl.commands.compare.statistics import compare_pairs, holm, power_of_pairs, seeds_needed, summarise

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


def test_one_pair_has_no_interval_and_equal_ones_have_no_width():
    one = compare_pairs([0.5], [0.4])
    assert one.mean == pytest.approx(0.1)
    assert (one.sd, one.interval, one.p) == (None, None, None)
    none = compare_pairs([0.5, 0.6], [0.5, 0.6])
    assert (none.mean, none.interval, none.p) == (0, (0, 0), 1)
    same = compare_pairs([0.75, 0.5], [0.5, 0.25])
    assert (same.mean, same.interval, same.p) == (0.25, (0.25, 0.25), 0)


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


@pytest.mark.parametrize(("effect", "sd", "n"), [(0.2, 0.3, 5), (0.2, 0.3, 20), (-1.0, 0.5, 3), (0.1, 1.0, 2)])
def test_the_power_is_statsmodels(effect, sd, n):
    expected = TTestPower().power(abs(effect) / sd, n, 0.05)
    assert power_of_pairs(effect, sd, n) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("effect", "sd"), [(0.2, 0.3), (0.2, 0.05), (0.2, 1.0), (-0.5, 0.4), (3.0, 0.1)])
def test_the_seeds_needed_are_the_first_with_enough_power(effect, sd):
    n = seeds_needed(effect, sd)
    assert TTestPower().power(abs(effect) / sd, n, 0.05) >= 0.8 - 1e-9
    assert n == 2 or TTestPower().power(abs(effect) / sd, n - 1, 0.05) < 0.8


def test_without_spread_two_seeds_are_enough():
    assert seeds_needed(0.2, 0.0) == 2
