"""From the values of two arms to a verdict: scipy's t tests, Holm's method from statsmodels, rules for verdicts.

Each value is the metric of one run, one per seed. Every difference is arm minus baseline, in units of the metric.
Values may carry leading axes of independent repetitions, ``(..., seeds)``: ``measure`` and ``words`` compute with
arrays only, and ``judge`` applies both to one repetition, so a simulation tests the formulas that judge runs.

Multiplicity. Two families of tests, each over all arms of the plan, each held at alpha by Holm's step-down method:
"it differs from the baseline" (two-sided t tests) and "it is inside the smallest effect of interest" (two one-sided
t tests; the p of an arm is the larger of its two). So the chance of any false "better" or "worse" in a plan is at most
alpha, and the chance of any false "equivalent" is at most alpha. An arm without a test counts with p = 1.
The interval of a Difference is not adjusted: Holm has no simple intervals. So it may exclude zero even if the adjusted
p does not reject zero.

Both at once. An arm whose difference is significant, and significantly smaller than the smallest effect of interest,
is "equivalent": the plan declared in advance that such a difference does not matter. The sentence reports it."""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats
from statsmodels.stats.multitest import multipletests

from toolkit.comparison.sequential import History

FEW = 5  # with fewer seeds, the sd of one arm is too uncertain for planning
MOST = 1000  # seeds: above this, "needed" only says that it is more
LEAST = 1e-12  # a nominal level below this counts as this
ROUNDING = 1e-12  # values that differ by less than this share of their size count as equal

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Arm minus baseline. ``low`` and ``high`` are the ends of the Student-t interval, ``p`` is two-sided, ``sd`` is
    that of the paired differences, or pooled over both arms if unpaired. A number that can't be computed is None: with
    one seed, all but the mean; without spread, interval, p and df; unpaired or with a constant arm, the correlation.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    df: float | None
    sd: float | None
    n_arm: int
    n_base: int
    paired: bool
    correlation: float | None


@dataclass(frozen=True)
class Verdict:
    """``word`` is "better", "worse", "equivalent" or "inconclusive"; or "difference", which is no verdict: there is
    one seed, or no spread. ``why`` is one sentence with the numbers. ``needs`` is the number of seeds per arm that an
    inconclusive arm needs (a number above MOST means "more than MOST"), else None."""

    word: str
    why: str
    needs: int | None = None

    def __str__(self) -> str:
        return self.word if self.needs is None else f"{self.word} (needs n {_seeds(self.needs)})"


@dataclass(frozen=True)
class Measured:
    """The test results of one arm, as arrays over the repetitions; nan where no test is possible."""

    mean: Array
    low: Array
    high: Array
    p: Array
    df: Array
    sd: Array
    correlation: Array
    p_equivalence: Array  # not adjusted


def difference(arm: Sequence[float], base: Sequence[float], paired: bool, alpha: float = 0.05) -> Difference:
    """Arm minus baseline with its 1 - alpha Student-t interval.

    Paired (values in the same order of seeds): d = arm - base, mean(d) +- t(n - 1) sd(d) / sqrt(n).
    Else Welch: mean(arm) - mean(base) +- t(df) sqrt(s_a^2 / n_a + s_b^2 / n_b), df by Welch and Satterthwaite.
    ValueError: no values, values that aren't finite, unequal numbers when paired, alpha outside (0, 1)."""
    return _difference(arm, base, paired, measure(arm, base, paired, alpha))


def equivalence(arm: Sequence[float], base: Sequence[float], paired: bool, effect: float) -> float | None:
    """The p of the two one-sided t tests (the larger) against "the difference is at or beyond -effect or +effect".
    None with one seed or without spread. ValueError: as in ``difference``, and an effect that isn't above 0."""
    return _number(measure(arm, base, paired, effect=effect).p_equivalence)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p, in the order given: the k-th smallest of m times (m - k + 1), made monotone, at most 1.
    ValueError: a p outside [0, 1]."""
    array = np.asarray(ps, dtype=float)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"p-values lie between 0 and 1, not {array.tolist()}; give an arm without a test p = 1")
    return _holm(array).tolist()


def detectable(sd: float, n: int, paired: bool, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that n seeds per arm detect (two-sided p below alpha, right sign) with this power.
    ``sd`` is that of the paired differences when paired, of one arm otherwise (Welch's test at equal true
    variances, exactly), and the answer has its unit. For a plan of m arms, alpha / m is Holm's strictest step.
    ValueError: fewer than 2 seeds, a negative sd, alpha or power outside (0, 1)."""
    _check(alpha=alpha, power=power, sd=sd)
    if n < 2:
        raise ValueError(f"n = {n} seeds have no spread to test with; 2 are the fewest")
    high = 1.0
    while _power(high, n, paired, alpha) < power:
        high *= 2
    return sd * optimize.brentq(lambda size: _power(size, n, paired, alpha) - power, 0, high, xtol=1e-10)


