"""Planted truth: runs are drawn from a known truth, thousands of times, and the rates of true and false words counted.

``python -m tests.planted_truth`` prints the table for 20,000 repetitions each (a few minutes); ``--repetitions N`` for
others. The verdicts are those of toolkit/comparison/statistics.py, which ``judge`` gives for one repetition."""

import argparse
import gc
import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from toolkit.comparison.statistics import detectable, measure, words

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
    quick_holm()
    print(table(parser.parse_args().repetitions))
