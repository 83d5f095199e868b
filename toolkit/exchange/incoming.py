"""Make a run of a model of the transformers library, and keep it only if it computes the same."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.architectures import ARCHITECTURES, Architecture, Layout
from toolkit.compose import compose, load_shelf, open_run, try_build
from toolkit.config.layers import show
from toolkit.exchange import library, nearest, proof, tensors, tokens, weightfiles
from toolkit.exchange.bindings import bindings_of
from toolkit.exchange.proof import Measure, Proof
from toolkit.experiment import Experiment
from toolkit.protocols import Tokenizer
from toolkit.registry import CATALOG
from toolkit.rundir import facts
from toolkit.rundir.folder import RunDir
from toolkit.store import checkpoint, sealed
from toolkit.store.factsfile import Facts

log = logging.getLogger("toolkit")
SIZES = (  # entries of a config, or the names under which transformers also gives them
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
LONGEST = 2**20  # tokens of a context: the proof reads one as long as the context


@dataclass(frozen=True)
class Imported:
    """What was made: the run's folder, the architecture's name in transformers, and the proof."""

    folder: Path
    model_type: str
    proof: Proof


@dataclass(frozen=True)
class Source:
    """A model of transformers that comes in: its folder, config, architecture, layout and tensors."""

    folder: Path
    config: Any
    architecture: Architecture
    layout: Layout
    tensors: dict[str, Tensor]


def bring_in(
    source: str,
    runs: Path,
    name: str,
    seq_len: int | None = None,
    pickle: bool = False,
    imports: Sequence[str] = (),
    measure: Measure | None = None,
) -> Imported:
    """Make the run ``runs``/``name`` of a folder, or of a model on the Hub.

    ``seq_len``: the run's context in tokens; None: that of the model. ``pickle``: accept pickled weights. ``imports``:
    modules or files that register parts or architectures. ``measure`` replaces the process in which transformers loads
    the source. Code in the source is never run. Raises ValueError, and leaves no run, if the source is no model that
    our parts compute, or if the run computes something else."""
    load_shelf(imports)
    folder = runs / name
    _check_free(folder)
    RunDir(runs, name, resume=False)  # checks the name
    model_source = read(fetch(source, pickle), pickle)
    file = tokens.source_file(model_source.folder)
    final = _bindings(model_source, file, folder / "tokenizer" / "tokenizer.json", seq_len)
    # Until it is proven, the run is in a hidden folder: a process that is killed leaves no run under the name.
    hidden = runs / f".{name}.tmp-{os.getpid()}"
    sealed.sweep(runs, f".{name}")
    try:
        run = RunDir(hidden, name, resume=False)
        _write(run, model_source, file, final, source, imports)
        opened = open_run(run.path, device="cpu", imports=imports)
        texts = tokens.fuzzed()
        result, ids = proof.prove(opened.model, opened.tokenizer, model_source.folder, measure, texts=texts)
        if result.problem:
            raise ValueError(
                f"the run does not compute what transformers does: {result.problem}; the run was deleted. Please "
                f"report this with {model_source.folder / 'config.json'}"
            )
        tokens.check_source(opened.tokenizer, texts, ids)
        _check_free(folder)  # another process may have begun a run of this name
        run.path.rename(folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return Imported(folder, model_source.config.model_type, result)


def _check_free(folder: Path) -> None:
    """Raise ValueError if the folder of a run exists."""
    if folder.exists():
        raise ValueError(f"{folder} already exists; choose another --name")


def fetch(source: str, pickle: bool) -> Path:
    """The folder of a model: ``source`` itself, or a copy of a model on the Hub. Raises ValueError."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        raise ValueError(f"{source} is no folder, and no name of a model on the Hub (OWNER/NAME)")
    import huggingface_hub

    patterns = ["*.json", *weightfiles.SAFETENSORS, *(weightfiles.PICKLES if pickle else ())]  # no Python files
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # its errors have many classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{source} is no folder, and the Hub can't send it: {reason}") from error


