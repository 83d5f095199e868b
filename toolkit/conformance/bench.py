"""The bench: a part, and the small GPT of gin/model/check.gin in which it is tested."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.compose import compose
from toolkit.config import keys
from toolkit.config.layers import Config, Reference
from toolkit.conformance.lines import Broken, Gauge
from toolkit.context import Context
from toolkit.model import GPT
from toolkit.registry import CATALOG, Entry

OVERLAY = "gin/model/check.gin"
LAYERS = ("attention", "position", "mixer", "norm", "ffn", "block")
MODELS = (*LAYERS, "model")
VOCAB, LONGEST, HEADS, HEAD_DIM = 50, 64, 4, 8
DIM = HEADS * HEAD_DIM
LENGTHS = (1, 2, 13, 33, 64)
LISTS = {
    "logger": "loggers",
    "evaluator": "final_evaluators",
    "probe": "probes",
}  # kinds whose slot in Experiment holds a list


class Bench:
    """One part with its knobs, and models to test it in. ``cls`` builds the part as the toolkit would."""

    def __init__(self, entry: Entry, knobs: dict[str, object] | None = None) -> None:
        self.entry, self.kind = entry, entry.kind
        self.knobs = knobs or {}
        self.cls = with_knobs(entry.cls, self.knobs)
        self.inductor = False  # whether checks also compile with the inductor backend
        self.unavailable = ""  # why the part can't be used here (no network, say); empty if it can
        self._untied: bool | None = None

    def variants(self) -> list[tuple[str, type]]:
        """(label, class): the part as it is and, if it has the knob ``window``, with a short window."""
        windowed = with_knobs(self.entry.cls, self.knobs | {"window": 5})
        return [("", self.cls), (", window 5", windowed)] if "window" in self.entry.knobs else [("", self.cls)]

    def model(
        self,
        cls: type | None = None,
        *,
        seed: int = 0,
        plain_init: bool = False,
        size: tuple[int, int] = (VOCAB, LONGEST),
        **changes: Any,
    ) -> nn.Module:
        """A GPT with the part in its slot. ``changes`` replace other slots and knobs. ``plain_init`` draws the weights
        as for training; without it, check.gin draws them wider, which most checks need. ``size`` is (vocabulary,
        longest sequence)."""
        base = _constructor("GPT")
        slots = dict(base.keywords)
        if plain_init:
            slots["init"] = CATALOG[slots["init"].__name__].cls
        if self.kind in slots:
            slots[self.kind] = cls or self.cls
        if self.untied:
            slots["tie_embeddings"] = False
        build = self.cls if self.kind == "model" else base.func
        slots = ({} if self.kind == "model" else slots) | changes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(*size, **slots)

    def gpt(self, **changes: Any) -> GPT:
        """``model(**changes)`` for a part of any kind but "model": the model is then the toolkit's own."""
        model = self.model(**changes)
        assert isinstance(model, GPT), f"a bench for the kind {self.kind} built a {type(model).__name__}"
        return model

    def models(self, **changes: Any) -> Iterator[tuple[str, nn.Module]]:
        """(label, model in evaluation mode) for each variant of the part."""
        for label, cls in self.variants():
            yield label, self.model(cls, **changes).eval()

    @property
    def untied(self) -> bool:
        """Whether the part refuses tied embeddings; its models then have a separate output matrix."""
        if self._untied is None:
            self._untied = False
            try:
                self.model()
            except ValueError as error:
                self._untied = "GPT.tie_embeddings = False" in str(error)
        return self._untied

    def supports(self, what: str) -> bool:
        """Whether ``supports`` of the part contains ``what``. A mixer is built first: its instance declares it."""
        return self.mixer_supports(what) if self.kind == "mixer" else what in getattr(self.entry.cls, "supports", ())

    def mixer_supports(self, what: str) -> bool:
        """Whether ``supports`` of the mixer, in a model with the part, contains ``what``."""
        return what in getattr(self.gpt().mixers[0], "supports", ())


