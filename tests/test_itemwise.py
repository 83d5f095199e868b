"""Intervals by item and the resolution of metrics: the formulas, and planted truth."""

import math

import numpy as np
import pandas as pd
import pytest
from planted_truth import ITEM_SETTINGS, SEPARATIONS, item_rates, planted_raw, separation_rates
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from toolkit.comparison import statistics
from toolkit.comparison.itemwise import itemwise, mean_squares
from toolkit.comparison.resolution import resolve, separation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def planted(rng, seeds=4, items=30, of_seeds=1.0, of_items=1.0, rest=1.0):
    """(arm, baseline), each (seeds, items)."""
    base = rng.normal(size=(seeds, items))
    effects = of_seeds * rng.normal(size=(seeds, 1)) + of_items * rng.normal(size=(1, items))
    return base + effects + rest * rng.normal(size=(seeds, items)), base


def test_mean_squares_are_those_of_statsmodels(rng):
    arm, base = planted(rng)
    seed, item = np.indices(arm.shape)
    data = {"d": (arm - base).ravel() + 1000, "seed": seed.ravel(), "item": item.ravel()}
    theirs = anova_lm(ols("d ~ C(seed) + C(item)", pd.DataFrame(data)).fit())["mean_sq"]
    ours = mean_squares(arm - base + 1000)
    assert (ours.seeds, ours.items, ours.rest) == pytest.approx(tuple(theirs), rel=1e-6)


def test_these_items_are_the_paired_t_test_over_the_seeds_means(rng):
    arm, base = planted(rng)
    found = itemwise(arm, base, alpha=0.1)
    by_seed = statistics.difference(arm.mean(1).tolist(), base.mean(1).tolist(), paired=True, alpha=0.1)
    assert (found.mean, found.low, found.high) == pytest.approx((by_seed.mean, by_seed.low, by_seed.high))


def test_items_like_these_by_hand(rng):
    """Two seeds and three items."""
    d = np.array([[1.0, 2.0, 6.0], [3.0, 2.0, 5.0]])  # seeds' means 3 and 10/3
    found = itemwise(d, np.zeros_like(d))
    mean, of_seeds, of_items = d.mean(), d.mean(1), d.mean(0)
    ms_seeds = 3 * ((of_seeds - mean) ** 2).sum()
    ms_items = 2 * ((of_items - mean) ** 2).sum() / 2
    ms_rest = ((d - of_seeds[:, None] - of_items + mean) ** 2).sum() / 2
    assert ms_items > ms_rest > ms_seeds
    t_seeds, t_items = stats.t.ppf(0.975, 1), stats.t.ppf(0.975, 2)
    half = math.sqrt((t_seeds**2 * ms_seeds + t_items**2 * (ms_items - ms_rest)) / 6)
    assert (found.low_like, found.high_like) == pytest.approx((mean - half, mean + half))
    parts = np.array([0, ms_items - ms_rest, ms_rest]) / 6  # the part of the seeds is estimated below 0
    shares = (found.share_seeds, found.share_items, found.share_rest)
    assert shares == pytest.approx(tuple(parts / parts.sum()))


@pytest.mark.parametrize("of_seeds, of_items, rest", [(1, 0, 0.1), (0.01, 5, 0.1), (0.01, 0, 3)])
def test_shares_find_the_part_that_is_large(rng, of_seeds, of_items, rest):
    arm, base = planted(rng, 10, 100, of_seeds, of_items, rest)
    found = itemwise(arm, base)
    shares = [found.share_seeds, found.share_items, found.share_rest]
    assert sum(shares) == pytest.approx(1) and np.argmax(shares) == np.argmax([of_seeds, of_items / 3, rest / 30])


def test_repetitions_are_computed_one_by_one(rng):
    arm, base = np.stack([planted(rng) for _ in range(6)], axis=1).reshape(2, 2, 3, 4, 30)
    together = itemwise(arm, base)
    for place in np.ndindex(2, 3):
        alone = itemwise(arm[place], base[place])
        for name in ("mean", "low", "high", "low_like", "high_like", "share_seeds", "share_items", "share_rest"):
            assert getattr(alone, name) == pytest.approx(getattr(together, name)[place])


def test_items_like_these_are_never_narrower(rng):
    arm, base = np.stack([planted(rng, 3, 5, of_items=0.1) for _ in range(200)], axis=1)
    found = itemwise(arm, base)
    assert (found.low_like <= found.low + 1e-9).all() and (found.high_like >= found.high - 1e-9).all()
    assert (found.high_like > found.high + 1e-9).any()


def test_where_there_is_no_interval(rng):
    arm, base = planted(rng)
    one_seed, one_item, equal = itemwise(arm[:1], base[:1]), itemwise(arm[:, :1], base[:, :1]), itemwise(base + 1, base)
    assert np.isnan([one_seed.low, one_seed.low_like, one_item.low_like, equal.low, equal.low_like]).all()
    assert np.isfinite(one_item.low) and equal.mean == pytest.approx(1) and np.isnan(equal.share_seeds)
    for wrong in (base[:2], base[:, :5]):
        with pytest.raises(ValueError, match="same seeds and items"):
            itemwise(arm, wrong)
    with pytest.raises(ValueError, match="finite"):
        itemwise(np.where(arm > 1, np.nan, arm), base)


# ------------------------------------------------------------------------------------------------------- resolution