def read(folder: Path, pickle: bool) -> Source:
    """Read a folder of transformers: config and tensors, in float32. Raises ValueError."""
    entries = library.read_json(folder / "config.json")
    model_type = entries.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise ValueError(f"{folder / 'config.json'}: model_type is {model_type!r}, but must be a string")
    if model_type not in ARCHITECTURES:
        raise ValueError(nearest.explain(model_type, entries))
    architecture = ARCHITECTURES[model_type]
    weightfiles.check_names(folder)
    limits = weightfiles.counts(folder, pickle)
    _check_sizes(folder, model_type, entries, limits)
    config = library.make_config(model_type, entries)
    for size in SIZES:
        value = getattr(config, size, None)
        if value is not None and not (isinstance(value, int) and value > 0):
            raise ValueError(f"{folder / 'config.json'}: {size} is {value!r}, but must be a whole number above 0")
    _check_parameters(folder, config, limits)
    try:
        layout = architecture.layout(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} can't be expressed in our parts:\n{error}") from error
    rules = architecture.rules(config)
    try:
        own = {name: tuple(t.shape) for name, t in library.tensors_of(library.empty_model(config)).items()}
    except Exception as error:  # the library has no common class of errors
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ValueError(f"transformers can't build the model of {folder / 'config.json'}: {reason}") from error
    theirs = _load(folder, config, pickle)
    try:
        tensors.check_names(rules, "ours", theirs, dict.fromkeys(tensors.names_of(rules, "ours"), ()))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    assert own.keys() == theirs.keys(), "the library's own model has other tensors than the loaded one"
    return Source(folder, config, architecture, layout, theirs)


def _check_sizes(folder: Path, model_type: str, entries: Mapping[str, Any], limits: weightfiles.Counts) -> None:
    """Raise ValueError if a size in a config is larger than the tensors in the folder allow. Call this before the
    config is made: transformers makes lists with an entry for each layer."""
    for size in SIZES:
        limit, unit = limits.numbers, "numbers"
        if size == "num_hidden_layers":
            limit, unit = limits.tensors, "tensors"
        for name in library.entry_names(model_type, size) if size != "max_position_embeddings" else ():
            value = entries.get(name)
            if isinstance(value, int | float) and value > limit:
                raise ValueError(
                    f"{folder / 'config.json'}: {name} is {value}, but the weights in the folder have {limit:,} {unit}"
                )


def _check_parameters(folder: Path, config: Any, limits: weightfiles.Counts) -> None:
    """Raise ValueError if a config describes a model of more than twice the numbers in the weights. Some may be
    missing, which ``_load`` reports by name."""
    try:
        count = sum(tensor.numel() for tensor in library.tensors_of(library.empty_model(config)).values())
    except Exception as error:  # the library has no common class of errors
        log.debug("%s can't be built yet: %s", folder, error)  # ``read`` reports it after the layout, which says more
        return
    if count > 2 * limits.numbers:
        raise ValueError(
            f"{folder / 'config.json'} describes a model of {count:,} numbers, but the weights in the folder have "
            f"{limits.numbers:,}"
        )


def _load(folder: Path, config: Any, pickle: bool) -> dict[str, Tensor]:
    """The tensors of a folder in float32, by the names of a model in memory. The library's own class reads them; code
    in the folder is not run. Raises ValueError for weights that are missing, surplus or of another shape."""
    has_safetensors = any(folder.glob("*.safetensors"))
    try:
        network, loading = library.model_class(config).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=has_safetensors,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named below
        )
    except Exception as error:  # the library has no common class of errors
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ValueError(f"{folder}: transformers can't load the weights: {reason}") from error
    problems = {
        "is missing": loading["missing_keys"],
        "is surplus": loading["unexpected_keys"],
        "has another shape": loading["mismatched_keys"],
    }
    lines = []
    for problem, names in problems.items():
        shown = sorted(name if isinstance(name, str) else str(name[0]) for name in names)
        lines += [f"{name} {problem}" for name in shown[: tensors.SHOWN]]
        lines += [f"{len(shown) - tensors.SHOWN} more" for _ in shown[tensors.SHOWN : tensors.SHOWN + 1]]
    if lines:
        raise ValueError(f"the weights in {folder} are not those of its config.json: {'; '.join(lines)}")
    return library.tensors_of(network)


