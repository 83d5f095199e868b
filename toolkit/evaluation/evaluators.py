"""The evaluators of an experiment: measures a model with them."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Mapping

from toolkit.config.layers import Config
from toolkit.experiment import Experiment, build_list
from toolkit.loop.sampling import BrokenModel
from toolkit.measures import Score
from toolkit.protocols import Evaluator, Reader

log = logging.getLogger("toolkit")


def of(config: Config, experiment: Experiment) -> dict[str, Evaluator]:
    """All evaluators of an experiment: {name: evaluator}. An evaluator in both slots is there once. Raises
    ValueError."""
    during = build_list(config, "evaluators", experiment.evaluators)
    chosen = during | build_list(config, "final_evaluators", experiment.final_evaluators)
    check_context(chosen, experiment.seq_len)
    return chosen


def check_context(evaluators: Mapping[str, Evaluator], seq_len: int) -> None:
    """Raise ValueError for an evaluator that reads more tokens at a time than the model's context has."""
    for name, evaluator in evaluators.items():
        needed = getattr(evaluator, "min_context", 0)
        if needed > seq_len:
            raise ValueError(
                f"{name} reads {needed} tokens at a time, but the model's context has Experiment.seq_len = {seq_len}: "
                f"choose shorter sequences with the knobs of {type(evaluator).__name__}, or raise Experiment.seq_len"
            )


def fingerprints(evaluators: Mapping[str, Evaluator]) -> dict[str, str]:
    """{name: fingerprint}."""
    return {name: evaluator.fingerprint() for name, evaluator in evaluators.items()}


def is_higher_better(evaluator: Evaluator, metric: str) -> bool:
    """Whether a higher value of a metric is better. The evaluator must be prepared."""
    return evaluator.higher_is_better and metric not in getattr(evaluator, "lower_is_better", ())


def measure(evaluators: Mapping[str, Evaluator], reader: Reader) -> dict[str, dict[str, Score]]:
    """Measure a model with each evaluator: {name: {metric: Score}}. An evaluator that generates text is left out, with
    a warning, if the model's logits are not finite. Raises ValueError for scores that are not of the form that
    toolkit/protocols.py asks for."""
    measured: dict[str, dict[str, Score]] = {}
    for name, evaluator in evaluators.items():
        try:
            measured[name] = evaluator.evaluate(reader)
        except BrokenModel as error:
            log.warning("%s is not measured: %s", name, error)
            continue
        _check(name, measured[name])
    return measured


def row(measured: Mapping[str, Mapping[str, Score]]) -> dict[str, float]:
    """The scores as a row of metrics ``eval/NAME/METRIC``."""
    return {
        f"eval/{name}/{metric}": float(score.value)
        for name, scores in measured.items()
        for metric, score in scores.items()
    }


def _check(name: str, scores: object) -> None:
    """Raise ValueError unless an evaluator returned {metric: Score}, with numbers."""
    if not isinstance(scores, dict) or not all(isinstance(score, Score) for score in scores.values()):
        raise ValueError(
            f"{name}.evaluate returned {scores!r:.80}; it must return {{metric: Score}} (toolkit.measures)"
        )
    for metric, score in scores.items():
        if not isinstance(metric, str) or not metric or any(character.isspace() for character in metric):
            raise ValueError(f"{name}.evaluate: {metric!r} is not the name of a metric; use text without white space")
        for value in (score.value, *score.items.values()):
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise ValueError(f"{name}.evaluate: the value of {metric} must be a number, not {value!r:.40}")
        if any(math.isinf(value) for value in score.items.values()):
            raise ValueError(f"{name}.evaluate: an item of {metric} is infinite")
