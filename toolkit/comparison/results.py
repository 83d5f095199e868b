"""What a comparison finds out: the result of each arm, and all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from toolkit.comparison.banner import Banner
from toolkit.comparison.looks import Look
from toolkit.comparison.rates import TunedRate
from toolkit.comparison.resolution import Resolution
from toolkit.comparison.runitems import ItemEvidence
from toolkit.comparison.runs import CURVE, PlanRecord, Run
from toolkit.comparison.statistics import Difference, Verdict

IDENTICAL = "identical"  # stands in place of a verdict: there is nothing to judge


@dataclass(frozen=True)
class TimeToTarget:
    """What an arm needs until its mean validation curve first falls to ``target``: steps, training FLOPs and seconds.
    None if the curve never falls that far, or if a cost is unknown. ``last_step`` is where the curve ends."""

    target: float
    steps: float | None
    flops: float | None
    seconds: float | None
    last_step: int


@dataclass(frozen=True)
class Evidence:
    """An arm's difference from the baseline and its tests. ``p_holm`` belongs to "the difference is zero",
    ``p_equivalence`` to "the difference is at least the smallest effect"; both are adjusted for the number of arms.
    ``detectable`` is the true difference that these seeds detect with 80 % power. Numbers that can't be computed, for
    example with one seed, are None."""

    difference: Difference
    p_holm: float | None
    p_equivalence: float | None
    detectable: float | None


@dataclass(frozen=True)
class Judgement:
    """An arm's verdict against the baseline. Without values, or if the arm is identical to the baseline, there is
    nothing to test, and no evidence. ``pairing`` says how the runs were paired; it is empty without values. ``look`` is
    there if the plan is declared and the arm was tested."""

    verdict: Verdict
    pairing: str
    evidence: Evidence | None = None
    look: Look | None = None


@dataclass(frozen=True)
class ArmResult:
    """An arm with its judged runs and all results. The baseline has no judgement."""

    name: str
    runs: tuple[Run, ...]
    values: tuple[tuple[int, float], ...]  # (seed, value) of the runs that finished, by seed
    diverged: int
    unfinished: int
    diverged_interval: tuple[float, float]
    judgement: Judgement | None = None
    time_to_target: TimeToTarget | None = None
    tuned: TunedRate | None = None
    configuration: tuple[str, ...] = ()  # what differs from the baseline
    by_item: ItemEvidence | None = None
    divergence_p: float | None = None  # of the test that it diverges as often as the baseline

    @property
    def mean(self) -> float | None:
        return float(np.mean([value for _, value in self.values])) if self.values else None

    @property
    def sd(self) -> float | None:
        return float(np.std([value for _, value in self.values], ddof=1)) if len(self.values) > 1 else None

    @property
    def difference(self) -> Difference | None:
        """The difference from the baseline; None for the baseline itself, and where there is none to compute."""
        return self.judgement.evidence.difference if self.judgement and self.judgement.evidence else None

    @property
    def conditional(self) -> bool:
        """Whether some runs have no value, so that the mean covers only a part of the runs."""
        return bool(self.diverged or self.unfinished)

    @property
    def losses(self) -> str:
        """How many runs have no value, and why: "2 of 5 diverged (exact 95 % interval 5 % to 85 %)"; else empty."""
        low, high = self.diverged_interval
        n, phrases = len(self.runs), []
        if self.diverged:
            phrases.append(f"{self.diverged} of {n} diverged (exact 95 % interval {low:.0%} to {high:.0%})")
        if self.unfinished:
            phrases.append(f"{self.unfinished} of {n} unfinished")
        return ", ".join(phrases)


@dataclass(frozen=True)
class MetricResolution:
    """What one metric can resolve, its unit, and the number of its items (None if it has no values by item).
    ``by_verdict``: the test over all pairs does not tell arms apart, but a verdict tells one from the baseline."""

    result: Resolution
    unit: str
    items: int | None
    by_verdict: bool


@dataclass(frozen=True)
class Comparison:
    """The whole comparison: everything that the outputs show. In a plan with looks, ``looks_reached`` is the number of
    looks at each arm, and ``stopped`` are the arms that ``ablate`` has stopped."""

    plan: PlanRecord
    metric: str
    effect: float | None  # None: nobody named one, so nothing is judged equivalent
    alpha: float
    arms: tuple[ArmResult, ...]  # the baseline first
    selection: tuple[Run, ...]
    excluded: tuple[tuple[Run, str], ...]
    banners: tuple[Banner, ...]
    notes: tuple[str, ...]
    noise: float | None
    noise_df: int
    unit: str
    resolutions: tuple[MetricResolution, ...] = ()
    looks_reached: Mapping[str, int] = field(default_factory=dict)
    stopped: frozenset[str] = frozenset()

    @property
    def baseline(self) -> ArmResult:
        return self.arms[0]

    @property
    def curve_metric(self) -> str:
        return self.metric if self.plan.table else curve_metric(self.metric)


def curve_metric(metric: str) -> str:
    """The metric measured during training that corresponds to the final one: "val/..." for "val_full/..."."""
    return metric.replace("val_full/", "val/") if metric.startswith("val_full/") else CURVE


def unit(metric: str) -> str:
    """The unit of a metric; of a metric that is not the toolkit's own, its name."""
    return {"loss_nats": "nats per token", "bits_per_byte": "bits per byte"}.get(metric.split("/")[-1], metric)
