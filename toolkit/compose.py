"""Composes a checked config from files and bindings, and opens a trained run: its config, tokenizer and model."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkit.config import keys, safety
from toolkit.config.additions import Addition, add_evaluator
from toolkit.config.guard import resolve
from toolkit.config.imports import load_entry_points, load_file, load_module, own_file, reload_changed
from toolkit.config.layers import BASE, Config, ConfigError, Import, check_statements, parse_bindings, parse_file
from toolkit.evaluation import evaluators
from toolkit.experiment import Experiment, Parts, build_blank, build_list
from toolkit.output.errors import clean
from toolkit.probing import prober
from toolkit.protocols import Tokenizer
from toolkit.registry import CATALOG
from toolkit.store import checkpoint, factsfile, seal

log = logging.getLogger("toolkit")


def compose(
    overlays: Sequence[str] = (),
    bindings: Sequence[str] = (),
    base: str | Path = BASE,
    imports: Sequence[str] = (),
    code: bool = True,
    evaluators: Sequence[Addition] = (),
) -> tuple[Config, list[Path]]:
    """Load all parts, combine the gin files and bindings (each overrides those before it), and check the result.
    Returns the config and the Python files that a run copies into its folder: every imported module that is a single
    file and not part of an installed package.

    All gin files are parsed before any module that they import is loaded. With ``code=False``, the files in the code/
    folder of a run are refused. ``evaluators`` are added to those of the config. Raises ConfigError."""
    layers = [parse_file(base), *map(parse_file, overlays)]
    if bindings or evaluators:
        layers.append(parse_bindings(bindings))
    check_statements(layers)
    names = load_shelf(imports)
    for folder in dict.fromkeys(layer.run for layer in layers if layer.run):
        add_code(folder)
    safety.load(layers, names, code)
    layers[-1].imports.extend(Import(name, f"--import {name}") for name in names)
    for addition in evaluators:
        add_evaluator(layers, addition)
    config = resolve(layers)
    return config, [file for file in map(own_file, config.imports) if file]


def listed(argument: str, given: str | Path | Iterable[str | Path]) -> list[str]:
    """A list of texts from what a caller in Python gives: one text or path, or several. Raises ValueError for anything
    else, such as a dict, of which only the keys would count. ``argument`` is the argument's name."""
    texts: list[object] = [given]
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping):
        texts = list(given)
    for each in texts:
        if not isinstance(each, str | Path):
            example = '"GPT.n_layer = 6"' if argument == "bindings" else '"my/file"'
            raise ValueError(f"{argument}: {each!r} is no text; give a text such as {example}, or a list of texts")
    return [str(each) for each in texts]


def folder_of(argument: str, given: str | Path) -> Path:
    """The path that a caller in Python gives. Raises ValueError for anything but a text or a path."""
    if not isinstance(given, str | Path):
        hint = f", such as {argument}.path" if "path" in dir(given) else ""
        raise ValueError(f"{argument}: a {type(given).__name__} is no path; give a text or a pathlib.Path{hint}")
    return Path(given)


