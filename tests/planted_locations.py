"""Planted truth for ``compare --probes``: what probes see is drawn from a known truth, and false and true locations are
counted.

``python -m tests.planted_locations`` prints the tables for 20,000 repetitions each (some minutes); ``--repetitions N``
for others. The tests are those of toolkit/comparison/located.py, which ``compare --probes`` runs."""

import argparse

import numpy as np

from tests.planted_truth import Rate
from toolkit.comparison import located

STEPS, LAYERS, FAMILIES, ALPHA = 4, 6, 4, 0.05
FAMILY = np.repeat(np.arange(FAMILIES), LAYERS)
DESIGNS = [(n, paired) for n in (3, 5) for paired in (True, False)]


def independent(rng, shape):
    """Normal, each cell and seed on its own."""
    return rng.normal(size=shape)


def correlated(rng, shape):
    """Normal; all cells of a seed share 95 % of their variance: layers, statistics and steps move together."""
    common = rng.normal(size=(shape[0], 1, 1, shape[-1]))
    return np.sqrt(0.95) * common + np.sqrt(0.05) * rng.normal(size=shape)


def persistent(rng, shape):
    """Normal; a cell keeps what it had at the step before but for a tenth of its variance."""
    steps = [rng.normal(size=(shape[0], *shape[2:]))]
    for _ in range(shape[1] - 1):
        steps.append(np.sqrt(0.9) * steps[-1] + np.sqrt(0.1) * rng.normal(size=steps[0].shape))
    return np.stack(steps, 1)


def heavy(rng, shape):
    """Student's t with 3 degrees of freedom, half of it shared by the layers of a statistic."""
    common = rng.standard_t(3, size=(*shape[:2], FAMILIES, shape[-1])).repeat(LAYERS, 2)
    return common + rng.standard_t(3, size=shape)


def unequal(rng, shape):
    """Normal; the standard deviations of the cells span four decades and grow with the steps."""
    sd = 10 ** rng.uniform(-3, 1, size=(shape[0], 1, shape[2], 1)) * np.arange(1, shape[1] + 1)[:, None, None]
    return 0.3 * sd * correlated(rng, shape)


def constant(rng, shape):
    """Normal, but half of the cells have one value for all seeds."""
    return rng.normal(size=shape) * (np.arange(shape[2]) % 2)[:, None]


def counts(rng, shape):
    """Counts, most of them zero: how many units of 64 are dead."""
    return rng.poisson(0.4, size=shape) / 64


NOISES = [independent, correlated, persistent, heavy, unequal, constant, counts]


def two_arms(rng, noise, repetitions, n, paired):
    """What probes see in two arms without a difference, each (repetitions, steps, cells, n). Paired seeds share two
    thirds of their noise."""
    shape = (repetitions, STEPS, FAMILIES * LAYERS, n)
    level = 0.0 if noise is counts else 5.0  # of a statistic that is a size, such as the rms
    own = [noise(rng, shape), noise(rng, shape)]
    if not paired or noise is counts:
        return [level + 0.3 * x for x in own] if noise is not counts else own
    shared = noise(rng, shape)
    return [level + 0.3 * (np.sqrt(2 / 3) * shared + np.sqrt(1 / 3) * x) for x in own]


def false_locations(noise, n, paired, repetitions, wider=1.0):
    """How often two arms without a difference get a location. ``wider``: the sd of one arm over that of the other."""
    rng = np.random.default_rng([n, paired, NOISES.index(noise), int(10 * wider)])
    hits = []
    for chunk in np.array_split(np.arange(repetitions), max(1, repetitions // 1000)):
        arm, base = two_arms(rng, noise, len(chunk), n, paired)
        middle = 0.0 if noise is counts else 5.0
        cells = located.examine(middle + wider * (arm - middle), base, FAMILY, paired)
        hits.append((np.nan_to_num(cells.p_adjusted, nan=1.0) <= ALPHA).any((-1, -2)))
    return Rate(noise.__name__, np.concatenate(hits).mean(), ALPHA, repetitions, bound=True)


def true_locations(n, paired, size, repetitions, begin=1, noise=correlated):
    """(share of repetitions with a location, share with the planted one). From step ``begin`` on, the values of one
    module and statistic differ by ``size`` sd of the seeds, and those of the layers behind it by a fifth of that."""
    rng = np.random.default_rng([n, paired, int(10 * size), begin])
    arm, base = two_arms(rng, noise, repetitions, n, paired)
    planted = 2 * LAYERS + 2
    arm[:, begin:, planted] += 0.3 * size
    arm[:, begin:, planted + 1 : 3 * LAYERS] += 0.06 * size
    cells = located.examine(arm, base, FAMILY, paired)
    depth, right, some = np.tile(np.arange(LAYERS), FAMILIES), 0, 0
    for i in range(repetitions):
        one = located.Cells(*(getattr(cells, name)[i] for name in ("p", "p_adjusted", "size", "equal")))
        answer = located.first(one, depth, ALPHA)
        some += bool(answer)
        right += bool(answer) and answer[0] == (begin, planted)
    return some / repetitions, right / repetitions


def table(repetitions) -> str:
    """A line for each design and kind of noise, with a star where the level is exceeded; then the power."""
    lines = [f"{'n':>3}  {'design':8}  " + "  ".join(f"{noise.__name__:>11}" for noise in NOISES) + "   sd x 3"]
    for n, paired in DESIGNS:
        rates = [false_locations(noise, n, paired, repetitions) for noise in NOISES]
        rates.append(false_locations(independent, n, paired, repetitions, wider=3.0))
        cells = "  ".join(f"{rate.rate:.4f}{' ' if rate.holds else '*'}".rjust(11) for rate in rates)
        lines.append(f"{n:>3}  {'paired' if paired else 'unpaired':8}  {cells}")
    lines += ["", f"{'n':>3}  {'design':8}  size in sd of the seeds: located (at its step and cell)"]
    for n, paired in DESIGNS:
        found = [(size, true_locations(n, paired, size, min(repetitions, 500))) for size in (2, 4, 8, 16, 32)]
        cells = "   ".join(f"{size}: {some:.2f} ({right:.2f})" for size, (some, right) in found)
        lines.append(f"{n:>3}  {'paired' if paired else 'unpaired':8}  {cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=20_000)
    print(table(parser.parse_args().repetitions))