def needed(sd: float, effect: float, paired: bool, alpha: float = 0.05, power: float = 0.8) -> int:
    """The number of seeds per arm that detects a true difference of ``effect`` with this power, at least 2; MOST + 1
    means that even MOST are too few. ``sd`` as in ``detectable``. ValueError: as in ``detectable``, or an effect that
    isn't above 0."""
    _check(alpha=alpha, power=power, sd=sd, effect=effect)
    if sd == 0:
        return 2
    return 2 + bisect.bisect_left(range(2, MOST + 1), power, key=lambda n: _power(effect / sd, n, paired, alpha))


def noise_floor(groups: Iterable[ArrayLike]) -> tuple[float, int]:
    """The sd over seeds pooled over groups, sqrt(sum (n_i - 1) s_i^2 / sum (n_i - 1)), and its degrees of freedom.
    Groups with one value add nothing; without a degree of freedom the sd is nan. ValueError: values that aren't
    finite."""
    arrays = [_values(group, "a group") for group in groups]
    df = sum(group.size - 1 for group in arrays)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in arrays)
    return (math.sqrt(squares / df) if df else math.nan), df


def judge(
    arms: Mapping[str, Sequence[float]],
    base: Sequence[float] | Mapping[str, Sequence[float]],
    paired: Mapping[str, bool],
    effect: float | None,
    alpha: float = 0.05,
    lower_is_better: bool = True,
    histories: Mapping[str, History] | None = None,
) -> dict[str, tuple[Difference, float | None, float | None, Verdict]]:
    """For each arm its difference, its p adjusted by Holm, the p of its two one-sided tests adjusted by Holm, and the
    verdict. ``base`` is the baseline's values, or for each arm those to compare it with (an arm that lost a seed is
    paired over the seeds that both have). ``effect`` is the smallest effect of interest, in units of the metric;
    without one, no arm is equivalent, and nothing says how many seeds an inconclusive arm needs.

    The sentence of an "equivalent" gives the 1 - 2 alpha interval, which belongs to two one-sided tests at alpha.
    "inconclusive" says how many seeds per arm detect a true difference of ``effect`` with 80 % power at alpha / arms,
    Holm's strictest step. If there are that many already, it says how many detect half of ``effect``: a true difference
    is at least that far from zero or from the effect. The sd is that of the arm's paired differences; with fewer than
    FEW seeds it is pooled over all paired arms, and where unpaired it is the noise floor over all arms.

    ``histories`` has the earlier looks of arms that were judged before on fewer seeds, see ``sequential``: then the p
    of the difference and of equivalence are sequential, and the interval is a repeated one.
    ValueError: as in ``difference`` and ``equivalence``; an arm that ``paired`` does not name."""
    if missing := [name for name in arms if name not in paired]:
        raise ValueError(f"paired says nothing about {', '.join(missing)}: give True or False for each arm")
    bases = {name: base[name] if isinstance(base, Mapping) else base for name in arms}
    measured = measure_all(arms, bases, paired, alpha, effect)
    histories = histories or {}
    for name, earlier in histories.items():
        measured[name] = earlier.charge(measured[name], alpha)
    said, p_holm, p_equivalence = words(measured.values(), alpha, lower_is_better)
    out = {}
    for k, (name, each) in enumerate(measured.items()):
        diff = _difference(arms[name], bases[name], paired[name], each)
        tested = diff.p is not None
        p = float(p_holm[k]) if tested else None
        q = float(p_equivalence[k]) if tested and effect is not None else None
        planning = _sd_to_plan_with(name, diff, arms, bases, measured, paired)
        history = histories.get(name)
        out[name] = diff, p, q, _verdict(str(said[k]), diff, p, q, effect, alpha, len(arms), planning, history)
    return out


