"""Planted truth: runs are drawn from a known truth, thousands of times, and the rates of true and false words counted.

``python -m tests.planted_truth`` prints the tables for 20,000 repetitions each (some minutes); ``--repetitions N`` for
others. The verdicts are those of toolkit/comparison/statistics.py, which ``judge`` gives for one repetition. Intervals
by item are those of itemwise.py, the test over all arms is that of resolution.py, looks are those of sequential.py.
``--looks`` and ``--diverged`` print only one table."""

import argparse
import dataclasses
import gc
import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from toolkit.comparison.itemwise import MeanSquares, intervals, mean_squares
from toolkit.comparison.resolution import separation
from toolkit.comparison.sequential import SPENDINGS, History, Looks
from toolkit.comparison.statistics import detectable, judge, measure, words
from toolkit.comparison.unfinished import ranks_p

SETTINGS = [(n, design) for n in (3, 5, 10) for design in (0.0, 0.8, None)]  # seeds; paired correlation, None unpaired
ARMS = 10
TINY, HUGE = 1e-9, 1e3  # an effect that nothing is inside of, and one whose far side is never in doubt


@dataclass(frozen=True)
class Rate:
    """How often something happened, and the rate that theory gives: exactly, or as one not to exceed."""

    name: str
    rate: float
    expected: float
    repetitions: int
    bound: bool = False

    @property
    def error(self):
        """The standard error of the rate if the expected one is true."""
        return math.sqrt(self.expected * (1 - self.expected) / self.repetitions)

    @property
    def holds(self):
        off = (self.rate - self.expected) / self.error
        return off <= 3 if self.bound else abs(off) <= 3


def draw(rng, repetitions, n, design, truths):
    """Baseline and arms of unit variance, ``(repetitions, n)`` each, correlated by seed where the design is paired."""
    share = design or 0.0
    common = rng.normal(size=(repetitions, n))
    base, *arms = (
        math.sqrt(share) * common + math.sqrt(1 - share) * rng.normal(size=(repetitions, n)) for _ in (0.0, *truths)
    )
    return base, [arm + truth for arm, truth in zip(arms, truths, strict=True)]


def said(base, arms, design, effect):
    """The words, ``(repetitions, arms)``, at alpha 0.05."""
    paired = design is not None
    return words([measure(arm, base, paired, 0.05, effect) for arm in arms], 0.05)[0]


def rates(n, design, repetitions) -> list[Rate]:
    """Coverage, family-wise false verdicts and power of one setting."""
    rng = np.random.default_rng([n, SETTINGS.index((n, design))])
    paired = design is not None
    sd = math.sqrt(2 * (1 - design)) if paired else 1.0  # of the paired differences, or of one arm
    out = []

    base, (arm,) = draw(rng, repetitions, n, design, [0.7])
    found = measure(arm, base, paired)
    covered = ((found.low <= 0.7) & (0.7 <= found.high)).mean()
    out.append(Rate("coverage", covered, 0.95 if paired else welch_coverage(n), repetitions))

    base, arms = draw(rng, repetitions, n, design, [0.0] * ARMS)
    spoken = np.isin(said(base, arms, design, TINY), ["better", "worse"]).any(-1).mean()
    out.append(Rate("false better or worse, 10 arms", spoken, 0.05, repetitions, bound=True))

    for count in (1, ARMS):
        truths = [HUGE * (-1) ** k for k in range(count)]
        base, arms = draw(rng, repetitions, n, design, truths)
        spoken = (said(base, arms, design, HUGE) == "equivalent").any(-1).mean()
        out.append(Rate(f"false equivalent, {count} arm{'s' * (count > 1)}", spoken, 0.05, repetitions, bound=True))

    base, arms = draw(rng, repetitions, n, design, [-detectable(sd, n, paired)])
    out.append(Rate("power", (said(base, arms, design, TINY) == "better").mean(), 0.8, repetitions))
    return out


