"""The bench: a part, and the small GPT of gin/model/check.gin that it is tried in."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from toolkit.compose import compose
from toolkit.config.layers import Reference
from toolkit.conformance.report import Broken, Gauge
from toolkit.context import Context
from toolkit.registry import CATALOG, Entry

OVERLAY = "gin/model/check.gin"
LAYERS = ("attention", "position", "mixer", "norm", "ffn", "block")
VOCAB, LONGEST, HEADS, HEAD_DIM = 50, 64, 4, 8
DIM = HEADS * HEAD_DIM
LENGTHS = (1, 2, 13, 33, 64)


class Bench:
    """One part with its knobs, and models to try it in. ``cls`` builds the part as the toolkit would."""

    def __init__(self, entry: Entry, knobs: dict[str, object] | None = None):
        self.entry, self.kind = entry, entry.kind
        self.knobs = knobs or {}
        self.cls = with_knobs(entry.cls, self.knobs)
        self.inductor = False  # compile with PyTorch's own backend as well
        self.missing = ""  # why the part can't be had here, once that is known
        self._untied: bool | None = None

    def variants(self) -> list[tuple[str, type]]:
        """The part as it is, and with a window shorter than the sequences where it has that knob."""
        short = with_knobs(self.entry.cls, self.knobs | {"window": 5})
        return [("", self.cls), (", window 5", short)] if "window" in self.entry.knobs else [("", self.cls)]

    def model(self, cls: type | None = None, *, seed: int = 0, plain_init: bool = False, **changes) -> nn.Module:
        """A GPT with the part in its slot. ``changes`` replace other slots and knobs; ``plain_init`` draws the weights
        as one trains, not as wide as the other checks want them."""
        base = _plain("GPT")
        slots = dict(base.keywords)
        if plain_init:
            slots["init"] = CATALOG[slots["init"].__name__].cls
        if self.kind in slots:
            slots[self.kind] = cls or self.cls
        if self.untied:
            slots["tie_embeddings"] = False
        make = self.cls if self.kind == "model" else base.func
        slots = ({} if self.kind == "model" else slots) | changes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make(VOCAB, LONGEST, **slots)

    @property
    def untied(self) -> bool:
        """Whether the part refuses a tied output matrix: it is then tried with one of its own."""
        if self._untied is None:
            self._untied = False
            try:
                self.model()
            except ValueError as error:
                self._untied = "GPT.tie_embeddings = False" in str(error)
        return self._untied

    def models(self, **changes) -> Iterator[tuple[str, nn.Module]]:
        """(label, model in evaluation mode) for each variant of the part."""
        for label, cls in self.variants():
            yield label, self.model(cls, **changes).eval()

    def supports(self, what: str) -> bool:
        """Whether the part declares a support: by its class, or, for a mixer, once it is built."""
        if self.kind == "mixer":
            return what in getattr(self.model().mixers[0], "supports", ())
        return what in getattr(self.entry.cls, "supports", ())


def bench_of(name: str, bindings: Sequence[str] = ()) -> Bench:
    """The bench of a registered part, with the knobs that ``bindings`` give it. Raises ValueError: no such part, or a
    binding that the guard refuses."""
    entry = CATALOG[name]
    if entry.kind == "experiment":
        raise ValueError(f"{name} is the experiment itself; check the parts that it names")
    owner = "GPT" if entry.kind in CATALOG["GPT"].knobs else "Experiment"
    slot = f"{owner}.loggers = [@{name}]" if entry.kind == "logger" else f"{owner}.{entry.kind} = @{name}"
    bound = {binding.split("=")[0].strip() for binding in bindings}
    given = [slot] if slot.split("=")[0].strip() not in bound else []
    config, _ = compose([OVERLAY], [*given, *bindings])
    found = [knobs for (_, part), knobs in config.parts.items() if part == name]
    return Bench(entry, {knob: _built(config, value, "") for knob, value in found[0].items()} if found else None)


def with_knobs(cls: type, knobs: dict[str, object]) -> type:
    """The class with knobs bound, as gin hands it over: a subclass of the same name."""
    if not knobs:
        return cls

    def __init__(self, *args, **given):
        cls.__init__(self, *args, **(knobs | given))

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__, "__doc__": cls.__doc__})


@functools.cache
def _plain(name: str) -> functools.partial:
    """A part of check.gin with all its knobs, without gin in between."""
    config, _ = compose([OVERLAY])
    knobs = config.parts[("", name)]
    return functools.partial(CATALOG[name].cls, **{knob: _built(config, value, "") for knob, value in knobs.items()})


def plain_part(kind: str) -> type:
    """The part that check.gin puts into a slot of Experiment: loss, optimizer, tokenizer ..."""
    return _plain("Experiment").keywords[kind]


def _built(config, value, scope):
    """A knob's value with references as classes that carry their knobs."""
    if isinstance(value, Reference):
        scope, name = value.scope or scope, value.name.rpartition(".")[2]
        knobs = config.parts.get((scope, name), {})
        return with_knobs(CATALOG[name].cls, {knob: _built(config, v, scope) for knob, v in knobs.items()})
    return [_built(config, item, scope) for item in value] if isinstance(value, list) else value


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """(B, T) random ids."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def objective(model: nn.Module, ids: Tensor, loss: nn.Module | None = None) -> Tensor:
    """The mean training loss of a batch, with the auxiliary losses that parts leave in the context."""
    context, targets = Context(), ids[:, 1:].flatten()
    hidden, head = model(ids[:, :-1], context)
    total = (loss or plain_part("loss")())(hidden.flatten(0, 1), head, targets)[0] / len(targets)
    return total + sum(context.losses.values())


def two_steps(model: nn.Module, loss: nn.Module) -> Gauge:
    """Two steps of AdamW on one batch: raises Broken where they don't lower the loss."""
    ids, seen = tokens(4, 33), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        value = objective(model, ids, loss)
        seen.append(value.item())
        value.backward()
        optimizer.step()
    if not seen[2] < seen[0]:
        raise Broken(f"the loss went from {seen[0]:.4f} to {seen[2]:.4f} in two steps")
    gauge = Gauge(note=f"{seen[0]:.4f} -> {seen[2]:.4f}")
    gauge.see(0, "B=4, T=32")
    return gauge


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the reference's largest value; infinite where something is not finite."""
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item() if ours.numel() else 0.0


def position_with(method: str) -> type | None:
    """The first position part on the shelf that offers a method: rotate, embed or score_bias."""
    found = (e.cls for e in CATALOG.values() if e.kind == "position" and hasattr(e.cls, method))
    return next(found, None)
