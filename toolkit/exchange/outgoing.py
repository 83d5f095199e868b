"""Write a trained model as a folder of the transformers library, and keep it only if it computes the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolkit.compose import Run
from toolkit.exchange import card, library, proof, remotecode, tensors, tokens
from toolkit.exchange.choice import choose
from toolkit.exchange.describe import describe
from toolkit.exchange.proof import Measure, Proof
from toolkit.store import disk, sealed

SHARD = "5GB"  # larger models are divided into files of this size


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, the tier, the architecture's name in transformers, and the proofs.

    ``proofs``: the weights as written, computed in float32, and for a half type also computed in that type.
    ``packages``: what else must be installed where the model is loaded. ``reason``: why the tier is not native."""

    folder: Path
    tier: str
    model_type: str
    proofs: dict[str, Proof]
    packages: Sequence[str] = ()
    reason: str = ""


def export(
    run: Run,
    folder: Path,
    dtype: str = "float32",
    tokenizer: bool = True,
    only: str | None = None,
    measure: Measure | None = None,
    tier: str | None = "native",
) -> Exported:
    """Write the model of an opened run into ``folder``, which must not exist or be empty.

    ``dtype``: the type of the weights. ``tokenizer`` False leaves out the tokenizer files. ``only``: the name
    of the architecture to write; None: the first that the model is. ``measure`` replaces the process in which
    transformers loads the files. ``tier``: "native" for an architecture of transformers, "code" for the source of the
    parts beside the weights, None for the first of these that is possible. Raises ValueError, and writes nothing, if
    the model can't be written in this tier, if the tokenizer can't be written, or if transformers computes something
    else."""
    check_free(folder)
    eot = run.tokenizer.eot
    entries = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": None}
    chosen, reason = None, ""
    if tier != "code":
        try:
            chosen = choose(describe(run), entries, only)
        except ValueError as error:
            if tier == "native" or only is not None:
                raise
            reason = str(error)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    sealed.sweep(folder.parent, folder.name)
    code: Sequence[str] = ()
    packages: Sequence[str] = ()
    try:
        temporary.mkdir()
        texts: Sequence[str] = ()
        if tokenizer:
            tokens.write(run.tokenizer, temporary, run.experiment.seq_len)
            texts = tokens.fuzzed()
        if chosen is not None:
            architecture, config = chosen
            model_type = config.model_type
            _write_model(run, architecture.rules(config), config, temporary, dtype)
        else:
            model_type = remotecode.MODEL_TYPE
            code, packages = remotecode.write_code(run, temporary)
            remotecode.write_model(run, temporary, dtype, entries, SHARD)
        proofs = _prove(run, temporary, dtype, texts, measure, code)
        text = card.write_card(run, model_type, dtype, proofs["float32"], folder.name, packages if code else None)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        disk.give_mode_of(temporary / "README.md", [path for path in temporary.rglob("*") if path.is_file()])
        if folder.exists():
            folder.rmdir()  # it is empty
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(folder, "native" if chosen else "code", model_type, proofs, packages, reason)


def check_free(folder: Path) -> None:
    """Raise ValueError if a folder has files, or can't be a new one."""
    if folder.name in ("", ".."):
        raise ValueError(f"--out {folder} is no name of a new folder; write for example --out {folder / 'exported'}")
    parent = next((each for each in folder.parents if os.path.lexists(each)), folder)
    if parent != folder and not parent.is_dir():
        raise ValueError(f"--out {folder} lies in {parent}, which is no folder; choose another folder")
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"--out {folder} already exists; choose another folder, or delete it first")


def _write_model(run: Run, rules: list[Any], config: Any, folder: Path, dtype: str) -> None:
    """Write config.json, the weights and generation_config.json. With a half type, the run's own model gets the rounded
    weights too, so that the proof compares like with like."""
    network = library.empty_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in library.tensors_of(network).items()}
    ours = {name: tensor.cpu() for name, tensor in run.model.state_dict().items()}
    theirs = tensors.move(rules, ours, "theirs", shapes)
    if dtype != "float32":
        theirs = {name: tensor.to(getattr(torch, dtype)) for name, tensor in theirs.items()}
        rounded = {name: tensor.float() for name, tensor in theirs.items()}
        back = tensors.move(rules, rounded, "ours", {name: tuple(tensor.shape) for name, tensor in ours.items()})
        run.model.load_state_dict(back)
    network.config.dtype = getattr(torch, dtype)
    library.fill(network, theirs)
    network.save_pretrained(folder, max_shard_size=SHARD)


def _prove(
    run: Run, folder: Path, dtype: str, texts: Sequence[str], measure: Measure | None, code: Sequence[str]
) -> dict[str, Proof]:
    """Compare the folder with the run's model. ``code``: the modules of which the folder has copies. Raises ValueError
    if they differ."""
    proofs = {}
    for computed in dict.fromkeys(("float32", dtype)):
        result, ids = proof.prove(run.model, run.tokenizer, folder, measure, computed, texts, code)
        if result.problem:
            raise ValueError(
                f"transformers does not compute what this model does, in {computed}: {result.problem}; nothing was "
                "written. Please report this with the run's config.gin"
            )
        if texts:
            tokens.check(run.tokenizer, texts, ids)
        proofs[computed], texts = result, ()
    return proofs
