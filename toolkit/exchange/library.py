"""What is needed of the transformers library: its configs and empty models by type."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OLDEST = 5  # the first major version with these names of tensors and entries of configs


def require() -> Any:
    """Import and return transformers. Raises ValueError, with the command that installs it, if it is missing or old."""
    install = 'python -m pip install "gpt-ablation-toolkit[hf]" or python -m pip install "transformers>=5" safetensors'
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"the package transformers is not installed; run {install}")
    import transformers

    if int(transformers.__version__.split(".")[0]) < OLDEST:
        raise ValueError(f"transformers {transformers.__version__} is too old; run {install}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def make_config(model_type: str, entries: dict[str, Any]) -> Any:
    """A config of a type. Raises ValueError for entries that transformers refuses."""
    transformers = require()
    try:
        return transformers.CONFIG_MAPPING[model_type](**entries)
    except Exception as error:  # its validation has exceptions of its own
        raise ValueError(f"transformers refuses the config of a {model_type}: {error}") from error


def entry_names(model_type: str, name: str) -> tuple[str, str]:
    """The names under which a config.json of a type may have the entry ``name``: as such, and as its type calls it."""
    return name, require().CONFIG_MAPPING[model_type].attribute_map.get(name, name)


def model_class(config: Any) -> Any:
    """The class of language models of a config: the library's own, never one that comes with the weights."""
    return require().MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def empty_model(config: Any) -> Any:
    """A model without values, on the meta device."""
    with torch.device("meta"):
        return model_class(config)(config)


def tensors_of(network: Any) -> dict[str, Tensor]:
    """The tensors of a model of transformers by name, without those that are tied to others."""
    tensors = network.state_dict()
    if network.config.tie_word_embeddings:
        for name in getattr(network, "_tied_weights_keys", None) or ():
            tensors.pop(name, None)
    return tensors


def fill(network: Any, tensors: dict[str, Tensor]) -> None:
    """Put values into an empty model."""
    network.load_state_dict(tensors, strict=False, assign=True)
    network.tie_weights()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value
