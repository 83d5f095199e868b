"""Where two arms differ first: the level on simulated arms without a difference, planted changes, and odd values."""

import numpy as np
import pytest
from planted_locations import ALPHA, DESIGNS, FAMILY, LAYERS, NOISES, counts, false_locations, true_locations, two_arms
from scipy import stats

from toolkit.comparison.located import examine, first, origin, weighted_holm

DEPTH = np.tile(np.arange(LAYERS), len(FAMILY) // LAYERS)


def one_arm(rng, n=5, shift=0.0, step=1, cell=2):
    """Two arms of one repetition, (steps, cells, n), the first of which differs from ``step`` on in ``cell``."""
    arm, base = (x[0] for x in two_arms(rng, NOISES[0], 1, n, True))
    arm[step:, cell] += shift
    return arm, base


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.__name__)
@pytest.mark.parametrize("n, paired", DESIGNS)
def test_arms_without_a_difference_are_told_apart_at_most_at_alpha(n, paired, noise):
    assert false_locations(noise, n, paired, 400).holds


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.__name__)
@pytest.mark.parametrize("n, paired", DESIGNS)
def test_the_level_in_full(n, paired, noise):
    rate = false_locations(noise, n, paired, 20_000)
    assert rate.holds, f"{rate.rate:.4f}, at most {ALPHA} +- {rate.error:.4f}"


@pytest.mark.parametrize("n, paired", DESIGNS)
def test_a_large_change_is_located_at_its_step_and_cell(n, paired):
    some, right = true_locations(n, paired, 30, 100)
    assert some > 0.97 and right > 0.93


def test_a_change_of_four_sd_needs_five_seeds():
    assert true_locations(5, True, 4, 100)[1] > 0.9 > true_locations(3, True, 4, 100)[1]


def test_a_change_that_fades_is_found():
    rng = np.random.default_rng(0)
    arm, base = one_arm(rng)
    arm[1, 2] += 12.0
    cells = examine(arm, base, FAMILY, True)
    assert first(cells, DEPTH, ALPHA)[0] == (1, 2)


def test_p_of_a_cell_is_scipys():
    rng = np.random.default_rng(0)
    arm, base = one_arm(rng, shift=1.0)
    scale = 1e-3 * np.median(np.concatenate([arm[:, :LAYERS], base[:, :LAYERS]], -1))  # of the first statistic
    y_arm, y_base = np.arcsinh(arm[2, 2] / scale), np.arcsinh(base[2, 2] / scale)
    assert examine(arm, base, FAMILY, True).p[2, 2] == pytest.approx(stats.ttest_rel(y_arm, y_base).pvalue)
    welch = stats.ttest_ind(y_arm, y_base, equal_var=False).pvalue
    assert examine(arm, base, FAMILY, False).p[2, 2] == pytest.approx(welch)


