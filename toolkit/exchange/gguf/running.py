"""Run a GGUF file with llama.cpp and measure it; run as a script, in a process that imports nothing of ours.

    python running.py FILE PROBES RESULTS

PROBES and RESULTS are safetensors files, as of fresh.py, whose results this gives too."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

GGML_TYPE_F32 = 0


def measure(file: str, probes: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Tensor]:
    """Logits and tokens of the model in a file, by the names of ``measure`` in fresh.py. The cache of keys and values
    holds float32."""
    from llama_cpp import Llama

    longest = max([ids.shape[1] for ids in probes.values()] + [probes["prompt"].shape[1] + about["greedy"]])
    llama = Llama(
        file,
        n_ctx=longest,
        n_batch=longest,
        n_ubatch=longest,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    results: dict[str, Tensor] = {}
    for name, ids in probes.items():
        results[f"plain.{name}"] = _logits(llama, ids, [ids.shape[1]], about)
        results[f"cached.{name}"] = _logits(llama, ids, _pieces(ids.shape[1]), about)
    logits = _logits(llama, probes["loss"], [probes["loss"].shape[1]], {**about, "keep": longest})
    results["loss"] = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), probes["loss"][:, 1:].flatten())
    results["greedy"] = torch.tensor(_greedy(llama, probes["prompt"][0].tolist(), about), dtype=torch.int64)
    for number, text in enumerate(about["texts"]):
        ids = llama.tokenize(text.encode(errors="replace"), add_bos=False, special=False)
        results[f"ids.{number}"] = torch.tensor(ids, dtype=torch.int64)
    return results


def _logits(llama: Any, ids: Tensor, pieces: list[int], about: Mapping[str, Any]) -> Tensor:
    """(B, T) -> the logits of the last positions, (B, T', V), read in pieces of these lengths."""
    rows = []
    for row in ids:
        llama.reset()
        for piece in row.split(pieces):
            llama.eval(piece.tolist())
        rows.append(torch.tensor(llama.scores[: len(row)]).clone()[-about["keep"] :, : about["vocab_size"]])
    return torch.stack(rows)


def _pieces(length: int) -> list[int]:
    """The first half, three tokens one by one, and the rest."""
    first = max(1, length // 2)
    single = min(3, length - first)
    return [piece for piece in (first, *[1] * single, length - first - single) if piece]


def _greedy(llama: Any, prompt: list[int], about: Mapping[str, Any]) -> list[int]:
    """The likeliest tokens after a prompt, one by one."""
    llama.reset()
    llama.eval(prompt)
    tokens: list[int] = []
    while len(tokens) < about["greedy"]:
        tokens.append(int(llama.scores[llama.n_tokens - 1, : about["vocab_size"]].argmax()))
        llama.eval(tokens[-1:])
    return tokens


def main() -> None:
    """Read the command line, measure, and write the results."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    file, source, target = sys.argv[1:]
    with safe_open(source, "pt") as opened:
        about = json.loads((opened.metadata() or {})["about"])
        probes = {name: opened.get_tensor(name) for name in opened.keys()}
    save_file({name: value.contiguous() for name, value in measure(file, probes, about).items()}, target)


if __name__ == "__main__":
    main()