def device_of(name: str | None) -> torch.device:
    """The device with a name such as "cpu" or "cuda"; None: a GPU if there is one. Raises ValueError if this machine
    has no such device."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # PyTorch without CUDA raises AssertionError
        reason = clean(error).partition("\n")[0]
        raise ValueError(f'device = {name!r} can\'t be used here ({reason}); use "cpu", or leave it out') from error
    return device


def load_shelf(imports: Sequence[str] = ()) -> list[str]:
    """Register the parts in components/ (the shelf), in installed packages, and in the modules or files ``imports``.
    Returns the module names of ``imports``. Raises ConfigError."""
    import components  # noqa: F401  registers its parts; no other file in toolkit/ imports it
    import toolkit.model  # noqa: F401

    for failure in load_entry_points():
        log.warning("%s; its parts are left out", failure)
    names = []
    try:
        reload_changed()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for name in imports:
        try:
            if name.endswith(".py"):
                names.append(load_file(name))
            else:
                load_module(name)
                names.append(name)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return names


def try_build(config: Config) -> tuple[Experiment, Parts]:
    """Build the experiment, its evaluators, its probes, and its other parts, on the meta device if possible, to find
    errors before anything is read or written. Raises ConfigError, with the file and line of each binding that the error
    is about."""
    try:
        experiment = config.build()
        parts = build_blank(experiment)
        parts.evaluators = build_list(config, "evaluators", experiment.evaluators)
        parts.final_evaluators = build_list(config, "final_evaluators", experiment.final_evaluators)
        evaluators.check_context(parts.evaluators | parts.final_evaluators, experiment.seq_len)
        parts.probes = build_list(config, "probes", experiment.probes)
        prober.check(parts)
        return experiment, parts
    except ValueError as error:
        places = _places_of_bindings(config, error)
        if not places:
            raise
        bindings = ", ".join(f"{key} is at {place}" for key, place in places.items())
        raise ConfigError(f"{clean(error)} ({bindings})").with_traceback(error.__traceback__) from error


def _places_of_bindings(config: Config, error: ValueError) -> dict[str, str]:
    """Return {key: file and line} of the bindings that an error is about.

    If the message contains whole keys (GPT.dim), these are returned. Otherwise these are returned: the knobs of the
    part that raised the error, if the message mentions them, and the slots that hold this part."""
    words = set(re.findall(r"(?:\w+/)*\w+(?:\.\w+)?", clean(error)))
    named = {key: place for key, place in config.places.items() if {key, keys.without_scope(key)} & words}
    if named:
        return named
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for cls in type(frame.f_locals.get("self")).__mro__:
            entry = CATALOG.get(cls.__name__)
            if entry and entry.cls is cls:
                related_keys = [*config.knobs_of(entry.name, words), *config.holding(entry.name)]
                return {key: config.places[key] for key in related_keys if key in config.places}
    return {}


@dataclass
class Run:
    """An opened run, with its trained model on ``device`` in evaluation mode."""

    config: Config
    experiment: Experiment
    tokenizer: Tokenizer
    model: torch.nn.Module
    checkpoint: Path
    device: torch.device


def open_run(
    path: str | Path,
    overlays: Sequence[str] = (),
    bindings: Sequence[str] = (),
    device: str | None = None,
    imports: Sequence[str] = (),
    code: bool = True,
    evaluators: Sequence[Addition] = (),
) -> Run:
    """Open a run, or one of its checkpoints, with the config and the code in the run's folder.

    ``imports`` names further modules or files that the caller trusts. With ``code=False``, the files in the run's code/
    folder are refused. ``evaluators`` are added to those of the config. Raises ValueError, also if a file of the run
    was changed after the run wrote it."""
    target = device_of(device)
    folder, checkpoint_folder = checkpoint.find(path)
    config, _ = compose(overlays, bindings, folder / "config.gin", imports, code, evaluators)
    experiment = config.build()
    tokenizer = experiment.tokenizer()
    _load_tokenizer(tokenizer, folder)
    torch.manual_seed(experiment.seed)
    model = experiment.model(tokenizer.vocab_size, experiment.seq_len)
    checkpoint.load_weights(checkpoint_folder, model)
    return Run(config, experiment, tokenizer, model.to(target).eval(), checkpoint_folder, target)


def _load_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Load the tokenizer from a run's folder. Raises ValueError if the files differ from those that the run wrote."""
    facts = factsfile.read(folder)
    files, fingerprint = facts.get("tokenizer_files"), facts.get("tokenizer")
    remedy = f"copy it from a backup, or from another run with the tokenizer {str(fingerprint)[:12]} in its facts.json"
    if files:
        if problem := seal.compare(folder / "tokenizer", files):
            raise ValueError(f"{problem}; {remedy}")
        tokenizer.load(folder / "tokenizer")
        return
    try:  # the run is of an older version of the toolkit, and its facts.json has no digests of these files
        tokenizer.load(folder / "tokenizer")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / 'tokenizer'} can't be loaded ({reason}); {remedy}") from error
    if fingerprint is not None and tokenizer.fingerprint() != fingerprint:
        raise ValueError(f"{folder / 'tokenizer'} is not what was written; {remedy}")


def add_code(folder: Path) -> None:
    """Append a run's code/ folder, which holds copies of the user's parts, to the import path."""
    code = str((folder / "code").resolve())
    if Path(code).is_dir() and code not in sys.path:
        sys.path.append(code)