def test_two_arms_are_apart_by_their_t_test(rng):
    values = rng.normal(size=(2, 6))
    assert separation(values, True).p == pytest.approx(stats.ttest_rel(*values).pvalue)
    assert separation(values, False).p == pytest.approx(stats.ttest_ind(*values, equal_var=False).pvalue)
    assert separation(values, True).sd == pytest.approx(np.std(values[0] - values[1], ddof=1))
    with pytest.raises(ValueError, match="two or more arms"):
        separation(values[:1], True)


def test_three_arms_are_apart_by_holms_method(rng):
    values = rng.normal(size=(3, 6))
    ps = [stats.ttest_rel(values[i], values[j]).pvalue for i, j in ((0, 1), (0, 2), (1, 2))]
    assert separation(values, True).p == pytest.approx(min(statistics.holm(ps)))


def arms_of(values):
    return {f"arm-{k}": dict(enumerate(row)) for k, row in enumerate(values)}


def test_the_resolution_of_a_metric(rng):
    values = rng.normal(size=(3, 5)) + 10 * np.arange(3)[:, None]
    found = resolve("m", arms_of(values), True, 0.05)
    assert (found.arms, found.seeds, found.tells_apart, found.between) == (3, 5, True, ("arm-2", "arm-0"))
    assert found.largest == pytest.approx(values[2].mean() - values[0].mean())
    assert found.noise == pytest.approx(math.sqrt(values.var(1, ddof=1).mean()))
    pairs = [np.var(values[i] - values[j], ddof=1) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.detectable == pytest.approx(statistics.detectable(math.sqrt(np.mean(pairs)), 5, True, 0.025))
    unpaired = resolve("m", arms_of(values), False, 0.05)
    assert unpaired.detectable == pytest.approx(statistics.detectable(found.noise, 5, False, 0.025))
    assert resolve("m", arms_of(rng.normal(size=(3, 5))), True, 0.05).tells_apart is False


def test_a_resolution_without_a_test(rng):
    values = rng.normal(size=(2, 3))
    one_seed, one_arm = resolve("m", arms_of(values[:, :1]), True, 0.05), resolve("m", arms_of(values[:1]), True, 0.05)
    assert one_seed.tells_apart is one_arm.tells_apart is None and one_seed.largest > 0 and one_arm.noise > 0
    equal = resolve("m", arms_of(np.ones((3, 4))), True, 0.05)
    assert equal.tells_apart is False and equal.p is None and equal.between is None and equal.detectable is None
    shifted = resolve("m", arms_of(np.arange(4) + np.array([[0.0], [1.0]])), True, 0.05)
    assert shifted.tells_apart is None and shifted.largest == 1
    assert resolve("m", {"a": {}, "b": {}}, True, 0.05).arms == 0
    apart = {"a": {0: 1.0, 1: 2.0}, "b": {5: 1.0, 6: 2.5}, "lost": {}}
    no_common_seed = resolve("m", apart, True, 0.05)
    assert no_common_seed.seeds == 0 and no_common_seed.tells_apart is None and no_common_seed.arms == 2
    assert resolve("m", apart, False, 0.05).tells_apart is False


# ------------------------------------------------------------------------------------------------------ planted truth


def check(found):
    off = [f"{rate.name} {rate.rate:.4f} in {rate.repetitions}" for rate in found if not rate.holds]
    assert not off, off


USED = ("these items", "items like these", "false")


@pytest.mark.parametrize("setting", [each for each in ITEM_SETTINGS if each[1] == 5 and each[2] in (10, 50)], ids=str)
def test_planted_items(setting):
    found = item_rates(*setting, repetitions=1000)
    check([found[name] for name in USED])


@pytest.mark.parametrize("kind", ["normal", "0/1"])
def test_the_interval_over_seeds_does_not_cover_other_items(kind):
    """Where items vary ten times as much as seeds, the interval for these items is not one for other items."""
    found = item_rates(kind, 10, 50, 10.0, 1000)
    assert found["by seeds alone"].rate > {"normal": 0.15, "0/1": 0.07}[kind] and found["items like these"].holds


def test_drawing_mean_squares_is_drawing_values():
    """The quick draws of the simulation and draws of every value have the same rates."""

    def raw(rng, repetitions, kind, seeds, items, ratio, shift):
        return planted_raw(rng, repetitions, seeds, items, ratio, 1.0, shift)

    for ratio in (0.0, 10.0):
        quick = item_rates("normal", 5, 10, ratio, 4000)
        slow = item_rates("normal", 5, 10, ratio, 4000, raw)
        check([slow[name] for name in USED])
        for name in quick:
            error = math.sqrt(2 * max(quick[name].rate, 0.01) / 4000)
            assert abs(quick[name].rate - slow[name].rate) < 4 * error, name


@pytest.mark.parametrize("setting", [each for each in SEPARATIONS if each[0] == 5], ids=str)
def test_planted_separations(setting):
    check(separation_rates(*setting, repetitions=1000))


@pytest.mark.slow
@pytest.mark.parametrize("setting", [each for each in ITEM_SETTINGS if each[0] != "0/1" or each[2] < 2000], ids=str)
def test_planted_items_in_full(setting):
    found = item_rates(*setting, repetitions=20_000)
    check([found[name] for name in USED])


@pytest.mark.slow
@pytest.mark.parametrize("setting", SEPARATIONS, ids=str)
def test_planted_separations_in_full(setting):
    check(separation_rates(*setting, repetitions=20_000))
