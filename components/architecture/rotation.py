"""Rotary positions: the parts that a config's rope_parameters stand for, and the rope_parameters of a part."""

from __future__ import annotations

import math
from typing import Any

from toolkit.architectures import Knobs, Model, Part


def rope(config: Any, head_dim: int, refused: list[str], partial: bool = False) -> tuple[Part, ...]:
    """The position parts of a config's rope_parameters; adds lines to ``refused`` for what no part computes.
    ``partial``: the architecture can rotate a share of the channels."""
    entries = dict(config.rope_parameters)
    theta, kind = float(entries["rope_theta"]), entries.get("rope_type", "default")
    width = int(head_dim * (entries.get("partial_rotary_factor") or 1.0))  # channels of a head that are rotated
    if width != head_dim and not partial:
        refused.append(f"it rotates all {head_dim} channels of a head, not {width}")
    if width % 2 or width < 2:
        refused.append(f"rope_parameters rotate {width} channels of {head_dim}: it must be an even number")
    if kind == "default":
        rotated = Part(
            "RoPE",
            {"theta": theta},
            {"fraction": width / head_dim},
            lambda knobs: max(2, 2 * round(float(str(knobs["fraction"])) * head_dim / 2)) == width,
        )
        whole = (Part("NTKRoPE", where=lambda knobs: math.isclose(_ntk_theta(knobs, head_dim), theta)),)
        return (rotated, *(whole if width == head_dim else ()))
    if width != head_dim:
        refused.append(f"rope_type {kind!r} on {width} of {head_dim} channels: it must be on all of them")
    if kind == "linear":
        return (Part("LinearRoPE", {"theta": theta, "scale": float(entries["factor"])}),)
    if kind == "yarn":
        return (_yarn(config, entries, theta, refused),)
    if kind == "llama3":
        return (_llama3(config, entries, theta, refused),)
    refused.append(f"rope_type {kind!r}: it must be default, linear, yarn or llama3")
    return ()


def _yarn(config: Any, entries: dict[str, Any], theta: float, refused: list[str]) -> Part:
    usual = 0.1 * math.log(float(entries["factor"])) + 1
    if (
        not math.isclose(entries.get("attention_factor") or usual, usual)
        or entries.get("mscale")
        or not entries.get("truncate", True)
    ):
        refused.append("rope_type 'yarn': attention_factor, mscale and truncate must have their defaults")
    betas = float(entries.get("beta_fast") or 32), float(entries.get("beta_slow") or 1)
    return _stretched("YaRN", config, entries, theta, *betas)


def _llama3(config: Any, entries: dict[str, Any], theta: float, refused: list[str]) -> Part:
    fast, slow = float(entries["high_freq_factor"]), float(entries["low_freq_factor"])
    if not fast > slow > 0:
        refused.append(f"rope_type 'llama3': high_freq_factor {fast:g} must be above low_freq_factor {slow:g}, above 0")
    return _stretched("Llama3RoPE", config, entries, theta, fast, slow)


def _stretched(name: str, config: Any, entries: dict[str, Any], theta: float, fast: float, slow: float) -> Part:
    """A part that keeps the frequencies of fast pairs, and divides those of slow pairs."""
    scale, length = float(entries["factor"]), entries["original_max_position_embeddings"]
    knobs = {"theta": theta, "scale": scale, "beta_fast": fast, "beta_slow": slow}
    max_len = config.max_position_embeddings
    return Part(name, knobs, {"original_len": length}, lambda own: (own["original_len"] or max_len / scale) == length)


def _ntk_theta(knobs: Knobs, head_dim: int) -> float:
    """The theta of plain RoPE that NTKRoPE amounts to."""
    return float(str(knobs["theta"])) * float(str(knobs["scale"])) ** (head_dim / max(head_dim - 2, 1))


def rope_parameters(model: Model) -> dict[str, Any]:
    """``rope_parameters`` for the first layer's position part."""
    part = model.layers[0]["position"]
    head_dim, knobs = model.head_dim, part.knobs
    width = max(2, 2 * round(float(str(knobs.get("fraction", 1.0))) * head_dim / 2))
    theta = _ntk_theta(knobs, head_dim) if part.name == "NTKRoPE" else knobs.get("theta", 10_000.0)
    entries: dict[str, Any] = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": width / head_dim}
    if part.name == "LinearRoPE":
        return entries | {"rope_type": "linear", "factor": knobs["scale"]}
    if part.name not in ("YaRN", "Llama3RoPE"):
        return entries
    length = knobs["original_len"] or model.sizes.max_len / float(str(knobs["scale"]))
    entries |= {"factor": knobs["scale"], "original_max_position_embeddings": int(float(str(length)))}
    if part.name == "YaRN":
        return entries | {"rope_type": "yarn", "beta_fast": knobs["beta_fast"], "beta_slow": knobs["beta_slow"]}
    factors = {"high_freq_factor": knobs["beta_fast"], "low_freq_factor": knobs["beta_slow"]}
    return entries | {"rope_type": "llama3"} | factors
