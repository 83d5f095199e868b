"""Verdicts where runs diverged: ranks decide, error rates hold, and every output says it."""

import json
import math

import numpy as np
import pytest
from planted_truth import diverged_rates
from scipy import stats
from test_compare import arm, compared, write_plan

from toolkit import compare
from toolkit.comparison.unfinished import ranks_p

EQUAL = [(n, rate, design) for n in (5, 8, 10, 20) for rate in (0.2, 0.3) for design in (0.6, None)]


def plan(folder, runs, lost, shift, seeds=10):
    """A plan with one arm, ``shift`` from the baseline; the first ``lost`` runs of the arm called ``runs`` diverged."""
    broken = {f"{runs}-s{seed}": {"state": "diverged"} for seed in range(lost)}
    return write_plan(folder, {"NoPE": shift}, seeds=range(seeds), broken=broken)


def test_without_diverged_runs_the_test_of_ranks_is_that_of_mann_and_whitney():
    one, two = np.random.default_rng(0).normal(size=(2, 7)) + np.array([[0.0], [1.0]])
    assert ranks_p(one, two) == pytest.approx(stats.mannwhitneyu(one, two, method="exact").pvalue)
    assert ranks_p(two, one) == 1.0  # it does not have the better ranks


def test_diverged_runs_rank_last_and_those_of_the_favoured_arm_behind_the_others():
    """Enumerated by hand: the favoured arm has the ranks 1, 2 and 6 of 6. Of the 20 ways, 1 2 3 to 1 2 6 have a sum of
    at most 9, and so have 1 3 4, 1 3 5 and 2 3 4."""
    p = ranks_p([0.0, 1.0, math.nan], [2.0, 3.0, math.nan])
    assert p == pytest.approx(2 * 7 / 20)
    assert ranks_p([0.0, 1.0, math.nan], [2.0, 3.0, 4.0]) == p


def test_many_runs_are_compared_by_the_normal_approximation():
    values = np.random.default_rng(0).normal(size=(2, 60))
    assert ranks_p(values[0] - 1, values[1]) == pytest.approx(
        stats.mannwhitneyu(values[0] - 1, values[1], method="asymptotic").pvalue, rel=1e-6
    )


@pytest.mark.parametrize("name, shift, word", [("NoPE", -0.3, "better"), ("rope", 0.3, "worse")])
def test_one_diverged_run_of_ten_leaves_a_verdict_that_the_ranks_share(name, shift, word, tmp_path):
    one = arm(compared(plan(tmp_path, name, 1, shift)), "NoPE")
    assert one["verdict"] == word and f"1 of 10 runs of {name} diverged; ranked as the last of all" in one["why"]
    assert one["diverged_p"] == 1.0  # of two in twenty runs, one or none: as likely in either arm


@pytest.mark.parametrize("name, shift, word", [("NoPE", -0.3, "better"), ("rope", 0.3, "worse")])
def test_many_diverged_runs_leave_no_verdict(name, shift, word, tmp_path):
    said = compared(plan(tmp_path, name, 4, shift))
    one = arm(said, "NoPE")
    assert one["verdict"] == "inconclusive" and f"4 of 10 runs of {name} diverged" in one["why"]
    assert f"would be {word}" in one["why"] and "12 % to 74 %" not in one["why"]
    assert one["diverged_p"] == pytest.approx(stats.fisher_exact([[4, 6], [0, 10]])[1])
    assert arm(said, "rope")["diverged_p"] is None


@pytest.mark.parametrize("direction, word", [("higher", "better"), ("lower", "worse")])
def test_the_direction_of_the_metric_counts(direction, word, tmp_path, monkeypatch, capsys):
    """In a table, nan is a diverged run. The arm is higher in nine of ten runs; one run of either is lost."""
    monkeypatch.chdir(tmp_path)
    rows = [
        f"{name},{seed},{value + value * seed / 100}" for name, value in (("base", 1), ("arm", 2)) for seed in range(9)
    ]
    (tmp_path / "t.csv").write_text("\n".join(["arm,seed,points", *rows, "base,9,nan", "arm,9,nan", ""]))
    words = ["--table", "t.csv", "--seed", "seed", "--metric", "points", f"--{direction}-is-better", "--json"]
    assert compare.main(words) == 0
    one = arm(json.loads(capsys.readouterr().out), "arm")
    assert one["verdict"] == word and "ranked as the last of all" in one["why"]


def test_an_arm_that_diverges_is_not_equivalent(tmp_path):
    one = arm(compared(plan(tmp_path, "NoPE", 1, 0.0001)), "NoPE")
    assert one["verdict"] == "inconclusive" and "would be equivalent" in one["why"]


def test_the_ranks_are_judged_at_the_level_of_all_arms(tmp_path):
    """With one of seven runs lost, p = .026: enough for one arm, and not for two."""
    broken = {"NoPE-s0": {"state": "diverged"}}
    for arms, word in (({"NoPE": -0.3}, "better"), ({"NoPE": -0.3, "ALiBi": 0.3}, "inconclusive")):
        folder = write_plan(tmp_path / str(len(arms)), arms, seeds=range(7), broken=broken)
        assert arm(compared(folder), "NoPE")["verdict"] == word


@pytest.mark.slow
@pytest.mark.parametrize("n, rate, design", EQUAL)
def test_an_arm_whose_worst_runs_diverge_is_not_better_too_often(n, rate, design):
    """Of two equal arms, at the nominal rate of 2.5 %; judged on the runs that finished, it is up to 36 %."""
    found = diverged_rates(n, rate, design, 20_000)
    error = math.sqrt(0.025 * 0.975 / 20_000)
    assert found["ranks too"] <= 0.025 + 3 * error
    assert found["on survivors"] > 0.035 and found["ranks too"] >= found["none lost"]


@pytest.mark.slow
def test_an_arm_that_is_better_in_truth_is_found_though_runs_diverge():
    found = diverged_rates(10, 0.2, 0.6, 20_000, -3.0)
    assert found["none lost"] < 0.12 and found["ranks too"] > 0.65
