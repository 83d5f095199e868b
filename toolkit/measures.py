"""What an evaluator works with: what a reader gives it (TokenNats, Continuation), and what it returns (Score)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class TokenNats(NamedTuple):
    """A text, token by token: the nats of each token given those before it, and the UTF-8 bytes that it stands for."""

    nats: np.ndarray  # (T,) float64
    byte_lengths: np.ndarray  # (T,) int64


class Continuation(NamedTuple):
    """A continuation of a context: its nats, summed over its tokens, and whether each token is the likeliest one."""

    nats: float
    tokens: int
    is_greedy: bool


@dataclass(frozen=True)
class Score:
    """The value of one metric.

    value  the metric
    unit   its unit, such as "nats" or "fraction"
    items  {id of an item: its value}, so that two models can be compared item by item; empty without items
    """

    value: float
    unit: str
    items: Mapping[str, float] = field(default_factory=dict)


def mean(values: Mapping[str, float], unit: str) -> Score:
    """The score of a metric that is the mean of its items. NaN without items."""
    return Score(math.fsum(values.values()) / len(values) if values else math.nan, unit, values)
