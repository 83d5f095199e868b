"""From files and bindings to a checked config, and from a run's folder to its tokenizer and model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkit import checkpoint
from toolkit.config import BASE, Config, ConfigError, read_bindings, read_file
from toolkit.guard import resolve
from toolkit.registry import load_entry_points, load_file, load_module
from toolkit.train import Experiment

log = logging.getLogger("toolkit")


def compose(
    overlays: Sequence[str] = (), bindings: Sequence[str] = (), base: str | Path = BASE, imports: Sequence[str] = ()
) -> tuple[Config, list[Path]]:
    """Load the shelf and what else is named, lay the files over each other, and check the result. Returns the config
    and the Python files of which a run keeps copies: those outside the import path, and those that the run whose config
    is the base has kept. Raises ConfigError."""
    names, files = load_shelf(imports)
    layers = [read_file(base), *map(read_file, overlays)]
    if bindings:
        layers.append(read_bindings(bindings))
    layers[-1].imports.extend(names)
    config = resolve(layers)
    kept = (Path(base).parent / "code").resolve()
    loaded = [Path(getattr(sys.modules[module], "__file__", None) or ".").resolve() for module in config.imports]
    return config, files + [file for file in loaded if file.parent == kept and file not in files]


def load_shelf(imports: Sequence[str] = ()) -> tuple[list[str], list[Path]]:
    """Register the shelf, what installed packages offer, and the modules or files in ``imports``. Returns the names of
    those modules, and the files among them that lie outside the import path. Raises ConfigError."""
    import components  # noqa: F401  the shelf registers itself; only here does the frame touch it
    import toolkit.model  # noqa: F401

    for failure in load_entry_points():
        log.warning("%s; its parts are left out", failure)
    names, files = [], []
    for name in imports:
        try:
            module, outside = load_file(name) if name.endswith(".py") else (name, load_module(name))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        names.append(module)
        files += [Path(name).resolve()] if outside else []
    return names, files


@dataclass
class Run:
    """A trained run, ready to use: the model in evaluation mode on ``device``."""

    config: Config
    experiment: Experiment
    tokenizer: object
    model: torch.nn.Module
    checkpoint: Path
    device: torch.device


def open_run(
    path: str | Path, overlays: Sequence[str] = (), bindings: Sequence[str] = (), device: str | None = None
) -> Run:
    """Open a run, or one of its checkpoints, with the config and code that it keeps. Raises ValueError."""
    folder, chosen = checkpoint.find(path)
    add_code(folder)
    config, _ = compose(overlays, bindings, base=folder / "config.gin")
    experiment = config.build()
    tokenizer = experiment.tokenizer()
    tokenizer.load(folder / "tokenizer")
    torch.manual_seed(experiment.seed)
    model = experiment.model(tokenizer.vocab_size, experiment.seq_len)
    checkpoint.load_weights(chosen, model)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Run(config, experiment, tokenizer, model.to(where).eval(), chosen, where)


def add_code(folder: Path) -> None:
    """Put a run's own copies of parts on the import path."""
    code = str((folder / "code").resolve())
    if Path(code).is_dir() and code not in sys.path:
        sys.path.append(code)