def measure_all(
    arms: Mapping[str, Sequence[float]],
    bases: Mapping[str, Sequence[float]],
    paired: Mapping[str, bool],
    alpha: float,
    effect: float | None,
) -> dict[str, Measured]:
    """The tests of all arms at one look."""
    return {name: measure(arms[name], bases[name], paired[name], alpha, effect) for name in arms}


def measure(
    arm: ArrayLike, base: ArrayLike, paired: bool, alpha: float = 0.05, effect: float | None = None
) -> Measured:
    """The tests of one arm on arrays ``(..., seeds)``; the formulas are those of ``difference`` and ``equivalence``."""
    arm, base = _values(arm, "the arm"), _values(base, "the baseline")
    if paired and arm.shape[-1] != base.shape[-1]:
        raise ValueError(
            f"paired values must come from the same seeds, but the arm has {arm.shape[-1]} values and the baseline has "
            f"{base.shape[-1]}: give both only at the seeds that both have, or use paired=False"
        )
    _check(alpha=alpha, effect=1.0 if effect is None else effect)
    mean = (arm - base).mean(-1) if paired else arm.mean(-1) - base.mean(-1)
    nan = np.full_like(mean, np.nan)
    if min(arm.shape[-1], base.shape[-1]) < 2:
        return Measured(mean, nan, nan, nan, nan, nan, nan, nan)
    sd = _spread(arm, base, paired)
    flat = sd <= ROUNDING * np.maximum(np.abs(arm).max(-1), np.abs(base).max(-1))
    test = partial(stats.ttest_rel, axis=-1) if paired else partial(stats.ttest_ind, axis=-1, equal_var=False)
    with warnings.catch_warnings():  # values without spread cause warnings; they are masked below
        warnings.simplefilter("ignore", RuntimeWarning)
        found = test(arm, base)
        interval = found.confidence_interval(1 - alpha)
        p_equivalence = nan
        if effect is not None:
            above = test(arm + effect, base, alternative="greater").pvalue
            below = test(arm - effect, base, alternative="less").pvalue
            p_equivalence = np.maximum(above, below)
        correlation = _correlation(arm, base) if paired else nan
    tested = (interval.low, interval.high, found.pvalue, found.df + np.zeros_like(mean))
    low, high, p, df, p_equivalence = (np.where(flat, np.nan, x) for x in (*tested, p_equivalence))
    return Measured(mean, low, high, p, df, np.where(flat, 0.0, sd), correlation, p_equivalence)


def words(
    measured: Iterable[Measured], alpha: float, lower_is_better: bool = True
) -> tuple[NDArray[np.str_], Array, Array]:
    """The word of each verdict and the two adjusted p, as arrays ``(..., arms)``."""
    measured = list(measured)
    if not measured:
        return np.empty(0, dtype=str), np.empty(0), np.empty(0)
    mean, p, q = (np.stack([getattr(m, key) for m in measured], -1) for key in ("mean", "p", "p_equivalence"))
    untested = np.isnan(p)
    p_holm, p_equivalence = (_holm(np.where(np.isnan(each), 1.0, each)) for each in (p, q))
    good = mean < 0 if lower_is_better else mean > 0
    rules = [
        (untested, "difference"),
        (p_equivalence < alpha, "equivalent"),
        ((p_holm < alpha) & good, "better"),
        ((p_holm < alpha) & ~good, "worse"),
    ]
    return np.select([rule for rule, _ in rules], [word for _, word in rules], "inconclusive"), p_holm, p_equivalence


def _values(values: ArrayLike, whose: str) -> Array:
    array = np.asarray(values, dtype=float)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"{whose} has no values")
    if not np.isfinite(array).all():
        raise ValueError(f"{whose} has values that aren't finite: leave out the values of diverged runs")
    return array


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        if name in ("alpha", "power") and not 0 < value < 1:
            raise ValueError(f"{name} = {value}: it must lie between 0 and 1")
        if name == "sd" and not 0 <= value < math.inf:
            raise ValueError(f"sd = {value}: it must be finite, and not negative")
        if name == "effect" and not 0 < value < math.inf:
            raise ValueError(f"effect = {value}: the smallest effect of interest must be above 0")