def welch_coverage(n, alpha=0.05, points=20_000):
    """Coverage of Welch's interval at equal variances, which is not 1 - alpha with few seeds: the average over the
    quantiles of the share of one arm in the sum of the variances (Beta), by the midpoint rule."""
    share = stats.beta.ppf((np.arange(points) + 0.5) / points, (n - 1) / 2, (n - 1) / 2)
    critical = stats.t.isf(alpha / 2, (n - 1) / (share**2 + (1 - share) ** 2))
    return 1 - 2 * stats.t.sf(critical, 2 * n - 2).mean()


# ---- values by item

KINDS = {"normal": 0, "noisy": 3, "0/1": 2}  # little or much rest; right or wrong: the number of the random stream
ITEM_SETTINGS = [
    (kind, seeds, items, ratio)
    for kind in KINDS
    for seeds in (3, 5, 10)
    for items in (10, 50, 200, 2000)
    for ratio in (0.0, 0.1, 1.0, 10.0)  # variance of items, in variances of seeds
]
SHIFT = 0.4  # the planted difference
SEED_VARIANCE = 0.05  # of the latent differences of 0/1 items, whose rest has the variance 2
CHUNK = 2**22  # values of one arm that are in memory at a time


@dataclass(frozen=True)
class Planted:
    """Intervals of repetitions, and the truths that they should cover."""

    interval: object  # Itemwise
    satterthwaite: tuple  # (low, high), by the usual rule
    these: np.ndarray | float  # the mean difference of the items that were drawn
    like: float  # the mean difference of all items


def satterthwaite(seeds, squares, alpha=0.05):
    """The usual interval for items like these: one variance, where a part below 0 counts as 0, and one t."""
    n_seeds, n_items = squares.n_seeds, squares.n_items
    variance = squares.seeds + np.maximum(squares.items - squares.rest, 0)
    parts = squares.seeds**2 / (n_seeds - 1)
    more = squares.items**2 / (n_items - 1) + squares.rest**2 / ((n_seeds - 1) * (n_items - 1))
    with np.errstate(invalid="ignore"):  # no variance at all
        df = variance**2 / np.where(squares.items > squares.rest, parts + more, parts)
    half = stats.t.isf(alpha / 2, df) * np.sqrt(variance / (n_seeds * n_items))
    return seeds.mean - half, seeds.mean + half


def planted_normal(rng, repetitions, seeds, items, ratio, rest, shift) -> Planted:
    """Differences d_si = shift + a_s + b_i + e_si with seeds of variance 1: the means of the seeds and the mean squares
    of items and rest are drawn, whose distributions are known."""
    of_items = rng.normal(scale=math.sqrt(ratio / items), size=(repetitions, 1))  # the items' mean
    means = shift + of_items + rng.normal(scale=math.sqrt(1 + rest / items), size=(repetitions, seeds))
    by_seeds = measure(means, np.zeros_like(means), True)
    df = (items - 1, (seeds - 1) * (items - 1))
    of = [
        scale * rng.chisquare(each, repetitions) / each
        for scale, each in zip((rest + seeds * ratio, rest), df, strict=True)
    ]
    squares = MeanSquares(items * means.var(-1, ddof=1), *of, seeds, items)
    return Planted(intervals(by_seeds, squares, 0.05), satterthwaite(by_seeds, squares), shift + of_items[:, 0], shift)


def planted_raw(rng, repetitions, seeds, items, ratio, rest, shift) -> Planted:
    """The same, but every value of both arms is drawn."""
    base = rng.normal(scale=2, size=(repetitions, seeds, items))
    of_items = rng.normal(scale=math.sqrt(ratio), size=(repetitions, 1, items))
    arm = base + shift + of_items + rng.normal(size=(repetitions, seeds, 1))
    arm += rng.normal(scale=math.sqrt(rest), size=base.shape)
    return planted_of(arm, base, shift + of_items.mean((-2, -1)), shift)


