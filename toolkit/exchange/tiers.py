"""In which tier ``convert --to hf`` writes each part of the catalogue: native, code, or refused with the reason."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkit.architectures import ARCHITECTURES
from toolkit.compose import Run, compose
from toolkit.config.overlays import overlay_of, overlays
from toolkit.exchange import remotecode, tokens
from toolkit.exchange.choice import choose
from toolkit.exchange.describe import SLOTS, describe
from toolkit.experiment import build_blank
from toolkit.registry import Entry

MODEL_KINDS = ("model", *SLOTS, "init")  # the kinds of the parts that a model is made of
LIGHT = "Experiment.tokenizer = @Bytes"  # needs no file; the tier does not depend on it


@dataclass(frozen=True)
class Row:
    """The tier of the default model with one part or overlay.

    ``name`` is that of the part or the overlay's file. ``native`` are the model types in transformers that the model
    is. ``reason`` says why it is refused; "" if it is not."""

    kind: str
    name: str
    native: tuple[str, ...] = ()
    reason: str = ""

    @property
    def tier(self) -> str:
        """The tier in words, with model types or the reason."""
        if self.reason:
            return f"refused: {self.reason}"
        return f"native: {', '.join(self.native)}" if self.native else "code"


def rows(entries: Collection[Entry]) -> Iterator[Row]:
    """The tier of the default model with each part of a model in its slot, by kind. After the parts of a kind, that of
    the model with each further overlay under gin/ for this kind."""
    by_kind = {kind: [entry for entry in entries if entry.kind == kind] for kind in MODEL_KINDS}
    default = {name for _, name in compose()[0].parts}
    for kind, parts in by_kind.items():
        of_parts = {each.name: None if each.name in default else overlay_of(each, alone=True) for each in parts}
        for name, overlay in of_parts.items():
            slot = "Experiment.model" if kind == "model" else f"GPT.{kind}"
            yield _row(kind, name, [overlay], []) if overlay else _row(kind, name, [], [f"{slot} = @{name}"])
        for overlay in overlays(kind) if parts else ():
            if overlay not in of_parts.values():
                yield _row(kind, overlay, [overlay], [])


def tokenizers(entries: Iterable[Entry]) -> dict[str, str]:
    """Which file gives the ids of each tokenizer, or why none does."""
    reasons = {entry.name: tokens.refusal(entry.cls) for entry in entries if entry.kind == "tokenizer"}
    return {name: f"refused: it {reason}" if reason else "tokenizer.json" for name, reason in reasons.items()}


def _row(kind: str, name: str, files: Sequence[str], bindings: Sequence[str]) -> Row:
    """The row of the default model with these gin files and bindings."""
    try:
        config, _ = compose(files, [*bindings, LIGHT])
        experiment = config.build()
        model = build_blank(experiment).model
        run = Run(config, experiment, experiment.tokenizer(), model, Path(name), torch.device("meta"))
        native = tuple(each for each in ARCHITECTURES if _is(run, each))
        if not native:
            remotecode.copied(config)
    except ValueError as error:
        return Row(kind, name, reason=str(error))
    return Row(kind, name, native)


def _is(run: Run, architecture: str) -> bool:
    """Whether a model is of an architecture."""
    try:
        choose(describe(run), {}, architecture)
    except ValueError:
        return False
    return True
