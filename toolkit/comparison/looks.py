"""Which look each arm of a plan is at, and the earlier looks that its p has to pay for.

A plan with ``looks`` is judged only at them. An arm's look is the largest one at which all its runs, and those of the
baseline, have ended; runs beyond it are not judged yet. If ``ablate`` stopped the arm, its look is the one at which it
stopped. So the look follows from the runs alone, and the nominal p of earlier looks are computed from their seeds.

A plan without ``looks`` is one look at all its seeds. If an arm was judged before, on fewer seeds, looks.jsonl says so;
these looks are charged, with the spending function "pocock". An arm that is judged while runs of it are to come has
only a share of its planned seeds, and so may spend only a part of alpha."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from toolkit.comparison import lookfile
from toolkit.comparison.banner import Banner, list_names
from toolkit.comparison.lookfile import LookFile
from toolkit.comparison.runs import ENDED, PlanRecord, Run
from toolkit.comparison.sequential import History, Looks
from toolkit.comparison.statistics import measure_all

Values = tuple[tuple[int, float], ...]  # (seed, value); a seed that was run twice has two


@dataclass(frozen=True)
class Look:
    """The look at which an arm is judged. ``number`` is its place among the ``total`` planned ones (None: not planned).
    ``seeds`` are those that were judged, ``count`` is the number of pairs or values, ``share`` its part of the planned
    one. ``earlier`` are the counts of the charged looks before. ``history`` is None for one look at all planned seeds.
    """

    number: int
    total: int | None
    seeds: tuple[int, ...]
    count: int
    share: float
    earlier: tuple[int, ...]
    history: History | None

    @property
    def name(self) -> str:
        """Such as "look 2 of 4"; empty for one look at all planned seeds."""
        return self.history.name if self.history else ""


@dataclass(frozen=True)
class ArmValues:
    """The values of an arm and of the baseline, ordered by seed; if they are paired, of the same seeds."""

    arm: Values
    baseline: Values
    paired: bool

    @classmethod
    def of(cls, arm: Values, baseline: Values, paired: bool) -> ArmValues:
        """Those of the common seeds if they are paired, else all."""
        common = {seed for seed, _ in arm} & {seed for seed, _ in baseline}
        return cls(arm, baseline, paired).at(common) if paired else cls(arm, baseline, paired)

    def at(self, seeds: Iterable[int]) -> ArmValues:
        """The values at these seeds alone."""
        kept = set(seeds)
        arm, baseline = (tuple(pair for pair in each if pair[0] in kept) for each in (self.arm, self.baseline))
        return ArmValues(arm, baseline, self.paired)

    @property
    def count(self) -> int:
        return min(len(self.arm), len(self.baseline))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({seed for seed, _ in (*self.arm, *self.baseline)}))

    @property
    def numbers(self) -> tuple[list[float], list[float]]:
        """The values of the arm and of the baseline, by seed."""
        return [value for _, value in self.arm], [value for _, value in self.baseline]


class Looking:
    """The looks at all arms of a plan, from its runs and its looks.jsonl."""

    def __init__(self, plan: PlanRecord, judged: Sequence[Run], metric: str):
        self.plan, self.metric = plan, metric
        self.file = lookfile.read(plan.folder) if plan.declared and plan.folder else LookFile()
        self.runs: dict[tuple[str, int | None], list[Run]] = {}
        for run in judged:
            self.runs.setdefault((run.arm, run.requested_seed), []).append(run)
        self.stops = {arm: stop for arm in plan.arms if (stop := self.file.stop(plan.baseline, metric, arm))}
        self.stopped = frozenset(self.stops) if plan.looks else frozenset[str]()
        self.reached = {arm: self._reached(arm) for arm in plan.arms if arm != plan.baseline}

    def _reached(self, arm: str) -> int:
        """The number of planned looks at which all runs of the arm and the baseline have ended."""
        ended = [count for count in self.plan.looks if not self._to_come(arm, self.plan.seeds[:count])]
        if arm in self.stops:
            last = next((n for n in ended if set(self.stops[arm]["seeds"]) <= set(self.plan.seeds[:n])), 0)
            ended = [count for count in ended if count <= last] or ended
        return len(ended)

    def _to_come(self, arm: str, seeds: Iterable[int]) -> list[int]:
        """The seeds at which both the arm and the baseline can still get a value, and one of them has not ended."""
        waiting = []
        for seed in seeds:
            runs = [self.runs.get((name, seed), []) for name in (arm, self.plan.baseline)]
            lost = any(all(r.state in ENDED and r.value(self.metric) is None for r in each) for each in runs)
            if not lost and any(run.state not in ENDED for each in runs for run in each):
                waiting.append(seed)
        return waiting

    def due(self, judged: Sequence[Run]) -> list[Run]:
        """The runs without those that the looks so far do not need, and that were not begun."""
        if not self.plan.looks:
            return list(judged)
        latest = max(self.reached.values(), default=0)
        needed = {
            arm: set(self.plan.seeds[: self.plan.looks[max(self.reached.get(arm, latest), 1) - 1]])
            for arm in self.plan.arms
        }
        return [run for run in judged if run.state != "not begun" or run.requested_seed in needed[run.arm]]

    def seeds(self, arm: str) -> Sequence[int] | None:
        """The plan's seeds that are judged in this arm: none before its first look. None: all that there are."""
        if not self.plan.looks:
            return None
        reached = self.reached[arm]
        return self.plan.seeds[: self.plan.looks[reached - 1]] if reached else ()

    def waiting(self, arm: str) -> str:
        """Why an arm with values is not judged yet."""
        return f"The first look is at {self.plan.looks[0]} seeds, and not all of their runs have ended."

    def at(self, values: Mapping[str, ArmValues], alpha: float, effect: float | None) -> dict[str, Look]:
        """The look at each arm, with the nominal p of its earlier looks. Arms with fewer than two values have none."""
        if not self.plan.declared:
            return {}
        chains = {arm: self._chain(arm, each) for arm, each in values.items() if each.count > 1}
        p = self._nominal(values, chains, alpha, effect)
        return {arm: self._look(arm, values[arm], chain, p[arm]) for arm, chain in chains.items()}

    def _chain(self, arm: str, values: ArmValues) -> list[tuple[tuple[int, ...], int, float]]:
        """(seeds, number of them with values, share of the planned ones) of each look, the present one last. Looks that
        found no new value are one."""
        planned = self._planned(arm, values) if self.plan.looks else self._unplanned(arm, values)
        chain: list[tuple[tuple[int, ...], int, float]] = []
        for seeds, count, share in planned:
            if count < 2:
                continue
            if chain and count <= chain[-1][1]:
                chain.pop()
            chain.append((seeds, count, max(share, chain[-1][2] if chain else 0.0)))
        return chain

    def _planned(self, arm: str, values: ArmValues) -> list[tuple[tuple[int, ...], int, float]]:
        looks = [self.plan.seeds[:count] for count in self.plan.looks[: self.reached[arm]]]
        return [(seeds, values.at(seeds).count, len(seeds) / self.plan.planned_seeds) for seeds in looks]

    def _unplanned(self, arm: str, values: ArmValues) -> list[tuple[tuple[int, ...], int, float]]:
        """The looks of looks.jsonl before the present one. Once seeds were judged, a judgement of fewer of them, as
        with --exclude, is no look: nothing new is seen."""
        now, before = values.count, []
        for row in self.file.of(self.plan.baseline, self.metric, arm):
            if set(values.seeds) <= set(row["seeds"]):
                same = row if len(row["seeds"]) == len(values.seeds) else None
                break
            before.append(row)
        else:
            same = None
        known = {row["n"]: (tuple(row["seeds"]), float(row["share"])) for row in before}
        chain = [(seeds, count, share) for count, (seeds, share) in sorted(known.items()) if 1 < count < now]
        to_come = len(self._to_come(arm, self.plan.seeds))
        if same:
            share = float(same["share"])
        elif not chain:
            share = now / (now + to_come)
        else:
            planned = chain[0][1] / chain[0][2]
            share = now / planned if to_come or now > planned else 1.0
        return [*chain, (values.seeds, now, share)]

    def _nominal(
        self,
        values: Mapping[str, ArmValues],
        chains: Mapping[str, list[tuple[tuple[int, ...], int, float]]],
        alpha: float,
        effect: float | None,
    ) -> dict[str, list[tuple[float, float]]]:
        """(p, p of equivalence) of each earlier look at each arm. Arms are measured together at looks with the same
        place from the first. Without all its values an earlier look counts with p = 1."""
        p: dict[str, list[tuple[float, float]]] = {arm: [] for arm in chains}
        for place in range(max(map(len, chains.values()), default=1) - 1):
            there = {arm: chain[place] for arm, chain in chains.items() if len(chain) > place + 1}
            known = {arm: values[arm].at(seeds) for arm, (seeds, _, _) in there.items()}
            known = {arm: each for arm, each in known.items() if each.count == there[arm][1]}
            measured = measure_all(
                {arm: each.numbers[0] for arm, each in known.items()},
                {arm: each.numbers[1] for arm, each in known.items()},
                {arm: each.paired for arm, each in known.items()},
                alpha,
                effect,
            )
            for arm in there:
                one = measured.get(arm)
                p[arm].append((float(one.p), float(one.p_equivalence)) if one else (1.0, 1.0))
        return p

    def _look(
        self,
        arm: str,
        values: ArmValues,
        chain: list[tuple[tuple[int, ...], int, float]],
        p: list[tuple[float, float]],
    ) -> Look:
        counts, shares = tuple(count for _, count, _ in chain), tuple(share for _, _, share in chain)
        total = len(self.plan.looks) or None
        number = self.reached[arm] if total else len(chain)
        if shares == (1.0,):
            return Look(number, total, values.seeds, counts[-1], 1.0, (), None)
        looks = Looks(counts, shares, self.plan.spending if total else "pocock")
        lost = (self.plan.looks[number - 1] if total else 0) - counts[-1]
        future = tuple((seeds - lost, seeds / self.plan.planned_seeds) for seeds in self.plan.looks[number:])
        if total:
            name = f"look {number} of {total}"
        elif len(chain) > 1:
            name = f"look {number}, earlier looks charged"
        else:
            name = f"of {round(counts[0] / shares[0])} planned"
        history = History(looks, tuple(a for a, _ in p), tuple(b for _, b in p), future, name)
        return Look(number, total, values.seeds, counts[-1], shares[-1], counts[:-1], history)

    def banners(self, looks: Mapping[str, Look]) -> list[Banner]:
        """Arms that were judged before on fewer seeds, outside the planned looks; and damage of looks.jsonl."""
        banners = [Banner("looks not known", self.file.damage)] if self.file.damage else []
        by_text: dict[str, list[str]] = {}
        for arm, look in looks.items():
            if look.earlier and (look.total is None or look.share > 1):
                text = f"judged before at {' and '.join(map(str, look.earlier))} seeds, and now at {look.count}"
                by_text.setdefault(text, []).append(arm)
        for text, arms in by_text.items():
            spent = (
                "The earlier looks are charged: p and intervals are those of a test that is made several times, and "
                "adding seeds until a verdict comes does not raise the error rate"
            )
            banners.append(Banner("looked before", f"{list_names(arms)}: {text}. {spent}"))
        return banners

    def notes(self, looks: Mapping[str, Look]) -> list[str]:
        """Arms that are judged while runs of them are to come."""
        early = [arm for arm, look in looks.items() if look.total is None and look.history and not look.earlier]
        if not early:
            return []
        return [
            f"{list_names(early)}: judged before all planned seeds have ended; this is a look, so only a part of alpha "
            "is spent, and later looks are charged for it"
        ]
