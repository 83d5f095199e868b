"""Write the layout of an architecture as gin bindings of GPT and its parts."""

from __future__ import annotations

from collections.abc import Mapping

from toolkit.architectures import Layout, Part
from toolkit.config import keys
from toolkit.config.layers import Reference, show


def bindings_of(layout: Layout) -> list[str]:
    """The bindings with which gin builds a layout, one line each. A part that occurs with different knobs gets a scope
    for each further set of knobs."""
    sizes = layout.sizes
    lines = {
        f"GPT.{knob}": show(value)
        for knob, value in vars(sizes).items()
        if knob not in ("vocab_size", "max_len")  # the toolkit passes these
    }
    scopes = _Scopes()
    for slot in layout.layers[0]:
        references = [scopes.reference(layer[slot][0], slot) for layer in layout.layers]
        period = _period(references)
        value: object = references[0] if period == 1 else references[:period]
        lines[f"GPT.{slot}"] = show(value)
    if layout.norm[0] != layout.layers[-1]["norm"][0]:
        raise ValueError(f"the final norm is {layout.norm[0]}, but GPT takes that of the last layer")
    return [f"{key} = {value}" for key, value in (lines | scopes.lines).items()]


class _Scopes:
    """Gives every part with its knobs a reference. ``lines``: {key: value} of the knobs."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}
        self._scopes: dict[str, list[tuple[Mapping[str, object], str]]] = {}

    def reference(self, part: Part, slot: str) -> Reference:
        """The reference to a part with its knobs."""
        knobs = {**part.knobs, **part.further}
        known = self._scopes.setdefault(part.name, [])
        for other, scope in known:
            if other == knobs:
                return Reference(scope, part.name)
        scope = f"{slot}_{len(known) + 1}" if known else ""
        known.append((knobs, scope))
        for knob, value in knobs.items():
            shown = self.reference(value, knob) if isinstance(value, Part) else value
            self.lines[keys.spell(part.name, knob, scope)] = show(shown)
        return Reference(scope, part.name)


def _period(references: list[Reference]) -> int:
    """The length of the shortest list that, repeated over the layers, gives these references."""
    count = len(references)
    return next(n for n in range(1, count + 1) if all(references[i] == references[i % n] for i in range(count)))