def bench_of(name: str, bindings: Sequence[str] = ()) -> Bench:
    """The bench of a registered part, with its knobs set by ``bindings``. Raises ValueError: the part is unknown or is
    the experiment itself, or a binding is refused."""
    entry = CATALOG[name]
    if entry.kind == "experiment":
        raise ValueError(f"{name} is the experiment itself; check the parts that it names")
    owner = "GPT" if entry.kind in CATALOG["GPT"].knobs else "Experiment"
    slot, value = LISTS.get(entry.kind, entry.kind), f"[@{name}]" if entry.kind in LISTS else f"@{name}"
    key = keys.spell(owner, slot)
    slot_binding = [f"{key} = {value}"] if key not in map(keys.bound_by, bindings) else []
    config, _ = compose([OVERLAY], [*slot_binding, *bindings])
    part_knobs = [knobs for (_, part), knobs in config.parts.items() if part == name]
    return Bench(
        entry,
        {knob: _resolve_references(config, value, "") for knob, value in part_knobs[0].items()} if part_knobs else None,
    )


def with_knobs(cls: type, knobs: dict[str, object]) -> type:
    """The class with knobs bound, as gin does it: a subclass of the same name whose constructor passes the knobs on."""
    if not knobs:
        return cls

    constructor: Callable[..., None] = inspect.getattr_static(cls, "__init__")

    def initialise(self: object, *args: object, **keywords: object) -> None:
        constructor(self, *args, **(knobs | keywords))

    return type(cls.__name__, (cls,), {"__init__": initialise, "__module__": cls.__module__, "__doc__": cls.__doc__})


@functools.cache
def _constructor(name: str) -> functools.partial:
    """A constructor of a part with the knobs that check.gin gives it, which does not need gin."""
    config, _ = compose([OVERLAY])
    knobs = config.parts[("", name)]
    return functools.partial(
        CATALOG[name].cls, **{knob: _resolve_references(config, value, "") for knob, value in knobs.items()}
    )


def plain_part(kind: str) -> type:
    """The part that check.gin puts into a slot of Experiment, such as the loss, the optimizer or the tokenizer."""
    return _constructor("Experiment").keywords[kind]


def _resolve_references(config: Config, value: object, scope: str) -> object:
    """A knob's value with every reference replaced by its class, knobs bound."""
    if isinstance(value, Reference):
        scope, name = value.scope or scope, keys.bare(value.name)
        knobs = config.parts.get((scope, name), {})
        return with_knobs(CATALOG[name].cls, {knob: _resolve_references(config, v, scope) for knob, v in knobs.items()})
    return [_resolve_references(config, item, scope) for item in value] if isinstance(value, list) else value


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def objective(model: nn.Module, ids: Tensor, loss: nn.Module | None = None) -> Tensor:
    """The mean training loss, a scalar, of a batch of ids (B, T + 1), plus the auxiliary losses in the context."""
    context, targets = Context(), ids[:, 1:].flatten()
    hidden, head = model(ids[:, :-1], context)
    total = (loss or plain_part("loss")())(hidden.flatten(0, 1), head, targets)[0] / len(targets)
    return total + sum(context.losses.values())


def two_steps(model: nn.Module, loss: nn.Module) -> Gauge:
    """Take two steps of AdamW on one batch. Raises Broken if they don't lower the loss."""
    ids, losses = tokens(4, 33), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_value = objective(model, ids, loss)
        losses.append(loss_value.item())
        loss_value.backward()
        optimizer.step()
    if not losses[2] < losses[0]:
        raise Broken(
            f"the loss went from {losses[0]:.4f} to {losses[2]:.4f} in two steps of AdamW at 1e-3, and must become "
            "smaller; look at the sign and the size of the gradients"
        )
    gauge = Gauge(note=f"{losses[0]:.4f} -> {losses[2]:.4f}")
    gauge.record(0, "B=4, T=32")
    return gauge


def new_cache(model: nn.Module, batch: int) -> list | None:
    """The model's cache for decoding, or None if it keeps none."""
    init_cache = getattr(model, "init_cache", None)
    return init_cache(batch) if init_cache else None


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference divided by the largest absolute value of ``theirs``, the reference. Infinite if the shapes
    differ or a value is not finite."""
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item() if ours.numel() else 0.0


def position_with(method: str) -> type | None:
    """The first registered position part with the given method (rotate, embed or score_bias); None if there is none."""
    candidates = (e.cls for e in CATALOG.values() if e.kind == "position" and hasattr(e.cls, method))
    return next(candidates, None)
