"""Which config changes a resumed run may make: each knob shapes the model, the data or the training, or its change is
harmless."""

from __future__ import annotations

from toolkit.config import keys
from toolkit.config.layers import plain
from toolkit.registry import CATALOG

SHAPES = {
    "model": ("model", "attention", "position", "mixer", "norm", "ffn", "block", "init"),
    "data": ("data", "tokenizer"),
    "training": ("loss", "optimizer", "schedule"),
    "harmless": ("logger", "evaluator", "probe"),
}
EXPERIMENT = {
    "model": ("model",),
    "data": ("data", "tokenizer", "seed", "batch_size", "seq_len", "mask_documents"),
    "training": (
        *("loss", "optimizer", "schedule", "steps", "accumulate", "clip", "precision", "spike_sigmas"),
        *("eval_every", "eval_windows"),  # these decide which checkpoint is the best
    ),
    "harmless": (  # the mathematics stays the same; float sums may round differently on other devices or compiled
        *("loggers", "log_every", "sample_every", "sample_prompt", "sample_tokens", "sample_temperature"),
        *("checkpoint_every", "keep_checkpoints", "devices", "rank_timeout", "compile", "profile_steps"),
        *("threads", "evaluators", "final_evaluators", "probes", "probe_every"),
    ),
}


def shapes(key: str) -> str:
    """The category of the knob ``[scope/]Part.knob``: what it shapes, "model", "data" or "training", or "harmless". A
    part that is no longer registered shapes the model."""
    part, knob, _ = keys.split(key)
    if part == "Experiment":
        return next((category for category, knobs in EXPERIMENT.items() if knob in knobs), "training")
    kind = CATALOG[part].kind if part in CATALOG else "model"
    return next((category for category, kinds in SHAPES.items() if kind in kinds), "model")


def difference(before: dict[str, object], now: dict[str, object]) -> dict[str, list[object]]:
    """{key: [before, now]} for the knobs that differ in two flat configs; "absent" stands for a knob that a config
    lacks. A knob that its part got later, and that has its default, is no difference."""
    differences = keys.differences(before, now).items()
    return {key: list(pair) for key, pair in differences if key in before or not _is_new(key, pair[1], before)}


def _is_new(key: str, value: object, before: dict[str, object]) -> bool:
    """Whether a knob that is missing in ``before`` has its default, and ``before`` has other knobs of its part: the
    part got the knob later."""
    name, knob, _ = keys.split(key)
    part = CATALOG.get(name)
    part_is_in_before = any(keys.owner(other) == keys.owner(key) for other in before)
    return part_is_in_before and part is not None and knob in part.knobs and plain(part.knobs[knob].default) == value


def describe(changes: dict[str, list[object]]) -> list[str]:
    """A line for each change, grouped by category."""
    lines = []
    for category in SHAPES:
        for key, (was, now) in changes.items():
            if shapes(key) == category:
                lines.append(f"  {category:8}  {key}: was {was}, is now {now}")
    return lines
