"""The statistics of a comparison against textbook formulas, other libraries, printed tables and planted truth."""

import dataclasses
import gc
import math
import warnings

import numpy as np
import pytest
from planted_truth import SETTINGS, quick_holm, rates
from scipy import stats
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from toolkit.comparison import statistics
from toolkit.comparison.statistics import (
    FEW,
    MOST,
    detectable,
    difference,
    equivalence,
    holm,
    judge,
    measure,
    needed,
    noise_floor,
    words,
)

# Student's sleep data: extra hours with two drugs, the same ten people; t, df, p and interval as R's t.test prints them
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


@pytest.fixture(autouse=True, scope="module")
def quick():
    quick_holm()
    yield
    gc.unfreeze()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_sleep_data_paired():
    found = difference(SLEEP_1, SLEEP_2, paired=True)
    assert found.mean == pytest.approx(-1.58) and found.df == 9 and (found.n_arm, found.n_base) == (10, 10)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)
    assert found.mean / (found.sd / math.sqrt(10)) == pytest.approx(-4.0621, abs=5e-5)
    assert found.correlation == pytest.approx(stats.pearsonr(SLEEP_1, SLEEP_2).statistic)


def test_the_sleep_data_by_welch():
    found = difference(SLEEP_1, SLEEP_2, paired=False)
    assert found.df == pytest.approx(17.776, abs=5e-4) and found.p == pytest.approx(0.07939, abs=5e-6)
    assert (found.low, found.high) == pytest.approx((-3.3654832, 0.2054832), abs=5e-8)
    assert found.correlation is None


@pytest.mark.parametrize("n_arm, n_base", [(3, 3), (3, 7), (10, 4)])
def test_welch_by_the_textbook(rng, n_arm, n_base):
    arm, base = rng.normal(1, 2, n_arm), rng.normal(0, 1, n_base)
    found = difference(arm.tolist(), base.tolist(), paired=False, alpha=0.1)
    a, b = arm.var(ddof=1) / n_arm, base.var(ddof=1) / n_base
    df = (a + b) ** 2 / (a**2 / (n_arm - 1) + b**2 / (n_base - 1))
    half = stats.t.ppf(0.95, df) * math.sqrt(a + b)
    mean = arm.mean() - base.mean()
    assert (found.mean, found.df, found.low, found.high) == pytest.approx((mean, df, mean - half, mean + half))
    pooled = ((n_arm - 1) * arm.var(ddof=1) + (n_base - 1) * base.var(ddof=1)) / (n_arm + n_base - 2)
    assert found.sd == pytest.approx(math.sqrt(pooled))


def test_equivalence_is_statsmodels_two_one_sided_tests(rng):
    for n, effect in ((3, 0.5), (6, 1.0), (20, 2.0)):
        arm, base = rng.normal(0.2, 1, n), rng.normal(0, 1, n)
        assert equivalence(arm, base, True, effect) == pytest.approx(ttost_paired(arm, base, -effect, effect)[0])
        theirs = ttost_ind(arm, base, -effect, effect, usevar="unequal")[0]
        assert equivalence(arm, base, False, effect) == pytest.approx(theirs)


def test_holm_on_a_vector_done_by_hand():
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and never below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([0.3]) == [0.3] and holm([]) == []


@pytest.mark.parametrize("n, size", [(17, 1.0), (26, 0.8), (64, 0.5), (394, 0.2)])
def test_seeds_needed_unpaired_are_those_of_cohens_tables(n, size):
    """Cohen 1988, table 2.4: two-sided 0.05, power 0.8. (For 0.2 it prints 393; the exact number is 394.)"""
    assert needed(sd=1.0, effect=size, paired=False) == n
    assert detectable(1.0, n, False) < size < detectable(1.0, n - 1, False)


@pytest.mark.parametrize("n, size", [(10, 1.0), (15, 0.8), (34, 0.5), (199, 0.2)])
def test_seeds_needed_paired_are_those_of_the_one_sample_t_test(n, size):
    assert needed(sd=1.0, effect=size, paired=True) == n


@pytest.mark.parametrize("alpha", [0.05, 0.005])
def test_detectable_is_statsmodels_power_turned_round(alpha):
    for n in (3, 5, 10, 50):
        size = detectable(2.0, n, True, alpha) / 2.0
        assert TTestPower().power(size, n, alpha / 2, alternative="larger") == pytest.approx(0.8, abs=1e-5)
    # Welch is Student's test in the limit
    assert TTestIndPower().power(detectable(1.0, 200, False, alpha), 200, alpha) == pytest.approx(0.8, abs=1e-4)


def test_detectable_and_needed_agree_and_end():
    for paired in (True, False):
        for n in (3, 5, 8, 40):
            size = detectable(1.0, n, paired)
            assert needed(1.0, size * 1.0001, paired) == n and needed(1.0, size * 0.999, paired) == n + 1
        assert needed(1.0, 1e-6, paired) == MOST + 1 and needed(0.0, 1.0, paired) == needed(1e-9, 1.0, paired) == 2
        assert detectable(0.0, 3, paired) == 0.0


