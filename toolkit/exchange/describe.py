"""Describe a model of ours by its parts, as an architecture of transformers is described."""

from __future__ import annotations

from toolkit.architectures import Model, Part, Sizes
from toolkit.compose import Run
from toolkit.config import keys
from toolkit.config.layers import Config, Reference, references

SLOTS = ("block", "mixer", "position", "attention", "norm", "ffn")
ROOT = ("", "Experiment")


def describe(run: Run) -> Model:
    """The parts of an opened run's model. Raises ValueError for a model that is no GPT."""
    config = run.config
    scope, name = built(config, ROOT[0], config.parts[ROOT]["model"])
    if name != "GPT":
        raise ValueError(f"Experiment.model is @{name}; architectures are described as layers of @GPT")
    knobs = config.parts[scope, name]
    n_layer, n_head = _integer(knobs["n_layer"]), _integer(knobs["n_head"])
    columns = {slot: _layers(config, scope, slot, knobs[slot], n_layer) for slot in SLOTS}
    norms = list(references(knobs["norm"]))
    sizes = Sizes(
        vocab_size=run.tokenizer.vocab_size,
        max_len=run.experiment.seq_len,
        dim=_integer(knobs["dim"]),
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=_integer(knobs["n_kv_head"] or n_head),
        tie_embeddings=bool(knobs["tie_embeddings"]),
        logit_softcap=knobs["logit_softcap"],  # type: ignore[arg-type]  # the config was checked
        embed_scale=knobs["embed_scale"] or 1.0,  # type: ignore[arg-type]
    )
    layers = tuple({slot: columns[slot][i] for slot in SLOTS} for i in range(n_layer))
    shapes = {name: tuple(tensor.shape) for name, tensor in run.model.state_dict().items()}
    return Model(sizes, layers, _part(config, scope, norms[-1]), shapes)


def _integer(value: object) -> int:
    assert isinstance(value, int), value  # the config was checked
    return value


def _layers(config: Config, scope: str, slot: str, value: object, n_layer: int) -> list[Part]:
    """The part of each layer in a slot of GPT."""
    parts = [_part(config, scope, reference) for reference in references(value)]
    return [parts[i % len(parts)] for i in range(n_layer)]  # as GPT repeats a list


def _part(config: Config, scope: str, reference: Reference) -> Part:
    """The part that a reference builds, with its own parts as values of knobs."""
    inner, name = built(config, scope, reference)
    knobs = {
        knob: _part(config, inner, value) if isinstance(value, Reference) else value
        for knob, value in config.parts.get((inner, name), {}).items()  # none of a part that every mixer ignores
    }
    return Part(name, knobs)


def built(config: Config, scope: str, value: object) -> tuple[str, str]:
    """(scope, name) of the part that a reference builds inside ``scope``."""
    assert isinstance(value, Reference), value  # the config was checked
    return value.scope or scope, keys.bare(value.name)
