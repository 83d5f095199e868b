"""What a resumed run may change: each knob of a config shapes the model, the data, the training, or none of them."""

from __future__ import annotations

from toolkit.registry import CATALOG

SHAPES = {
    "model": ("model", "attention", "position", "mixer", "norm", "ffn", "block", "init"),
    "data": ("data", "tokenizer"),
    "training": ("loss", "optimizer", "schedule"),
    "harmless": ("logger",),
}
EXPERIMENT = {
    "model": ("model",),
    "data": ("data", "tokenizer", "seed", "batch_size", "seq_len", "mask_documents"),
    "training": (
        *("loss", "optimizer", "schedule", "steps", "accumulate", "clip", "precision", "spike_sigmas"),
        *("eval_every", "eval_windows"),  # they decide which checkpoint is the best
    ),
    "harmless": (  # the same mathematics; sums of floats may round differently with other devices or a compiler
        *("loggers", "log_every", "sample_every", "sample_prompt", "sample_tokens", "sample_temperature"),
        *("checkpoint_every", "keep_checkpoints", "devices", "rank_timeout", "compile", "profile_steps"),
        "threads",
    ),
}


def shapes(key: str) -> str:
    """What the knob ``[scope/]Part.knob`` shapes: "model", "data", "training" or "harmless". A part that is not on the
    shelf any more shapes the model."""
    part, _, knob = key.rpartition("/")[2].partition(".")
    if part == "Experiment":
        return next((shaped for shaped, knobs in EXPERIMENT.items() if knob in knobs), "training")
    kind = CATALOG[part].kind if part in CATALOG else "model"
    return next((shaped for shaped, kinds in SHAPES.items() if kind in kinds), "model")


def difference(before: dict[str, object], now: dict[str, object]) -> dict[str, list]:
    """{key: [then, now]} of two flat configs; "absent" stands for a knob that only one of them has."""
    either = {
        **before,
        **{key: value for key, value in now.items() if key in before or not _is_new(key, value, before)},
    }
    both = {key: [before.get(key, "absent"), now.get(key, "absent")] for key in either}
    return {key: pair for key, pair in both.items() if pair[0] != pair[1]}


def _is_new(key: str, value: object, before: dict[str, object]) -> bool:
    """Whether a knob that a config of before does not have came to its part later, and has its default."""
    owner, _, knob = key.rpartition(".")
    part = CATALOG.get(owner.rpartition("/")[2])
    known = any(other.rpartition(".")[0] == owner for other in before)
    return known and part is not None and knob in part.knobs and part.knobs[knob].default == value


def told(changes: dict[str, list]) -> list[str]:
    """A line for each change, grouped by what it shapes."""
    lines = []
    for shaped in SHAPES:
        for key, (was, now) in changes.items():
            if shapes(key) == shaped:
                lines.append(f"  {shaped:8}  {key}: {was} there, {now} here")
    return lines