def planted_binary(rng, repetitions, seeds, items, ratio, shift) -> Planted:
    """Items that each arm gets right or wrong: right where difficulty + item + seed + rest is above 0, all normal. The
    difficulty of an item is common to both arms."""
    difficulty, drawn, truths = rng.normal(size=(repetitions, 1, items)), [], []
    for moved in (shift, 0.0):
        level = moved + difficulty + rng.normal(scale=math.sqrt(ratio * SEED_VARIANCE / 2), size=difficulty.shape)
        noise = rng.normal(scale=math.sqrt(SEED_VARIANCE / 2), size=(repetitions, seeds, 1))
        rest = rng.standard_normal((repetitions, seeds, items), dtype=np.float32)
        drawn.append((rest > -(level + noise)).astype(np.float64))
        truths.append(special.ndtr(level / math.sqrt(1 + SEED_VARIANCE / 2)).mean((-2, -1)))
    spread = math.sqrt(2 + (1 + ratio) * SEED_VARIANCE / 2)
    return planted_of(*drawn, truths[0] - truths[1], special.ndtr(shift / spread) - 0.5)


def planted_of(arm, base, these, like) -> Planted:
    """What ``itemwise`` does, with the mean squares kept."""
    by_seeds, squares = measure(arm.mean(-1), base.mean(-1), True), mean_squares(arm - base)
    return Planted(intervals(by_seeds, squares, 0.05), satterthwaite(by_seeds, squares), these, like)


def draw_items(rng, repetitions, kind, seeds, items, ratio, shift) -> Planted:
    if kind == "0/1":
        return planted_binary(rng, repetitions, seeds, items, ratio, shift)
    return planted_normal(rng, repetitions, seeds, items, ratio, 1.0 if kind == "normal" else float(items), shift)