def _spread(arm: Array, base: Array, paired: bool) -> Array:
    if paired:
        return (arm - base).std(-1, ddof=1)
    df_arm, df_base = arm.shape[-1] - 1, base.shape[-1] - 1
    return np.sqrt((df_arm * arm.var(-1, ddof=1) + df_base * base.var(-1, ddof=1)) / (df_arm + df_base))


def _correlation(arm: Array, base: Array) -> Array:
    arm, base = (x - x.mean(-1, keepdims=True) for x in (arm, base))
    return np.clip((arm * base).sum(-1) / np.sqrt((arm**2).sum(-1) * (base**2).sum(-1)), -1, 1)


def _holm(ps: Array) -> Array:
    if ps.shape[-1] < 2:  # one arm: nothing to adjust
        return ps
    return np.apply_along_axis(lambda row: multipletests(row, method="holm")[1], -1, ps)


def _power(size: float, n: int, paired: bool, alpha: float) -> float:
    """The probability that a true difference of ``size`` sd is detected with the right sign. Unpaired: Welch's df
    depends on the share x of one arm in the sum of both variances. With equal true variances x is
    Beta((n - 1) / 2, (n - 1) / 2) and independent of t, which is noncentral with 2 n - 2 degrees of freedom. So the
    power is an average over x."""
    if paired:
        return float(stats.nct.sf(stats.t.isf(alpha / 2, n - 1), n - 1, size * math.sqrt(n)))
    x, weight = special.roots_jacobi(40, (n - 3) / 2, (n - 3) / 2)
    share = (1 + x) / 2
    critical = stats.t.isf(alpha / 2, (n - 1) / (share**2 + (1 - share) ** 2))
    return float(weight @ stats.nct.sf(critical, 2 * n - 2, size * math.sqrt(n / 2)) / weight.sum())


def _number(value: Array) -> float | None:
    return float(value) if np.isfinite(value) else None


def _difference(arm: Sequence[float], base: Sequence[float], paired: bool, m: Measured) -> Difference:
    low, high, p, df, sd = (_number(x) for x in (m.low, m.high, m.p, m.df, m.sd))
    return Difference(float(m.mean), low, high, p, df, sd, len(arm), len(base), bool(paired), _number(m.correlation))


def _sd_to_plan_with(
    name: str,
    diff: Difference,
    arms: Mapping[str, Sequence[float]],
    bases: Mapping[str, Sequence[float]],
    measured: Mapping[str, Measured],
    paired: Mapping[str, bool],
) -> tuple[float | None, str]:
    """Choose the sd that determines how many seeds are needed. Returns (sd, its source in words). Arms whose
    differences have no spread are left out: a copy of the baseline says nothing about noise."""
    if not diff.paired:
        sd, _ = noise_floor([*arms.values(), max(bases.values(), key=len)])
        return sd, "noise between seeds, pooled over all arms:"
    pairs = [np.subtract(arms[each], bases[each]) for each in arms if paired[each] and measured[each].sd > 0]
    if diff.n_arm >= FEW or len(pairs) == 1:
        return diff.sd, "sd of its paired differences:"
    return noise_floor(pairs)[0], f"sd of the differences, pooled over {len(pairs)} paired arms:"


