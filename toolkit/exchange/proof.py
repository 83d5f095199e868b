"""Prove that a model of ours and a folder of transformers compute the same: logits, loss and greedy tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.context import Context
from toolkit.exchange import fresh
from toolkit.loop.sampling import stream
from toolkit.protocols import Model, Tokenizer

TOLERANCE = 1e-5  # of the largest logit, in float32
HALF_TOLERANCE = {
    "bfloat16": 0.1,
    "float16": 0.02,
}  # of a model that computes in a half type: about 25 of its roundings
GREEDY = 64  # tokens
LARGEST = 2**24  # logits of one probe; of longer ones, only the last positions are compared
TEXT = (
    "Once upon a time, in 1874, a girl named Zoë asked: \u201cWhat\u2019s inside?\u201d\n\tNobody knew \u2014 not even "
    "the old clock-maker, who couldn't read. 数学と詩、Привет, مرحبا, 🦊! "
)
Measure = Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class Proof:
    """Largest differences between two models, as shares of the largest logit, by what was compared.

    ``loss`` is the relative difference of their losses. ``greedy`` is the number of equal greedy tokens, ``tie``
    whether they end at two tokens whose logits are equal within the tolerance."""

    differences: dict[str, float]
    tolerance: float
    loss: float
    greedy: int
    greedy_total: int
    tie: bool

    @property
    def largest(self) -> float:
        """The largest difference of logits."""
        return max(self.differences.values())

    @property
    def problem(self) -> str | None:
        """What is not equal, in words; None if all is."""
        if not self.largest <= self.tolerance:  # also NaN
            worst = max(self.differences, key=lambda name: self.differences[name])
            return (
                f"the largest difference of logits is {self.largest:.2e} of the largest logit ({worst}); the tolerance "
                f"is {self.tolerance:.0e}"
            )
        if not self.loss <= max(self.tolerance, TOLERANCE):
            return f"the losses differ by {self.loss:.2e}"
        if self.greedy < self.greedy_total and not self.tie:
            return f"greedy token {self.greedy + 1} of {self.greedy_total} differs"
        return None

    def __str__(self) -> str:
        tokens = f"{self.greedy} of {self.greedy_total} greedy tokens equal" + (" (then a tie)" if self.tie else "")
        return (
            f"largest difference {self.largest:.1e} of the largest logit (tolerance {self.tolerance:.0e}); loss "
            f"{self.loss:.1e}; {tokens}"
        )


def prove(
    model: nn.Module,
    tokenizer: Tokenizer,
    folder: Path,
    measure: Measure | None = None,
    dtype: str = "float32",
    texts: Sequence[str] = (),
    code: Sequence[str] = (),
    tolerance: float | None = None,
) -> tuple[Proof, list[list[int]]]:
    """Compare a model of ours with the one in ``folder``, which is loaded in a process of its own, or by ``measure``.

    ``dtype``: the type in which theirs computes; ours computes in float32. ``tolerance``: of the largest logit; None:
    the usual one of that type. Also returns the ids that the tokenizer in ``folder`` gives to ``texts``. Raises
    ValueError if the folder can't be loaded."""
    probes = _probes(tokenizer, cast(Model, model).max_len)
    longest = max(ids.shape[1] for ids in probes.values())
    about = {
        "vocab_size": tokenizer.vocab_size,
        "keep": max(1, min(longest, LARGEST // tokenizer.vocab_size)),
        "dtype": dtype,
        "greedy": min(GREEDY, cast(Model, model).max_len - probes["prompt"].shape[1]),
        "texts": list(texts),
        "code": bool(code),
        "blocked": sorted({module.partition(".")[0] for module in code}),
    }
    theirs = (measure or measure_fresh)(folder, probes, about)
    ours = _measure_ours(model, probes, about)
    if missing := ours.keys() - theirs.keys() - {"continued"}:
        raise ValueError(f"{folder.name} gives no results for {', '.join(sorted(missing))}")
    tolerance = tolerance or HALF_TOLERANCE.get(dtype, TOLERANCE)
    differences = {name: _difference(ours[name], theirs[name]) for name in ours if "." in name}
    greedy, tie = _compare_greedy(ours, theirs, tolerance)
    proof = Proof(
        differences,
        tolerance,
        float((ours["loss"] - theirs["loss"]).abs() / ours["loss"]),
        greedy,
        len(ours["greedy"]),
        tie,
    )
    return proof, [theirs[f"ids.{number}"].tolist() for number in range(len(texts))]


def measure_fresh(
    folder: Path,
    probes: Mapping[str, Tensor],
    about: Mapping[str, Any],
    script: str = fresh.__file__,
    reader: str = "transformers",
) -> dict[str, Tensor]:
    """``fresh.measure`` in a new process, which imports nothing of ours. ``script``: another one with the same results,
    and ``reader``, what it loads the folder or file with."""
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "probes.safetensors", Path(name) / "results.safetensors"
        safetensors.torch.save_file(dict(probes), source, {"about": json.dumps(about)})
        command = [sys.executable, "-P", script, str(folder.resolve()), str(source), str(target)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise ValueError(f"{reader} can't load {folder}: {lines[-1]}")
        return safetensors.torch.load_file(target)


def measure_here(folder: Path, probes: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Tensor]:
    """``fresh.measure`` in this process."""
    return fresh.measure(str(folder), probes, about)


def _probes(tokenizer: Tokenizer, max_len: int) -> dict[str, Tensor]:
    """Ids by name: random and real text of 1, 2, an odd number, and all positions of the context, (B, T) int64."""
    generator = torch.Generator().manual_seed(0)
    real = [tokenizer.eot, *(int(i) for i in tokenizer.encode(TEXT))]
    real_text = torch.tensor(real * (1 + max_len // len(real)))[None]
    odd = max(1, (max_len // 2 - 1) | 1)
    lengths = {f"{length} tokens": length for length in (1, 2, odd, max_len) if length <= max_len}
    probes = {}
    for name, length in lengths.items():
        rows = 2 if length < max_len else 1
        probes[f"random, {name}"] = torch.randint(tokenizer.vocab_size, (rows, length), generator=generator)
        probes[f"text, {name}"] = real_text[:, :length].clone()
    probes["loss"] = torch.randint(tokenizer.vocab_size, (2, max(2, odd)), generator=generator)
    probes["prompt"] = real_text[:, : max(1, min(8, max_len // 4))].clone()
    return probes


@torch.no_grad()
def _measure_ours(model: nn.Module, probes: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Tensor]:
    """What ``fresh.measure`` returns, for a model of ours: in float32 on its device."""
    device = next(model.parameters()).device
    results, keep = {}, about["keep"]
    for name, ids in probes.items():
        hidden, head = model(ids.to(device))
        results[f"plain.{name}"] = head.logits(hidden[:, -keep:]).float().cpu()
        if name == "loss":
            logits = head.logits(hidden[:, :-1]).float().flatten(0, 1)
            results["loss"] = F.cross_entropy(logits, ids[:, 1:].flatten().to(device)).cpu()
        cached = _cached(model, ids.to(device), keep)
        if cached is not None:
            results[f"cached.{name}"] = cached.cpu()
    prompt = probes["prompt"][0].tolist()
    tokens = stream(model, prompt, about["greedy"], temperature=0.0)
    results["greedy"] = torch.tensor([int(token.item()) for token in tokens], dtype=torch.int64)
    hidden, head = model(torch.tensor([*prompt, *results["greedy"].tolist()], device=device)[None])
    results["continued"] = head.logits(hidden[0, len(prompt) - 1 : -1]).float().cpu()
    return results


def _cached(model: nn.Module, ids: Tensor, keep: int) -> Tensor | None:
    """The logits of the last positions, read in pieces with the cache, (B, T', V); None without a cache."""
    init_cache = getattr(model, "init_cache", None)
    caches = init_cache(len(ids)) if init_cache else None
    if caches is None:
        return None
    start, logits = 0, []
    for piece in ids.split(fresh.pieces(ids.shape[1]), dim=1):
        end = start + piece.shape[1]
        hidden, head = model(piece, Context(cache=caches, start=torch.tensor(start, device=ids.device), end=end))
        logits.append(head.logits(hidden[:, -keep:]).float())
        start = end
    return torch.cat(logits, dim=1)[:, -keep:]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    if ours.shape != theirs.shape:
        raise ValueError(f"logits have the shape {tuple(theirs.shape)}, but {tuple(ours.shape)} in our model")
    return float((ours - theirs).abs().max() / ours.abs().max())


def _compare_greedy(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> tuple[int, bool]:
    """(number of equal tokens from the first on, whether the next ones are a tie within the tolerance)."""
    mine, other = ours["greedy"].tolist(), theirs["greedy"].tolist()
    equal = next((i for i, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), len(mine))
    if equal == len(mine):
        return equal, False
    logits = ours["continued"][equal]
    gap = float((logits[mine[equal]] - logits[other[equal]]).abs())
    return equal, gap <= 2 * tolerance * float(logits.abs().max())