def test_the_noise_floor_is_pooled_over_groups(rng):
    groups = [rng.normal(k, 1, size).tolist() for k, size in enumerate((3, 5, 1))]
    sd, df = noise_floor(groups)
    by_hand = (2 * np.var(groups[0], ddof=1) + 4 * np.var(groups[1], ddof=1)) / 6
    assert (sd, df) == (pytest.approx(math.sqrt(by_hand)), 6)
    assert math.isnan(noise_floor([[1.0], [2.0]])[0])


# ---------------------------------------------------------------------------------------------- from numbers to words


BASE = [3.00, 3.02, 2.99, 3.01, 3.03]


def verdict(values, paired=True, effect=0.02, **more):
    return judge({"arm": values}, BASE, {"arm": paired}, effect, **more)["arm"]


def moved(by, wobble=0.001):
    return [b + by + wobble * k for b, k in zip(BASE, (1, -1, 0, 1, -1), strict=True)]


def test_the_words():
    assert verdict(moved(-0.05))[3].word == "better" and verdict(moved(0.05))[3].word == "worse"
    assert verdict(moved(-0.05), lower_is_better=False)[3].word == "worse"
    assert verdict(moved(0.0))[3].word == "equivalent"
    assert verdict(moved(0.01, wobble=0.05))[3].word == "inconclusive"


def test_a_difference_too_small_to_matter_is_equivalent_and_said_to_be_there():
    found, p, q, said = verdict(moved(0.005))
    assert p < 0.05 and q < 0.05 and found.low > 0
    assert said.word == "equivalent" and "not zero" in said.why and "too small to matter" in said.why
    assert "not zero" not in verdict(moved(0.0))[3].why


def test_equivalent_gives_the_interval_that_is_inside():
    found, _, q, said = verdict(moved(0.0, wobble=0.02))
    assert found.high > 0.02 and q < 0.05 and said.word == "equivalent"
    half = stats.t.ppf(0.95, 4) * found.sd / math.sqrt(5)
    assert f"90 % interval [{-half:+.4g}, {half:+.4g}]" in said.why and half < 0.02


def test_one_seed_is_a_difference_and_never_a_verdict():
    for arm, base, paired in (([2.0], [3.0], True), ([2.0], BASE, False), (BASE, [9.0], False)):
        found, p, q, said = judge({"arm": arm}, base, {"arm": paired}, 0.02)["arm"]
        assert said.word == str(said) == "difference" and "one seed can't give a verdict" in said.why
        assert (found.low, found.high, found.p, found.df, found.sd, p, q) == (None,) * 7
        assert found.mean == pytest.approx(np.mean(arm) - np.mean(base)) and said.needs is None


def test_values_without_spread_are_said_to_be_so():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = verdict(BASE)
        shifted = verdict([b + 0.5 for b in BASE])
        apart = judge({"arm": [2.0] * 3}, [3.0] * 4, {"arm": False}, 0.02)["arm"]
        one_side = judge({"arm": [2.0] * 4}, BASE, {"arm": False}, 0.02)["arm"]
    assert "exactly the baseline's value" in same[3].why and same[0].correlation == pytest.approx(1.0)
    assert "no spread" in shifted[3].why and "no spread" in apart[3].why
    for found, p, q, said in (same, shifted, apart):
        assert said.word == "difference" and found.sd == 0 and (found.p, found.low, p, q) == (None,) * 4
    assert one_side[3].word == "better" and one_side[0].df == pytest.approx(4)


def test_holm_makes_more_arms_stricter():
    alone = verdict(moved(-0.02, wobble=0.012), effect=0.001)
    noise = {f"noise {k}": moved(0.0, wobble=0.05) for k in range(9)}
    arms = {"arm": moved(-0.02, wobble=0.012)} | noise
    among = judge(arms, BASE, dict.fromkeys(arms, True), 0.001)["arm"]
    assert alone[3].word == "better" and among[3].word == "inconclusive"
    assert among[1] == pytest.approx(10 * alone[1]) and "adjusted by Holm's method for 10 arms" in among[3].why
    assert "the interval is not adjusted" in among[3].why and among[0] == alone[0]


def test_inconclusive_says_how_many_seeds_and_from_which_sd():
    found, _, _, said = verdict(moved(0.0, wobble=0.03))
    assert said.needs == needed(found.sd, 0.02, True) > 5 and str(said) == f"inconclusive (needs n = {said.needs})"
    assert f"{said.needs} seeds per arm would detect a true difference of 0.02 with 80 % power" in said.why
    assert "its paired differences" in said.why
    found, _, _, said = verdict(moved(0.0, wobble=0.03), paired=False)
    assert said.needs == needed(noise_floor([BASE, moved(0.0, wobble=0.03)])[0], 0.02, False)
    assert "noise between seeds" in said.why and "unpaired" in said.why
    assert str(verdict(moved(0.0, wobble=0.03), effect=1e-5)[3]) == f"inconclusive (needs n > {MOST})"


