"""Evaluators that a flag of a command adds to a config, as ``--lm-eval`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from toolkit.config import keys
from toolkit.config.layers import Binding, ConfigError, Layer, Macro, Reference, references
from toolkit.config.walk import key_of

SLOTS = ("evaluators", "final_evaluators")  # an evaluator is appended to the last one


class Addition(NamedTuple):
    """An evaluator and the knobs that the flag sets. ``where`` is the flag as written, for messages."""

    part: str
    knobs: Mapping[str, object]
    where: str


def add_evaluator(layers: Sequence[Layer], addition: Addition) -> None:
    """Bind the knobs of an evaluator in the last layer, which is the command line. If neither list of evaluators has
    the evaluator without a scope, append it to Experiment.final_evaluators. A knob that ``-p`` binds too is then bound
    twice, which the check of the config reports. All parts must be registered. Raises ConfigError for a list that is a
    macro."""
    merged = {key_of(binding): binding for layer in layers for binding in layer.bindings}
    lists = [merged.get(keys.spell("Experiment", slot)) for slot in SLOTS]
    for binding in lists:
        if binding and isinstance(binding.value, Macro):
            raise ConfigError(
                f"{binding.where}: {addition.where} needs the list itself in {binding.key}, not the macro "
                f"{binding.value}; write the list there"
            )
    command_line = layers[-1].bindings
    command_line += [Binding("", addition.part, knob, value, addition.where) for knob, value in addition.knobs.items()]
    chosen = [reference for binding in lists if binding for reference in references(binding.value)]
    if any(keys.bare(reference.name) == addition.part and not reference.scope for reference in chosen):
        return
    last = lists[-1]
    evaluators = last.value if last else []
    if not isinstance(evaluators, list | tuple):
        return  # the check of the config reports the value
    where = addition.where
    if last in command_line:  # -p binds the list: one binding has both
        command_line.remove(last)
        where = last.where
    extended = [*evaluators, Reference("", addition.part)]
    command_line.append(Binding("", "Experiment", SLOTS[-1], extended, where))
