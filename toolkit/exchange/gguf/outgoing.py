"""Write a trained model as a GGUF file, and keep it only if it computes the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.compose import Run
from toolkit.exchange import library, tensors, tokens
from toolkit.exchange.choice import choose
from toolkit.exchange.describe import describe
from toolkit.exchange.gguf import models, package, proof, vocab
from toolkit.store import sealed

SUFFIX = ".gguf"
FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}


@dataclass(frozen=True)
class Exported:
    """What was written: the file, the architecture's name in GGUF, and what it was compared with."""

    file: Path
    name: str
    proofs: list[str]


def export(run: Run, file: Path, dtype: str = "float32", tokenizer: bool = True, only: str | None = None) -> Exported:
    """Write the model of an opened run into ``file``, which must not exist.

    ``dtype``: the type of the matrices; vectors are always float32. ``tokenizer`` False leaves out the tokenizer.
    ``only``: the architecture of transformers to write, None: the first that the model is. Raises ValueError, and
    writes nothing, if llama.cpp does not compute this architecture, if it can't give the tokenizer's ids, or if the
    file does not compute the same. The run's own model gets the rounded weights of a half type."""
    check_free(file)
    eot = run.tokenizer.eot
    architecture, config = choose(describe(run), {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": None}, only)
    if lines := models.refusals(config):
        shown = "".join(f"\n  {line}" for line in lines)
        raise ValueError(f"llama.cpp does not compute this {config.model_type}:{shown}")
    entries = models.keys(config) | (vocab.keys(run.tokenizer) if tokenizer else vocab.no_keys())
    temporary = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    file.parent.mkdir(parents=True, exist_ok=True)
    sealed.sweep(file.parent, file.name)
    try:
        temporary.mkdir()
        written = temporary / file.name
        theirs = _round(run, architecture.rules(config), config, dtype)
        write(
            written, models.COVERED[config.model_type].name, entries, models.to_gguf(config, theirs), dtype, file.stem
        )
        texts: Sequence[str] = tokens.fuzzed() if tokenizer else ()
        proofs = proof.prove(run, written, temporary / "back", config, theirs, texts, dtype)
        if os.path.lexists(file):
            raise ValueError(f"--out {file} exists now; it was not replaced")
        written.rename(file)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(file, models.COVERED[config.model_type].name, proofs)


def check_free(file: Path) -> None:
    """Raise ValueError if a file exists, can't be a new one, or is not named as such files are."""
    if file.suffix != SUFFIX:
        raise ValueError(f"--out {file} must be the name of a new file that ends with {SUFFIX}, as model{SUFFIX}")
    if os.path.lexists(file):
        raise ValueError(f"--out {file} already exists; choose another name, or delete it first")
    parent = next(each for each in file.absolute().parents if os.path.lexists(each))
    if not parent.is_dir():
        raise ValueError(f"--out {file} lies in {parent}, which is no folder; choose another folder")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--out {file}: {parent} can't be written; choose another folder")


def write(
    file: Path, name: str, entries: Mapping[str, Any], values: Mapping[str, Tensor], dtype: str, title: str
) -> None:
    """Write a file of the architecture ``name`` with these keys and tensors. ``title``: the model's own name."""
    gguf = package.require()
    writer = gguf.GGUFWriter(file, name)
    writer.add_name(title)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    for key, value in entries.items():
        _add(writer, key, value)
    half = {"float16": gguf.GGMLQuantizationType.F16, "bfloat16": gguf.GGMLQuantizationType.BF16}.get(dtype)
    for key, tensor in values.items():
        kind = half if half is not None and models.is_half(key, tensor) else gguf.GGMLQuantizationType.F32
        writer.add_tensor(key, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a key of the type that llama.cpp expects of its value."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _round(run: Run, rules: list[Any], config: Any, dtype: str) -> dict[str, Tensor]:
    """The tensors of transformers, in float32. With a half type, they and the run's own model get the rounded values,
    so that the proof compares like with like."""
    theirs_shapes = {name: tuple(t.shape) for name, t in library.tensors_of(library.empty_model(config)).items()}
    ours = {name: tensor.cpu().float() for name, tensor in run.model.state_dict().items()}
    theirs = tensors.move(rules, ours, "theirs", theirs_shapes)
    if dtype != "float32":
        theirs = models.rounded(config, theirs, dtype)
        back = tensors.move(rules, theirs, "ours", {name: tuple(tensor.shape) for name, tensor in ours.items()})
        run.model.load_state_dict(back)
    if bad := [name for name, tensor in theirs.items() if not bool(torch.isfinite(tensor).all())]:
        raise ValueError(f"{bad[0]} has values that {dtype} can't hold; write another --dtype")
    return theirs
