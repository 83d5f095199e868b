"""Architectures of the transformers library, described in our parts, so that models can be converted both ways.

The author of a mapping writes a class with the members of ``Architecture`` and registers an instance of it with
``@architecture``. One description serves both directions:

- ``layout(config)`` says which parts a config of transformers stands for. A model of ours is of this architecture if
  its own parts match. A model that comes in is built from these parts.
- ``rules(config)`` says which tensor of ours is which tensor of theirs. Missing and surplus tensors are found by
  comparing sets of names.

An architecture is not a kind of part: no slot of a config holds one, so it has no knobs and no overlay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Knobs = Mapping[str, object]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """A part with its knobs.

    In a layout, ``knobs`` must be equal in a model of ours. ``further`` knobs are only bound when a model comes in, for
    example a width, which the shapes of the tensors prove anyway. ``where`` is a further condition on the knobs of a
    part of ours."""

    name: str
    knobs: Knobs = field(default_factory=dict)
    further: Knobs = field(default_factory=dict)
    where: Callable[[Knobs], bool] | None = None

    def __str__(self) -> str:
        shown = (f"{knob}={_shown(value)}" for knob, value in self.knobs.items())
        return f"@{self.name}({', '.join(shown)})"


@dataclass(frozen=True)
class Sizes:
    """The knobs of GPT that decide what it computes, and the length of the context in tokens."""

    vocab_size: int
    max_len: int
    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    tie_embeddings: bool
    logit_softcap: float | None = None
    embed_scale: float = 1.0


@dataclass(frozen=True)
class Model:
    """A model of ours: the part in each slot of each layer, the final norm, and the shapes of its tensors."""

    sizes: Sizes
    layers: tuple[dict[str, Part], ...]
    norm: Part
    shapes: Shapes

    def knob(self, slot: str, name: str, default: Any = None) -> Any:
        """A knob of the part in a slot of the first layer whose part has this knob; ``default`` if none has it."""
        return next((layer[slot].knobs[name] for layer in self.layers if name in layer[slot].knobs), default)

    @property
    def head_dim(self) -> int:
        """D, the channels of a head of the first layer."""
        return self.knob("mixer", "head_dim") or self.sizes.dim // self.sizes.n_head


@dataclass(frozen=True)
class Layout:
    """What a config of transformers stands for: for each slot of each layer the parts that compute it, the preferred
    one first; the same for the final norm."""

    sizes: Sizes
    layers: tuple[dict[str, tuple[Part, ...]], ...]
    norm: tuple[Part, ...]


class Change(Protocol):
    """A reversible change of a tensor. ``out`` makes theirs of ours, and ``back`` makes ours of theirs."""

    def out(self, tensor: Tensor) -> Tensor: ...

    def back(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Transposed:
    """Theirs is the transposed matrix, as in the Conv1D of GPT-2."""

    def out(self, tensor: Tensor) -> Tensor:
        """(O, I) -> (I, O)."""
        return tensor.T

    def back(self, tensor: Tensor) -> Tensor:
        """(I, O) -> (O, I)."""
        return tensor.T


@dataclass(frozen=True)
class Permuted:
    """Row i of theirs is row ``order[i]`` of ours."""

    order: tuple[int, ...]

    def out(self, tensor: Tensor) -> Tensor:
        """Reorder the rows of ours."""
        return tensor[torch.tensor(self.order)]

    def back(self, tensor: Tensor) -> Tensor:
        """Restore the order of ours."""
        return tensor[torch.tensor(self.order).argsort()]


@dataclass(frozen=True)
class Rule:
    """Rows of a tensor of ours are rows of a tensor of theirs, after the changes.

    ``rows`` and ``their_rows`` are (first, end); None means all. ``their_index`` is the first index into a tensor of
    theirs that stacks several."""

    ours: str
    theirs: str
    rows: tuple[int, int] | None = None
    their_rows: tuple[int, int] | None = None
    their_index: int | None = None
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Constant:
    """A tensor that only one side has. The other side computes the same without it only if all its values are
    ``value``."""

    owner: Literal["ours", "theirs"]
    name: str
    value: float = 0.0


class Architecture(Protocol):
    """A class of models in transformers. The first sentence of the docstring says what such a model is made of.

    ``config`` proposes the entries of a transformers config for a model of ours. It need not check anything: the
    proposal is accepted only if its ``layout`` is the model. ``layout`` raises ValueError, with a line for each entry
    of a config that our parts can't express. ``rules`` are the tensors of a config."""

    model_type: str

    def config(self, model: Model) -> dict[str, Any]: ...

    def layout(self, config: Any) -> Layout: ...

    def rules(self, config: Any) -> list[Rule | Constant]: ...