def item_rates(kind, seeds, items, ratio, repetitions, draw=draw_items) -> dict[str, Rate]:
    """How often intervals miss the truth, and how often a difference of zero is called a difference of other items
    too. Repetitions without an interval, whose seeds all have one mean, are left out."""
    rng = np.random.default_rng([KINDS[kind], seeds, items, int(10 * ratio)])
    most = max(1, CHUNK // (seeds * items)) if kind == "0/1" else repetitions
    counts = dict.fromkeys(("these items", "items like these", "by seeds alone", "Satterthwaite", "false"), 0)
    tested = 0
    for start in range(0, repetitions, most):
        chunk = min(most, repetitions - start)
        shifted, null = (draw(rng, chunk, kind, seeds, items, ratio, shift) for shift in (SHIFT, 0.0))
        found = shifted.interval
        tested += np.isfinite(found.low).sum()
        counts["these items"] += missed(found.low, found.high, shifted.these)
        counts["items like these"] += missed(found.low_like, found.high_like, shifted.like)
        counts["by seeds alone"] += missed(found.low, found.high, shifted.like)
        counts["Satterthwaite"] += missed(*shifted.satterthwaite, shifted.like)
        counts["false"] += missed(null.interval.low_like, null.interval.high_like, 0.0)
    return {name: Rate(name, count / tested, 0.05, int(tested), bound=True) for name, count in counts.items()}


def missed(low, high, truth) -> int:
    """How many intervals do not cover the truth. Comparisons with nan are false."""
    return int(((low > truth) | (high < truth)).sum())


def item_table(repetitions, kind):
    """Lines: a heading, and one for each setting, with the coverage of both intervals, how often a difference of zero
    is called one, and the coverage for items like these of two intervals that are not used for them."""
    heads = ("these items", "items like these", "false", "by seeds alone", "Satterthwaite")
    yield f"{kind:7}{'seeds':>6}{'items':>6}{'ratio':>6}  {'  '.join(heads)}"
    for setting in ITEM_SETTINGS:
        if setting[0] == kind:
            found = item_rates(*setting, repetitions)
            cells = []
            for head in heads:
                rate = found[head].rate if head == "false" else 1 - found[head].rate
                star = " *" if head in heads[:3] and not found[head].holds else ""
                cells.append(f"{rate:.4f}{star}".rjust(len(head)))
            yield f"{'':7}{setting[1]:>6}{setting[2]:>6}{setting[3]:>6}  {'  '.join(cells)}"


# ---- all arms at once

SEPARATIONS = [(seeds, arms, noisy) for seeds in (3, 5, 10) for arms in (2, 3, 10) for noisy in (1.0, 10.0)]


def separation_rates(seeds, arms, noisy, repetitions) -> list[Rate]:
    """How often equal arms are told apart, where one arm has ``noisy`` times the noise of the others."""
    rng = np.random.default_rng([seeds, arms, int(noisy)])
    scale = np.array([noisy] + [1.0] * (arms - 1))[:, None]
    most, count = max(1, CHUNK // (arms * seeds)), 0
    for start in range(0, repetitions, most):
        chunk = min(most, repetitions - start)
        values = scale * rng.normal(size=(chunk, arms, seeds)) + 2 * rng.normal(size=(chunk, 1, seeds))
        count += int((separation(values, paired=True).p < 0.05).sum())
    return [Rate("false separation", count / repetitions, 0.05, repetitions, bound=True)]


def separation_table(repetitions) -> str:
    lines = [f"{'seeds':>5}{'arms':>6}{'noise of one arm':>18}  equal arms told apart"]
    for seeds, arms, noisy in SEPARATIONS:
        (rate,) = separation_rates(seeds, arms, noisy, repetitions)
        lines.append(f"{seeds:>5}{arms:>6}{noisy:>18}  {rate.rate:.4f}{'' if rate.holds else ' *'}")
    return "\n".join(lines)


# ---- looking again

LOOKS = (3, 5, 7, 10)
DESIGNS = {"paired": 0.6, "unpaired": None}


def diverged_rates(n, rate, design, repetitions, shift=0.0) -> dict[str, float]:
    """How often an arm whose worst runs diverge, a share ``rate`` of all, is better than the baseline: judged on the
    runs that finished; if a diverged run makes it inconclusive; and if ``ranks_p`` must agree. ``shift`` is the true
    difference of those runs."""
    rng = np.random.default_rng([n, round(100 * rate), round(10 * (design or 0)), round(10 * abs(shift))])
    base, (arm,) = draw(rng, repetitions, n, design, (0.0,))
    lost = arm > stats.norm.isf(rate)
    lost[lost.all(-1), 0] = False  # an arm without any value is not judged
    arm = np.where(lost, np.nan, arm + shift)
    first = np.argsort(lost, axis=-1, kind="stable")  # the runs that finished
    values, pairs = np.take_along_axis(arm, first, -1), np.take_along_axis(base, first, -1)
    better = np.zeros(repetitions, dtype=bool)
    for count in range(2, n + 1):
        rows = (~lost).sum(-1) == count
        if rows.any():
            others = base[rows] if design is None else pairs[rows, :count]
            better[rows] = said(others, [values[rows, :count]], design, TINY)[:, 0] == "better"
    whole = ~lost.any(-1)
    return {
        "on survivors": float(better.mean()),
        "none lost": float((better & whole).mean()),
        "ranks too": float((better & (whole | (ranks_p(arm, base) < 0.05))).mean()),
    }


def diverged_table(repetitions) -> str:
    """A line for each setting: how often an arm that is equal in truth, or 3 sd better, is called better."""
    lines = [f"{'seeds':>5}  {'lost':>4}  {'design':8}  {'truth':>5}  on survivors  none lost  ranks too"]
    for n, rate, design, shift in itertools.product((5, 8, 10, 20), (0.2, 0.3), (0.6, None), (0.0, -3.0)):
        on_survivors, none_lost, ranks = diverged_rates(n, rate, design, repetitions, shift).values()
        name = "unpaired" if design is None else "paired"
        lines.append(
            f"{n:>5}  {rate:>4.0%}  {name:8}  {shift:>5.1f}  {on_survivors:>12.4f}  {none_lost:>9.4f}  {ranks:>9.4f}"
        )
    return "\n".join(lines)


def measured_at(base, arms, n, paired, effect=TINY):
    return [measure(arm[..., :n], base[..., :n], paired, 0.05, effect) for arm in arms]


def unplanned_rate(arms, last, repetitions) -> float:
    """How often some null arm is called better or worse if one seed is added at a time from 3 on, until an arm is, and
    nobody charges the looks."""
    base, null = draw(np.random.default_rng([arms, last]), repetitions, last, 0.6, [0.0] * arms)
    wrong = np.zeros(repetitions, dtype=bool)
    for n in range(3, last + 1):
        todo = np.flatnonzero(~wrong)
        at_look = measured_at(base[todo], [arm[todo] for arm in null], n, True)
        wrong[todo] = np.isin(words(at_look, 0.05)[0], ["better", "worse"]).any(-1)
    return float(wrong.mean())


def charged(base, arms, looks, paired=True, effect=TINY):
    """For each look, the results of each arm with sequential p and repeated intervals: [look][arm]."""
    earlier = [([], []) for _ in arms]
    for k, n in enumerate(looks.counts):
        so_far = Looks(looks.counts[: k + 1], looks.fractions[: k + 1], looks.spending)
        at_look = []
        for m, (ps, qs) in zip(measured_at(base, arms, n, paired, effect), earlier, strict=True):
            at_look.append(charge_all(m, so_far, ps, qs))
            ps.append(m.p)
            qs.append(m.p_equivalence)
        yield at_look


def charge_all(m, looks, ps, qs):
    """What ``History.charge`` does, where each repetition has earlier p of its own."""
    charged = History(looks, (1.0,) * len(ps), (1.0,) * len(qs)).charge(m, 0.05)
    p, q = looks.p(np.stack([*ps, m.p], -1)), looks.p(np.stack([*qs, m.p_equivalence], -1), sides=1)
    return dataclasses.replace(charged, p=p, p_equivalence=q)


def look_rates(looks, arms, repetitions, design="paired") -> list[Rate]:
    """Error rates of a plan with looks: an arm stops when it has a verdict; the baseline and the others go on."""
    correlation = DESIGNS[design]
    paired = correlation is not None
    rng = np.random.default_rng([arms, looks.counts[-1], len(looks.counts), SPENDINGS.index(looks.spending)])

    def stopped(truths, effect, false_words):
        """How often some arm stops with a false word, and how often the first arm's interval covers at its stop."""
        base, drawn = draw(rng, repetitions, looks.counts[-1], correlation, truths)
        wrong, open_arm, covered = (np.full(repetitions, value) for value in (False, True, True))
        for at_look in charged(base, drawn, looks, paired, effect):
            said = words(at_look, 0.05)[0]
            wrong |= np.isin(said, false_words).any(-1)
            first = at_look[0]
            covered = np.where(open_arm, (first.low <= truths[0]) & (truths[0] <= first.high), covered)
            open_arm &= said[:, 0] == "inconclusive"
        return float(wrong.mean()), float(1 - covered.mean())

    false, _ = stopped([0.0] * arms, TINY, ["better", "worse"])
    equivalent, _ = stopped([HUGE * (-1) ** k for k in range(arms)], HUGE, ["equivalent"])
    _, missed_null = stopped([0.0], TINY, [])
    _, missed_shift = stopped([1.0], TINY, [])
    named = {
        "false better or worse": false,
        "false equivalent": equivalent,
        "missed at the stop, no difference": missed_null,
        "missed at the stop, 1 sd": missed_shift,
    }
    return [Rate(name, rate, 0.05, repetitions, bound=True) for name, rate in named.items()]


def expected_seeds(looks, shift, repetitions) -> tuple[float, float]:
    """(mean seeds at the stop, power) of one paired arm at a true difference of ``shift`` sd of the differences."""
    rng = np.random.default_rng(len(looks.counts))
    base = np.zeros((repetitions, looks.counts[-1]))
    arm = shift + rng.normal(size=base.shape)
    seeds, crossed = np.full(repetitions, looks.counts[-1]), np.zeros(repetitions, dtype=bool)
    for n, (m,) in zip(looks.counts, charged(base, [arm], looks), strict=True):
        seeds = np.where(~crossed & (m.p < 0.05), n, seeds)
        crossed |= m.p < 0.05
    return float(seeds.mean()), float(crossed.mean())


def added_later(counts) -> Looks:
    """Looks of a plan whose first look was at all its seeds, and whose seeds were added later."""
    return Looks(tuple(counts), tuple(n / counts[0] for n in counts))


def advice_rate(first, repetitions, charge, effect=0.5, most=40) -> float:
    """How often a null arm is called better or worse by somebody who begins with ``first`` seeds, and adds the seeds of
    "inconclusive (needs n)" again and again, up to ``most``. ``effect`` is in sd of the paired differences. With
    ``charge``, earlier looks are charged as those of a plan without looks."""
    rng, wrong = np.random.default_rng([first, charge]), 0
    for _ in range(repetitions):
        arm, base, n, earlier = rng.normal(size=most), np.zeros(most), first, []
        while n <= most:
            looks = added_later([*(count for count, _, _ in earlier), n])
            history = History(looks, tuple(p for _, p, _ in earlier), tuple(q for _, _, q in earlier))
            histories = {"arm": history} if charge and earlier else None
            m = measure(arm[:n], base[:n], True, 0.05, effect)
            verdict = judge({"arm": arm[:n]}, base[:n], {"arm": True}, effect, histories=histories)["arm"][3]
            wrong += verdict.word in ("better", "worse")
            if verdict.needs is None:
                break
            earlier.append((n, float(m.p), float(m.p_equivalence)))
            n = verdict.needs
    return wrong / repetitions


def look_table(repetitions) -> str:
    lines = ["seeds added until some arm wins, looks not charged: arms, last seed, false better or worse"]
    for arms, last in ((1, 10), (1, 20), (1, 50), (10, 10), (10, 20)):
        later = look_rates(added_later(range(3, last + 1)), arms, repetitions)[0]
        plain = unplanned_rate(arms, last, repetitions)
        lines.append(f"{arms:>4}{last:>4}  {plain:.4f}; charged {later.rate:.4f}{'' if later.holds else ' *'}")
    lines.append('seeds added as "needs n" says, effect of half a sd: first seeds, false better or worse')
    for first in (3, 5):
        plain, paid = (advice_rate(first, repetitions, charge) for charge in (False, True))
        lines.append(f"{first:>4}      {plain:.4f}; charged {paid:.4f}")
    for spending in SPENDINGS:
        looks = Looks.planned(LOOKS, spending)
        lines.append(f"{spending}, looks at {list(LOOKS)}, nominal p {looks.levels(0.05).round(4).tolist()}")
        for design in DESIGNS:
            for arms in (1, 3, 10):
                found = look_rates(looks, arms, repetitions, design)
                cells = "; ".join(f"{rate.name} {rate.rate:.4f}{'' if rate.holds else ' *'}" for rate in found)
                lines.append(f"  {design}, {arms} arms: {cells}")
        for shift in (0.0, 1.0, 2.0):
            seeds, power = expected_seeds(looks, shift, repetitions)
            lines.append(f"  difference of {shift:g} sd: {seeds:.2f} seeds, power {power:.3f}")
    return "\n".join(lines)


# ---- tables


def table(repetitions) -> str:
    """One line for each setting, each rate with its standard error in brackets, and a star where it is off."""
    lines = []
    for n, design in SETTINGS:
        found = rates(n, design, repetitions)
        if not lines:
            lines.append(f"{'n':>3}  {'correlation':11}  " + "  ".join(rate.name.rjust(16) for rate in found))
        cells = []
        for rate in found:
            error = math.sqrt(rate.rate * (1 - rate.rate) / repetitions)
            cell = f"{rate.rate:.4f} ({error:.4f}){'' if rate.holds else ' *'}"
            cells.append(cell.rjust(max(16, len(rate.name))))
        lines.append(f"{n:>3}  {'unpaired' if design is None else design:<11}  " + "  ".join(cells))
    return "\n".join(lines)


def quick_holm():
    """statsmodels collects garbage at each call of multipletests, which takes 50 ms in a process with torch in it;
    frozen, what is there already need not be looked through."""
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=20_000)
    parser.add_argument("--looks", action="store_true", help="only the table of repeated looks")
    parser.add_argument("--diverged", action="store_true", help="only the table of arms whose worst runs diverge")
    quick_holm()
    arguments = parser.parse_args()
    repetitions = arguments.repetitions
    if arguments.looks:
        print(look_table(repetitions))
        raise SystemExit
    if arguments.diverged:
        print(diverged_table(repetitions))
        raise SystemExit
    print(table(repetitions))
    for kind in KINDS:
        print()
        for line in item_table(repetitions, kind):
            print(line, flush=True)
    print(f"\n{separation_table(repetitions)}")
    print(f"\n{look_table(repetitions)}")
    print(f"\n{diverged_table(repetitions)}")
