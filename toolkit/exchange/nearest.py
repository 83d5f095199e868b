"""Say which known architecture is nearest to one that is not known, and what differs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from toolkit.architectures import ARCHITECTURES
from toolkit.exchange import library
from toolkit.exchange.remotecode import MODEL_TYPE

NEUTRAL = {  # entries of a config that change nothing in what a model computes
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "_name_or_path", "attention_dropout"),
    *("hidden_dropout", "resid_pdrop", "embd_pdrop", "id2label", "label2id", "task_specific_params", "pretraining_tp"),
}
SHOWN = 8  # entries in a message


def explain(model_type: str | None, entries: Mapping[str, object]) -> str:
    """A message about a model type that has no mapping: the nearest type, and the entries that it lacks or needs."""
    listed = ", ".join(ARCHITECTURES)
    if model_type is None:
        return f"config.json has no model_type, so it is no model of transformers; known are {listed}"
    if model_type == MODEL_TYPE:
        return (
            "this model was exported from a run with the source of its parts (tier code); use the run, its own folder"
        )
    known = {name: _entries_of(name) for name in ARCHITECTURES}
    given = entries.keys() - NEUTRAL

    def likeness(name: str) -> float:
        shared = len(given & known[name]) / max(1, len(given | known[name]))
        return shared + difflib.SequenceMatcher(None, model_type, name).ratio()

    nearest = max(known, key=likeness)
    surplus, missing = sorted(given - known[nearest]), sorted(known[nearest] - given)
    lines = [f"the architecture {model_type!r} has no mapping; known are {listed}. The nearest is {nearest}"]
    lines += [f"  it has no {', '.join(surplus[:SHOWN])}"] if surplus else []
    lines += [f"  it also has {', '.join(missing[:SHOWN])}"] if missing else []
    lines.append(
        "  a class with @architecture in a file of your own adds a mapping (--import FILE.py; docs/exchange.md)"
    )
    return "\n".join(lines)


def _entries_of(model_type: str) -> set[str]:
    """The entries of a config of a type, without neutral ones."""
    return library.make_config(model_type, {}).to_dict().keys() - NEUTRAL