ARCHITECTURES: dict[str, Architecture] = {}


def architecture(cls: type) -> type:
    """Class decorator that registers a mapping under its ``model_type``. Raises ValueError for a class without the
    members of ``Architecture``, and for a model type that is taken."""
    missing = [name for name in ("model_type", "config", "layout", "rules") if not hasattr(cls, name)]
    if missing:
        raise ValueError(f"{cls.__name__} lacks {', '.join(missing)}; see Architecture in toolkit/architectures.py")
    instance: Architecture = cls()
    other = ARCHITECTURES.get(instance.model_type)
    if other is not None:
        raise ValueError(
            f"{cls.__name__}: {type(other).__name__} in {type(other).__module__} already maps the model type "
            f"{instance.model_type!r}"
        )
    ARCHITECTURES[instance.model_type] = instance
    return cls


def same_layers(n_layer: int, **slots: Iterable[Part]) -> tuple[dict[str, tuple[Part, ...]], ...]:
    """The layers of a layout in which every layer has the same parts."""
    return tuple({slot: tuple(parts) for slot, parts in slots.items()} for _ in range(n_layer))


def mismatches(layout: Layout, described: Model) -> list[str]:
    """What keeps a model of ours from being of a layout: a line for each condition that fails."""
    lines = []
    for knob, wanted in vars(layout.sizes).items():
        own = vars(described.sizes)[knob]
        if own != wanted:
            lines.append(f"GPT.{knob} is {_shown(own)}, but must be {_shown(wanted)}")
    failing: dict[str, list[int]] = {}
    for index, (accepted, own_parts) in enumerate(zip(layout.layers, described.layers, strict=False)):
        for slot, alternatives in accepted.items():
            own_part = own_parts[slot]
            if not any(_matches(each, own_part) for each in alternatives):
                wanted_parts = " or ".join(map(str, alternatives))
                compared = dict.fromkeys(knob for each in alternatives for knob in each.knobs)
                shown = Part(own_part.name, {k: own_part.knobs[k] for k in compared if k in own_part.knobs})
                failing.setdefault(f"GPT.{slot} is {shown}, but must be {wanted_parts}", []).append(index)
    for line, indices in failing.items():
        everywhere = len(indices) == len(described.layers)
        lines.append(line if everywhere else f"{line} (in layers {', '.join(map(str, indices))})")
    if not any(_matches(each, described.norm) for each in layout.norm):
        line = f"GPT.norm is {described.norm} at the end, but must be {' or '.join(map(str, layout.norm))}"
        lines += [] if any(other.startswith("GPT.norm is ") for other in lines) else [line]
    return lines


def _matches(wanted: Part, own: Part) -> bool:
    """Whether a part of ours is one of a layout."""
    if wanted.name != own.name:
        return False
    for knob, value in wanted.knobs.items():
        if knob not in own.knobs:
            return False
        other = own.knobs[knob]
        both_parts = isinstance(value, Part) and isinstance(other, Part)
        if not (_matches(value, other) if both_parts else value == other):  # type: ignore[arg-type]  # both are parts
            return False
    # A part that every mixer ignores is never built, and has no knobs.
    return wanted.where is None or (bool(own.knobs) and wanted.where(own.knobs))


def _shown(value: object) -> str:
    return str(value) if isinstance(value, Part) else repr(value)