def test_weighted_holm_by_hand():
    # p / share is .02 .0125 .2 .8; of the remaining shares 1, .6, .5 (after .4, .1), .2
    adjusted = weighted_holm([0.002, 0.005, 0.06, 0.16], [0.1, 0.4, 0.3, 0.2])
    assert adjusted == pytest.approx([0.0125, 0.0125, 0.1, 0.16])
    assert weighted_holm([0.01, 0.04, 0.03, 0.005], [0.25] * 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm's own
    assert weighted_holm([0.01, 0.5], [0.0, 1.0]) == pytest.approx([1.0, 0.5])


def test_weighted_holm_is_the_closed_test_of_weighted_bonferroni():
    rng = np.random.default_rng(1)
    for _ in range(50):
        p, shares = rng.uniform(size=5) ** 2, rng.dirichlet(np.ones(5))
        closed = np.zeros(5)
        for mask in range(1, 32):
            members = [i for i in range(5) if mask >> i & 1]
            adjusted = min(p[i] * shares[members].sum() / shares[i] for i in members)
            closed[members] = np.maximum(closed[members], adjusted)
        assert weighted_holm(p, shares) == pytest.approx(np.minimum(closed, 1.0))


def test_units_and_order_of_cells_do_not_matter():
    rng = np.random.default_rng(2)
    arm, base = one_arm(rng, shift=3.0)
    once = examine(arm, base, FAMILY, True)
    factor = np.where(FAMILY == 0, 1e6, 1e-6)[:, None]
    order = rng.permutation(len(FAMILY))
    again = examine((arm * factor)[:, order], (base * factor)[:, order], FAMILY[order], True)
    assert again.p_adjusted == pytest.approx(once.p_adjusted[:, order]) and again.size == pytest.approx(
        once.size[:, order]
    )
    assert examine(base, arm, FAMILY, True).size == pytest.approx(-once.size)


def test_an_exact_change_of_every_seed_is_one_and_rounding_is_none():
    rng = np.random.default_rng(3)
    base = one_arm(rng)[1]
    for factor, found in ((1 + 1e-7, False), (1 + 1e-4, False), (10.0, True), (0.0, True)):
        arm = base.copy()
        arm[1:, 2] *= factor
        cells = examine(arm, base, FAMILY, True)
        assert bool(first(cells, DEPTH, ALPHA)) == found or factor == 1 + 1e-4
        assert cells.equal[0].all() and cells.equal[1, 2] == (factor == 1 + 1e-7)


def test_counts_that_are_one_off_in_every_seed_are_no_proof():
    base = counts(np.random.default_rng(4), (2, 6, 5))[None]
    base[..., 0, :] = 0.0
    arm = base.copy()
    arm[..., 0, :] = 1 / 64
    assert np.nanmin(examine(arm, base, np.zeros(6, int), True).p_adjusted) > 0.05
    assert np.nanmin(examine(arm + 1.0, base + 1.0, np.zeros(6, int), True).p_adjusted) > 0.05
    arm[..., 0, :] = 20 / 64
    assert np.nanmin(examine(arm, base, np.zeros(6, int), True).p_adjusted) < 0.001


@pytest.mark.parametrize("paired", [True, False])
def test_missing_values_lost_seeds_and_constants_do_no_harm(paired):
    rng = np.random.default_rng(5)
    arm, base = one_arm(rng, shift=20.0)
    arm[3, :, 0], base[2:, :, 1] = np.nan, np.inf  # a run that stopped, one that diverged
    arm[:, 7], base[:, 7] = 0.0, 0.0
    arm[:, 8] = np.nan
    base[:, 9], arm[:, 9] = 1.0, 3.0
    cells = examine(arm, base, FAMILY, paired)
    assert first(cells, DEPTH, ALPHA)[0] == (0, 9)  # constant, but another constant
    assert np.isnan(cells.p[:, [7, 8]]).all() and cells.equal[:, 7].all() and not cells.equal[:, 8].any()
    arm[:, 9] = 1.0
    assert first(examine(arm, base, FAMILY, paired), DEPTH, ALPHA)[0] == (1, 2)
    alone = examine(arm[..., :1], base[..., :1], FAMILY, paired)
    assert np.isnan(alone.p).all() and first(alone, DEPTH, ALPHA) == []


def test_of_the_largest_differences_the_first_module_is_the_location():
    rng = np.random.default_rng(6)
    arm, base = one_arm(rng)
    arm[1:, 1], arm[1:, 3], arm[1:, 4] = base[1:, 1] + 1.0, base[1:, 3] + 8.0, base[1:, 4] + 14.0
    answer = [cell for _, cell in first(examine(arm, base, FAMILY, True), DEPTH, ALPHA)]
    assert answer[:2] == [3, 4]


def test_the_origin_is_where_bits_first_differ_whatever_the_sign():
    rng = np.random.default_rng(7)
    base = one_arm(rng)[1]
    arm = base * (1 + 0.01 * rng.choice([-1, 1], size=base.shape))
    arm[0] = base[0]
    arm[0, 3:6] = base[0, 3:6] * (1 + 0.001 * rng.normal(size=(3, 5)))  # a forward statistic: equal up to layer 2
    arm[0, 6:12] *= 1.01  # a statistic of gradients: differs everywhere
    assert origin(arm, base, FAMILY, FAMILY, DEPTH) == (0, 3)
    assert first(examine(arm, base, FAMILY, True), DEPTH, ALPHA)[:1] != [(0, 3)]  # a test of means does not see it
    arm[0, 2] = base[0, 2] * (1 + 1e-9)  # rounding before it: the place can't be told
    assert origin(arm, base, FAMILY, FAMILY, DEPTH) is None
    assert origin(base, base, FAMILY, FAMILY, DEPTH) is None
    assert origin(np.full_like(base, np.nan), base, FAMILY, FAMILY, DEPTH) is None


def test_the_origin_is_before_a_statistic_that_happens_to_be_equal_for_longer():
    """Both statistics are of one probe. One of them sees a change at once, the other one only two modules later."""
    rng = np.random.default_rng(9)
    base = one_arm(rng)[1]
    arm = base.copy()
    arm[0, 2:6], arm[0, 6:12] = base[0, 2:6] * 1.01, base[0, 6:12] * 1.01
    depth = np.asarray(DEPTH)
    one_probe = np.zeros_like(np.asarray(FAMILY))
    assert origin(arm, base, FAMILY, FAMILY, DEPTH) == (0, 2)
    step, cell = origin(arm, base, FAMILY, one_probe, DEPTH)
    assert step == 0 and depth[cell] == depth[6:12].min() < depth[2]


def test_thousands_of_cells_take_no_time():
    rng = np.random.default_rng(8)
    shape, families = (100, 600, 5), np.repeat(np.arange(20), 30)
    cells = examine(rng.normal(5, 1, shape), rng.normal(5, 1, shape), families, True)
    assert cells.p.shape == shape[:2] and first(cells, np.arange(600), ALPHA) == []


def test_a_statistic_that_misses_the_change_does_not_place_it_later():
    """The largest output of the first two modules is equal, but their rms already differs in the second."""
    families, probes, depth = [0, 0, 0, 1, 1, 1], [0] * 6, [0, 1, 2] * 2
    base = np.ones((1, 6, 3))
    arm = base.copy()
    arm[0, [1, 2, 5]] += 0.5  # rms from the module 1 on, the largest from the module 2 on
    assert origin(arm, base, families, probes, depth) == (0, 1)
    arm[0, 0] += 0.5  # rms differs from the first module on, and the other statistic shows that it is a forward pass
    assert origin(arm, base, families, probes, depth) == (0, 0)
    assert origin(arm, base, families, [0, 0, 0, 1, 1, 1], depth) == (0, 5)