def _verdict(
    word: str,
    diff: Difference,
    p: float | None,
    q: float | None,
    effect: float | None,
    alpha: float,
    arms: int,
    planning: tuple[float | None, str],
    history: History | None,
) -> Verdict:
    seeds = f"{diff.n_arm} {'paired' if diff.paired else 'unpaired'} seeds{f', {history.name}' if history else ''}"
    if diff.n_arm != diff.n_base:
        seeds += f" against {diff.n_base} of the baseline"
    over = f"adjusted by Holm's method for {arms} arms; " if arms > 1 else ""
    interval, p_name = f"{100 * (1 - alpha):.4g} %", "p"
    if history:
        interval, p_name = f"repeated {interval}", "sequential p"
    if word == "difference":
        if diff.sd is None:
            return Verdict(word, f"The difference is {diff.mean:+.4g}, but one seed can't give a verdict.")
        if diff.mean == 0 and diff.paired:
            return Verdict(
                word, f"Every seed gives exactly the baseline's value, so there is nothing to test ({seeds})."
            )
        what = "paired differences" if diff.paired else "values"
        why = f"The difference of {diff.mean:+.4g} can't be tested: the {what} have no spread over the seeds ({seeds})."
        return Verdict(word, why)
    sd, source = planning
    assert diff.low is not None and diff.high is not None and diff.df is not None  # an arm with a test has them all
    assert p is not None and sd is not None
    found = f"{diff.mean:+.4g}, {interval} interval [{diff.low:+.4g}, {diff.high:+.4g}]"
    if word in ("better", "worse"):
        side = "lower" if diff.mean < 0 else "higher"
        why = f"Significantly {side} than the baseline: difference {found} ({p_name} = {p:.2g}, {over}{seeds})."
        return Verdict(word, why)
    if effect is None or q is None:
        alone = "; the interval is not adjusted" if diff.low * diff.high > 0 and arms > 1 else ""
        numbers = f"difference {found} (p = {p:.2g}, {over}{seeds}{alone})"
        return Verdict(word, f"The runs do not rule out a true difference of zero: {numbers}.")
    if word == "equivalent":
        # this interval lies inside the effect exactly when both one-sided tests of this arm reject
        levels = [history.looks.levels(alpha, sides)[-1] for sides in (1, 2)] if history else [alpha, alpha]
        half = (diff.high - diff.low) / 2 * stats.t.isf(levels[0], diff.df) / stats.t.isf(levels[1] / 2, diff.df)
        ends = f"[{diff.mean - half:+.4g}, {diff.mean + half:+.4g}]"
        found = f"{diff.mean:+.4g}, {'repeated ' * bool(history)}{100 * (1 - 2 * alpha):.4g} % interval {ends}"
        not_zero = f" It is not zero (p = {p:.2g}), but too small to matter." if p < alpha else ""
        why = (
            f"The difference is significantly inside \u00b1{effect:.4g}, the smallest effect of interest: {found}"
            f" ({p_name} = {q:.2g}, {over}{seeds}).{not_zero}"
        )
        return Verdict(word, why)
    now, target = min(diff.n_arm, diff.n_base), effect
    needs = _still_needed(sd, effect, diff.paired, alpha / arms, history)
    if needs <= now:
        target = effect / 2
        needs = max(_still_needed(sd, target, diff.paired, alpha / arms, history), now + 1)
    alone = "; the interval is not adjusted" if diff.low * diff.high > 0 and arms > 1 else ""
    enough = f"{needs}" if needs <= MOST else f"More than {MOST}"
    half = "" if target == effect else ", half the smallest effect of interest,"
    why = (
        f"The runs rule out neither a true difference of zero (p = {p:.2g}) nor one of \u00b1{effect:.4g} or more"
        f" (p = {q:.2g}): difference {found} ({f'{p_name} ' if over or history else ''}{over}{seeds}{alone})."
        f" {enough} seeds per arm would detect a true difference of {target:.4g}{half} with 80 % power"
        f" ({source} {sd:.4g}).{_left_to_spend(history, alpha) if history else ''}"
    )
    return Verdict(word, why, needs)


def _still_needed(sd: float, effect: float, paired: bool, alpha: float, history: History | None) -> int:
    """As ``needed``; with earlier looks, the seeds of the first later look at which that many are enough for its
    nominal level. Planned looks come first, and then one look at more seeds."""
    if history is None:
        return needed(sd, effect, paired, alpha)
    for count, _ in history.future:
        if needed(sd, effect, paired, max(history.level(count, alpha), LEAST)) <= count:
            return count
    n = max([history.looks.counts[-1], *(count for count, _ in history.future)]) + 1
    while n <= MOST:
        more = needed(sd, effect, paired, max(history.level(n, alpha), LEAST))
        if more <= n:
            return n
        n = more
    return MOST + 1


def _left_to_spend(history: History, alpha: float) -> str:
    """What later looks may spend, in a sentence: the nominal p that decides at the next look."""
    now, spent_all = history.looks.counts[-1], history.looks.fractions[-1] >= 1
    if history.future:
        count, about, next_look = history.future[0][0], "", "at the next look, at {} seeds, "
    else:
        count, about, next_look = 2 * now, "about ", "if seeds are added, "
    decides = f"a plain p below {about}{history.level(count, alpha):.2g} decides (before Holm's adjustment"
    at = "" if history.future else f", at {count} seeds"
    left = "Alpha is spent" if spent_all and not history.future else "Left to spend"
    return f" {left}: {next_look.format(count)}{decides}{at})."


def _seeds(n: int) -> str:
    return f"= {n}" if n <= MOST else f"> {MOST}"
