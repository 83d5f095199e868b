"""Tests that are made several times while seeds are added: what one look may spend, and the p that holds at any look.

A look judges an arm on its first n seeds. At every look there is a nominal p, that of the test on these seeds alone. If
the arm stopped at the first nominal p below alpha, its error rate would grow with each look. So each look gets a
smaller nominal level, chosen so that under no difference the chance to cross a level at some look is at most alpha.

Spending. A function says how much of alpha may be spent up to a look, by the share f of the planned seeds that it has
(Lan and DeMets 1983): "obrien-fleming" spends 2 - 2 Phi(z(alpha / 2) / sqrt(f)), nearly nothing at first; "pocock"
spends alpha ln(1 + (e - 1) f). Looks need not be planned for this, but f must reach 1. A look beyond the planned seeds
comes when alpha is spent. All such looks together may spend RESERVE alpha more: alpha RESERVE (1 - 1 / f) up to f > 1.

Levels. They are those of the paired t statistic under normal differences, not of a normal statistic, which is wrong at
3 seeds. Of n differences, only the cosine of the angle between them and the vector (1, ..., 1) matters. It is a Markov
chain: with u = sum / sqrt(sum of squares), one more difference gives (u + x) / sqrt(1 + x^2), where sqrt(n) x is
Student's t with n degrees of freedom and independent of u. The chain is integrated on a grid of normal scores, which
are standard normal at every look. Tests with more degrees of freedom or a larger variance cross these levels less often
(tests/planted_truth.py tries them).

Sequential p: the smallest alpha at which a level would have been crossed at any look so far (Jennison and Turnbull
2000, section 8.4; Liu and Anderson 2008). It is a valid p at whatever look one stops. Repeated intervals at 1 - alpha
have the nominal level of their look, and cover at whatever look one stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

if TYPE_CHECKING:
    from toolkit.comparison.statistics import Measured

SPENDINGS = ("obrien-fleming", "pocock")
RESERVE = 0.02  # of alpha: what all looks after the planned seeds may spend together
LARGE = 60  # seeds: from here on, the chain of normal scores is taken for that of a normal statistic
EDGES = np.linspace(-8.0, 8.0, 401)  # of the cells of the grid of normal scores
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2
NEGLIGIBLE = 1e-14  # chances that the grid can't resolve
ALPHAS = tuple(np.geomspace(1e-9, 0.99, 90).tolist())  # of the table in which a sequential p is looked up

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Looks:
    """The looks at an arm so far, or those that are planned. ``counts`` are the seeds at each look, at least 2 and
    increasing. ``fractions`` are their shares of the planned seeds, not decreasing. ValueError: looks that are not so,
    and an unknown spending."""

    counts: tuple[int, ...]
    fractions: tuple[float, ...]
    spending: str = "pocock"

    def __post_init__(self) -> None:
        increasing = all(a < b for a, b in zip(self.counts, self.counts[1:], strict=False))
        if len(self.counts) != len(self.fractions) or not self.counts or self.counts[0] < 2 or not increasing:
            raise ValueError(f"looks at {list(self.counts)} seeds: the numbers must be at least 2, and increase")
        ordered = all(a <= b for a, b in zip(self.fractions, self.fractions[1:], strict=False))
        if not ordered or not self.fractions[0] > 0:
            raise ValueError(f"shares {list(self.fractions)} of the planned seeds: they must be above 0, and not fall")
        if self.spending not in SPENDINGS:
            raise ValueError(f"spending {self.spending!r} is unknown; it is one of {', '.join(SPENDINGS)}")

    @classmethod
    def planned(cls, counts: Sequence[int], spending: str = "obrien-fleming") -> Looks:
        """Looks at these numbers of seeds, the last of which has all of them."""
        return cls(tuple(counts), tuple(count / counts[-1] for count in counts), spending)

    @property
    def is_plain(self) -> bool:
        """Whether this is one look at all planned seeds, where a sequential p is the nominal one."""
        return self.fractions == (1.0,)

    def levels(self, alpha: float, sides: int = 2) -> Array:
        """The nominal level of each look. ``sides`` is 2, or 1 for a one-sided test at one-sided ``alpha``."""
        return _levels(self.counts, self.fractions, self.spending, sides, (alpha,))[:, 0]

    def p(self, nominal: ArrayLike, sides: int = 2) -> Array:
        """The sequential p after the last look, from the nominal p of each look, ``(..., looks)`` -> ``(...)``; nan
        where the last one is nan, and an earlier nan counts as 1. Values below 1e-9 are given as 1e-9."""
        nominal = np.asarray(nominal, dtype=float)
        if self.is_plain:
            return nominal[..., 0]
        table = _levels(self.counts, self.fractions, self.spending, sides, ALPHAS)
        by_look = [_smallest_alpha(nominal[..., k], levels) for k, levels in enumerate(table)]
        return np.where(np.isnan(nominal[..., -1]), np.nan, np.min(by_look, axis=0))


@dataclass(frozen=True)
class History:
    """All looks at an arm with the present one, and the nominal p of the earlier looks. ``future`` has the seeds and
    shares of the planned looks that are to come, and ``name`` is the present look in words."""

    looks: Looks
    p: tuple[float, ...] = ()
    p_equivalence: tuple[float, ...] = ()
    future: tuple[tuple[int, float], ...] = ()
    name: str = "earlier looks charged"

    def level(self, n: int, alpha: float) -> float:
        """The nominal level of a later look at n seeds, which follows all planned looks at fewer."""
        now = (self.looks.counts[-1], self.looks.fractions[-1])
        count, share = self.future[-1] if self.future else now
        steps = [(each, part) for each, part in self.future if each <= n]
        if (steps or [now])[-1][0] < n:
            steps.append((n, max((steps or [now])[-1][1], share * n / count)))
        counts, fractions = zip(*steps, strict=True)
        looks = Looks(self.looks.counts + counts, self.looks.fractions + fractions, self.looks.spending)
        return float(looks.levels(alpha)[-1])

    def charge(self, measured: Measured, alpha: float) -> Measured:
        """The results of the present look with sequential p and a repeated interval. They need only be of a test whose
        p and interval are those of a t statistic."""
        two_sided = self.looks.p(_append(self.p, measured.p))
        one_sided = self.looks.p(_append(self.p_equivalence, measured.p_equivalence), sides=1)
        half = (measured.high - measured.low) / 2 * self.widening(measured.df, alpha)
        ends = {"low": measured.mean - half, "high": measured.mean + half}
        return dataclasses.replace(measured, p=two_sided, p_equivalence=one_sided, **ends)

    def widening(self, df: ArrayLike, alpha: float) -> Array:
        """The width of the present repeated interval, in widths of the plain interval at 1 - alpha."""
        return stats.t.isf(self.looks.levels(alpha)[-1] / 2, df) / stats.t.isf(alpha / 2, df)


def spent(alpha: ArrayLike, fraction: float, spending: str) -> Array:
    """What may be spent up to a look with this share of the planned seeds, by a test with one side or with two."""
    alpha = np.asarray(alpha, dtype=float)
    if fraction > 1:
        return alpha * (1 + RESERVE * (1 - 1 / fraction))
    if spending == "pocock":
        return alpha * np.log1p((np.e - 1) * fraction)
    return 2 * special.ndtr(special.ndtri(alpha / 2) / np.sqrt(fraction))


def crossing(counts: Sequence[int], levels: Sequence[float], sides: int = 2) -> Array:
    """The chance under no difference that a nominal level is crossed up to each look."""
    state, before, kept = _start(1), counts[0], []
    for count, level in zip(counts, levels, strict=True):
        state = _cut(_move(state, before, count), np.array([-special.ndtri(level / sides)]), sides)
        kept.append(state.sum())
        before = count
    return 1 - np.array(kept)


@lru_cache(maxsize=2**15)
def _levels(
    counts: tuple[int, ...], fractions: tuple[float, ...], spending: str, sides: int, alphas: tuple[float, ...]
) -> Array:
    """The nominal level of each look at each alpha, ``(looks, alphas)``. Where a higher alpha had a lower level, the
    lower one counts, so that levels never fall with alpha."""
    if fractions == (1.0,):
        return np.array([alphas])
    state, n, before, levels = _start(len(alphas)), counts[0], np.zeros(len(alphas)), []
    for count, fraction in zip(counts, fractions, strict=True):
        state = _move(state, n, count)
        total = spent(alphas, fraction, spending)
        bounds, level = _bounds(state, total - before, sides)
        state, n, before = _cut(state, bounds, sides), count, total
        levels.append(np.minimum.accumulate(level[::-1])[::-1])
    result = np.array(levels)
    result.flags.writeable = False
    return result


def _bounds(state: Array, chances: Array, sides: int) -> tuple[Array, Array]:
    """The normal score beyond which each row of the state has its chance, and the nominal level of that score."""
    tail = np.cumsum(state[:, ::-1], axis=1)[:, ::-1]  # beyond the lower edge of each cell
    edges = EDGES[:-1]
    if sides == 2:
        tail, edges = (tail + np.cumsum(state, axis=1)[:, ::-1])[:, edges >= 0], edges[edges >= 0]
    bounds = np.full(len(state), np.inf)
    for row in np.flatnonzero(chances > NEGLIGIBLE):
        rising = np.log(np.maximum(tail[row, ::-1], 1e-300))
        bounds[row] = np.interp(np.log(chances[row]), rising, edges[::-1])
    level = np.where(np.isfinite(bounds), sides * special.ndtr(-bounds), np.maximum(chances, 0.0))
    return bounds, level


def _start(rows: int) -> Array:
    return np.tile(np.diff(special.ndtr(EDGES)), (rows, 1))


def _cut(state: Array, bounds: Array, sides: int) -> Array:
    """The state without what lies beyond the bound of each row."""
    width = EDGES[1] - EDGES[0]
    kept = np.clip((bounds[:, None] - EDGES[:-1]) / width, 0, 1)
    return state * (kept + kept[:, ::-1] - 1 if sides == 2 else kept)


def _move(state: Array, n: int, count: int) -> Array:
    """The state after more seeds: ``count`` instead of ``n``."""
    for each in range(n, min(count, max(n, LARGE))):
        state = state @ _one_more(each)
    return state @ _many_more(max(n, LARGE) / count) if count > max(n, LARGE) else state


@lru_cache(maxsize=LARGE)
def _one_more(n: int) -> Array:
    """The chances of each cell at n + 1 seeds, given the centre of a cell at n seeds. With the angle a between the
    differences and (1, ..., 1), u = sqrt(n) cos a. Given u, the new cosine is above that of an edge where atan(x) lies
    within an angle b of atan(1 / u)."""
    now, then = _angle(CENTRES, n)[:, None], _angle(EDGES, n + 1)[None, :]
    centre = np.arctan2(1.0, np.sqrt(n) * np.cos(now))
    square = (n + 1) * np.sin(then) ** 2 - n * np.sin(now) ** 2
    within = np.arctan2(np.sqrt(np.maximum(square, 0.0)), np.sqrt(n + 1) * np.cos(then))
    above = np.zeros_like(within)
    for turn in (0.0, 2 * np.pi):  # the angles are those of a circle
        low, high = (np.clip(centre - turn + sign * within, -np.pi / 2, np.pi / 2) for sign in (-1, 1))
        above += special.stdtr(n, np.sqrt(n) * np.tan(high)) - special.stdtr(n, np.sqrt(n) * np.tan(low))
    return -np.diff(above, axis=1)


@lru_cache(maxsize=1024)
def _many_more(ratio: float) -> Array:
    """The same for a normal statistic and many seeds; ``ratio`` is the number before, divided by the number after."""
    return np.diff(special.ndtr((EDGES - np.sqrt(ratio) * CENTRES[:, None]) / np.sqrt(1 - ratio)), axis=1)


def _angle(scores: Array, n: int) -> Array:
    """The angle that belongs to the t statistic of n differences with this normal score, between 0 and pi."""
    t = np.sign(scores) * np.abs(special.stdtrit(n - 1, special.ndtr(-np.abs(scores))))
    return np.arctan2(np.sqrt(n - 1), t)


def _smallest_alpha(nominal: Array, levels: Array) -> Array:
    """The smallest alpha whose level is at least the nominal p; 1 if there is none."""
    useful = levels > 0
    if not useful.any():
        return np.ones_like(nominal)
    with np.errstate(divide="ignore"):
        alpha = np.exp(np.interp(np.log(nominal), np.log(levels[useful]), np.log(np.array(ALPHAS)[useful])))
    return np.where(nominal <= levels[-1], alpha, 1.0)  # also 1 where there is no p


def _append(earlier: tuple[float, ...], last: Array) -> Array:
    last = np.asarray(last, dtype=float)[..., None]
    return np.concatenate([np.broadcast_to(earlier, (*last.shape[:-1], len(earlier))), last], axis=-1)