def test_few_seeds_pool_their_paired_differences():
    assert FEW > 3
    base, arms = [3.0, 3.1, 3.2], {"a": [3.0, 3.14, 3.17], "b": [3.05, 3.06, 3.21], "copy": [3.0, 3.1, 3.2]}
    said = judge(arms, base, dict.fromkeys(arms, True), 0.02)["a"][3]
    pooled = noise_floor([np.subtract(arms[k], base) for k in ("a", "b")])[0]
    assert said.needs == needed(pooled, 0.02, True, 0.05 / 3) and "pooled over 2 paired arms" in said.why


def test_enough_seeds_and_still_inconclusive_asks_for_those_that_find_half():
    found, p, q, said = verdict(moved(0.0116, wobble=0.0115))
    assert p > 0.05 and q > 0.05 and needed(found.sd, 0.02, True) <= 5
    assert said.needs == max(needed(found.sd, 0.01, True), 6) and "would detect a true difference of 0.01" in said.why


def test_an_arm_that_lost_a_seed_is_paired_over_the_seeds_that_both_have():
    arms = {"whole": moved(-0.05), "short": moved(-0.05)[1:]}
    bases = {"whole": BASE, "short": BASE[1:]}
    said = judge(arms, bases, dict.fromkeys(arms, True), 0.02)
    assert said["short"][0] == difference(arms["short"], BASE[1:], True) and said["short"][0].n_arm == 4


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: difference([1.0, 2.0], [1.0, 2.0, 3.0], True), "paired"),
        (lambda: difference([1.0, math.nan], [1.0, 2.0], True), "finite"),
        (lambda: difference([], [1.0], False), "no values"),
        (lambda: difference([1.0, 2.0], [1.0, 2.5], True, alpha=5), "alpha"),
        (lambda: equivalence([1.0, 2.0], [1.0, 2.5], True, 0.0), "effect"),
        (lambda: judge({"a": [1.0]}, [1.0], {}, 0.1), "paired says nothing about a"),
        (lambda: judge({}, [1.0], {}, 0.1) or needed(-1.0, 0.1, True), "sd"),
        (lambda: needed(1.0, -0.1, True), "effect"),
        (lambda: detectable(1.0, 1, True), "seeds"),
        (lambda: detectable(1.0, 3, True, power=1.0), "power"),
        (lambda: holm([0.5, math.nan]), "between 0 and 1"),
        (lambda: noise_floor([[math.inf]]), "finite"),
    ],
)
def test_what_can_not_be_right_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------ planted truth


@pytest.mark.parametrize("n", [2, 3, 5])
def test_judge_says_word_for_word_what_the_vectorised_form_says(rng, n):
    """100 repetitions of a plan with every kind of arm, by both ways."""
    repetitions, common = 100, rng.normal(size=(100, n))
    base = common + 0.3 * rng.normal(size=(repetitions, n))
    truths = {"null": 0.0, "small": 0.5, "good": -4.0, "bad": 4.0, "welch": -4.0}
    arms = {name: common + truth + 0.3 * rng.normal(size=(repetitions, n)) for name, truth in truths.items()}
    arms |= {"copy": base + 0.0, "one": rng.normal(size=(repetitions, 1)), "more": rng.normal(size=(repetitions, 9))}
    paired = {name: name not in ("welch", "one", "more") for name in arms}
    measured = [measure(values, base, paired[name], 0.05, 2.0) for name, values in arms.items()]
    together, p_holm, p_equivalence = words(measured, 0.05)
    for k in range(repetitions):
        said = judge({name: values[k].tolist() for name, values in arms.items()}, base[k].tolist(), paired, 2.0)
        assert [each[3].word for each in said.values()] == together[k].tolist()
        for j, (found, p, q, _) in enumerate(said.values()):
            fields = [getattr(measured[j], f.name)[k] for f in dataclasses.fields(statistics.Measured)]
            alone = [found.mean, found.low, found.high, found.p, found.df, found.sd, found.correlation]
            assert [math.nan if x is None else x for x in alone] == pytest.approx(fields[:7], nan_ok=True, rel=1e-12)
            if p is not None:
                assert (p, q) == pytest.approx((p_holm[k, j], p_equivalence[k, j]), rel=1e-12)
    assert n == 2 or set(together.ravel()) == {"better", "worse", "equivalent", "inconclusive", "difference"}


def check(n, design, repetitions):
    for rate in rates(n, design, repetitions):
        assert rate.holds, (
            f"n = {n}, {design}: {rate.name} {rate.rate:.4f}, expected {rate.expected} +- {rate.error:.4f}"
        )


@pytest.mark.parametrize("n, design", [setting for setting in SETTINGS if setting[0] == 5])
def test_planted_truth(n, design):
    check(n, design, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("n, design", SETTINGS)
def test_planted_truth_in_full(n, design):
    check(n, design, 20_000)