def _bindings(source: Source, file: Path, copy: Path, seq_len: int | None) -> dict[str, list[str]]:
    """The bindings of the run: "final" as the run's config has them, "first" with the tokenizer of the source."""
    part = next((e for e in CATALOG.values() if getattr(e.cls, "reads_tokenizer_json", False)), None)
    if part is None:
        raise ValueError("no tokenizer part reads a tokenizer.json")
    ends = source.config.eos_token_id
    end = tokens.name_of(file, ends[0] if isinstance(ends, list) and ends else ends)
    max_len = source.layout.sizes.max_len
    length = min(seq_len or max_len, max_len)
    if length > LONGEST:
        raise ValueError(
            f"a context of {length:,} tokens can't be compared with transformers, which reads all of it at once; give "
            f"--seq-len {LONGEST} or less"
        )
    common = [
        *bindings_of(source.layout),
        f"Experiment.seq_len = {length}",
        f"Experiment.tokenizer = @{part.name}",
        f"{part.name}.eot = {show(end)}",
    ]
    return {
        "first": [*common, f"{part.name}.path = {show(str(file))}"],
        "final": [*common, f"{part.name}.path = {show(str(copy))}"],
    }


def _write(
    run: RunDir, source: Source, file: Path, bindings: dict[str, list[str]], name: str, imports: Sequence[str]
) -> None:
    """Write the run's folder: config, tokenizer, facts, and the weights as the checkpoint of step 0."""
    first, _ = compose(bindings=bindings["first"], imports=imports)
    rows = source.layout.sizes.vocab_size
    tokenizer: Tokenizer = first.build().tokenizer()
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{file} has ids up to {tokenizer.vocab_size - 1}, but the model only has {rows} rows for them"
        )
    # The rows that no id of the tokenizer has are kept as padding, which gives no logits.
    padding = [f"GPT.pad_vocab_to = {rows}"] if tokenizer.vocab_size < rows else []
    config, code = compose(bindings=[*bindings["final"], *padding], imports=imports)
    try_build(compose(bindings=[*bindings["first"], *padding], imports=imports)[0])
    experiment: Experiment = config.build()
    torch.manual_seed(experiment.seed)
    model = experiment.model(tokenizer.vocab_size, experiment.seq_len)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(tensors.move(source.architecture.rules(source.config), source.tensors, "ours", shapes))
    with run.opened(config, allow_change=False):
        run.write_config(config, code)
        progress = {"step": 0, "best": float("inf"), "config": config.digest, "tokenizer": tokenizer.fingerprint()}
        checkpoint.save(run.path / "checkpoints" / "step-00000000", model, experiment.optimizer(model), progress)
        run.write_start(tokenizer, _facts(run, config, experiment, model, tokenizer, name), 0)
        run.write_status("stopped", 0)


def _facts(
    run: RunDir, config: Any, experiment: Experiment, model: nn.Module, tokenizer: Tokenizer, name: str
) -> Facts:
    """The facts that are known of a run that was not trained here."""
    return {
        "name": run.path.name,
        "steps": experiment.steps,
        "seed": experiment.seed,
        "tokens": experiment.steps * experiment.batch_size * experiment.seq_len,
        "parameters": facts.parameters(model),
        **facts.environment(torch.device("cpu")),
        "tokenizer": tokenizer.fingerprint(),
        "from": name,
        "config": config.flat,
        "config_sha256": config.digest,
        "started": run.opened_at,
    }
