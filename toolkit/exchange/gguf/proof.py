"""Prove that a GGUF file computes what our model computes: with transformers, and with llama.cpp if it is here."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from toolkit.compose import Run
from toolkit.exchange import proof, tokens
from toolkit.exchange.gguf import back, models, package, running

# Shares of the largest logit, 3 to 40 times what small random models showed. llama.cpp rounds activations to the type
# of the matrix that they meet, and reads GELU from a table in float16.
LLAMA_CPP_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
GELU_TOLERANCE = 5e-3
NOT_IN_FILE = ("hidden_act", "hidden_activation", "activation_function")  # one for each architecture of GGUF
SINGLE = 1e-6  # relative: the keys of a file are float32, and gemma's gains are stored plus 1


def prove(
    run: Run, file: Path, folder: Path, config: Any, theirs: Mapping[str, Tensor], texts: Sequence[str], dtype: str
) -> list[str]:
    """Compare a file with the run's model, and say in lines what was compared.

    ``folder``: a new one, for what transformers reads from the file. ``config`` and ``theirs``: the model as it must
    come back. ``texts``: those to which the file's tokenizer must give the ids of ours. Raises ValueError if anything
    differs."""
    count = compare_contents(read_back(file, folder), folder, config, theirs)
    lines = [f"read by transformers in a new process: {count}; {_compare(run, folder, ())}"]
    if texts:
        tokens.check(run.tokenizer, texts, ids_of(folder / "tokenizer.json", texts))
        lines.append(f"its tokenizer gives the ids of ours to {len(texts)} texts")
    if package.has_llama_cpp():
        lines.append(f"computed by llama.cpp: {compare_with_llama_cpp(run, file, config, dtype, texts)}")
    else:
        lines.append("not compared with llama.cpp (llama-cpp-python is not installed)")
    return lines


def compare_with_llama_cpp(run: Run, file: Path, config: Any, dtype: str, texts: Sequence[str]) -> proof.Proof:
    """Compare a file with the run's model and tokenizer, as llama.cpp computes it in a new process. Raises ValueError
    if they differ."""
    measure = functools.partial(proof.measure_fresh, script=running.__file__, reader="llama.cpp")
    tolerance = LLAMA_CPP_TOLERANCE[dtype]
    if models.has_gelu(config):
        tolerance = max(tolerance, GELU_TOLERANCE)
    return _compare(run, file, texts, measure, tolerance)


def read_back(file: Path, folder: Path) -> dict[str, Any]:
    """Make a folder of transformers from a file, in a new process, and return the entries of its config that were
    read from keys. Raises ValueError if that fails."""
    folder.mkdir()
    command = [sys.executable, "-P", back.__file__, str(file.resolve()), str(folder.resolve())]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False
    )
    if done.returncode:
        raise ValueError(f"{file.name} can't be read back: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    entries: dict[str, Any] = json.loads((folder / "read.json").read_text(encoding="utf-8"))
    return entries


def compare_contents(entries: Mapping[str, Any], folder: Path, config: Any, theirs: Mapping[str, Tensor]) -> str:
    """Compare the entries that were read from keys, and the tensors in a folder, with those that were written. Raises
    ValueError for the first that differs."""
    for name, value in entries.items():
        wanted = getattr(config, name, None)
        if name in NOT_IN_FILE or (name == "tie_word_embeddings" and config.model_type == "stablelm"):
            continue  # the latter's table is written twice
        if name in ("attention_bias", "mlp_bias") and wanted is None:
            wanted = False  # of a mistral, which has no such entry
        if not _same(value, wanted):
            raise ValueError(f"the file's keys say {name} = {value}, but the model has {wanted}")
    read = load_file(folder / "model.safetensors")
    for name, tensor in theirs.items():
        if name not in read or read[name].shape != tensor.shape:
            raise ValueError(f"the file has no {name} of the shape {tuple(tensor.shape)}")
        exact = not (config.model_type == "gemma2" and name.endswith("norm.weight"))
        same = torch.equal(read[name], tensor) if exact else torch.allclose(read[name], tensor, SINGLE, SINGLE)
        if not same:
            raise ValueError(f"the file's {name} has other values than the model")
    return f"{len(entries)} entries and {len(theirs)} tensors are equal"


def ids_of(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, as what was read back divides and merges them."""
    from tokenizers import Tokenizer

    return [each.ids for each in Tokenizer.from_file(str(path)).encode_batch(list(texts), add_special_tokens=False)]


def _same(value: Any, wanted: Any) -> bool:
    """Whether a value read from a file is the one that was written, but for its rounding to float32."""
    if isinstance(wanted, Mapping):
        usual = {"partial_rotary_factor": 1.0}
        return all(_same(each, wanted.get(name, usual.get(name))) for name, each in value.items())
    if isinstance(value, float) and isinstance(wanted, int | float):
        return math.isclose(value, wanted, rel_tol=SINGLE)
    return bool(value == wanted)


def _compare(
    run: Run,
    source: Path,
    texts: Sequence[str],
    measure: proof.Measure | None = None,
    tolerance: float | None = None,
) -> proof.Proof:
    """Compare a folder or file with the run's model. Raises ValueError if they differ."""
    result, ids = proof.prove(run.model, run.tokenizer, source, measure, texts=texts, tolerance=tolerance)
    if result.problem:
        reader = "transformers" if measure is None else "llama.cpp"
        raise ValueError(
            f"{reader} does not compute what this model does: {result.problem}; nothing was written. Please report "
            "this with the run's config.gin"
        )
    if texts:
        tokens.check(run.tokenizer, texts, ids)
    return result
