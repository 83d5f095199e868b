"""Write a model with the source of its parts beside the weights: the tier code of ``convert``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from toolkit.compose import Run
from toolkit.config import keys
from toolkit.config.layers import Config, Reference
from toolkit.context import Context
from toolkit.exchange import library
from toolkit.exchange.describe import ROOT, built
from toolkit.exchange.flatten import Flattened, flat
from toolkit.registry import CATALOG

REMOTE = Path(__file__).parent / "remote"
COPIED = ("configuration_toolkit.py", "modeling_toolkit.py")
MODEL_TYPE = "toolkit_gpt"
AUTO_MAP = {
    "AutoConfig": "configuration_toolkit.ToolkitConfig",
    "AutoModelForCausalLM": "modeling_toolkit.ToolkitForCausalLM",
}
INSTALLED = {"torch", "transformers", "safetensors", "numpy", "__future__"}  # what whoever loads the model has
TITLE = '"""The parts of the model by name, and the file of each."""'


def write_code(run: Run, folder: Path) -> tuple[list[str], list[str]]:
    """Write the Python files. Returns the names of the modules that were copied, and the packages that the files need
    besides torch, transformers and numpy. Raises ValueError with the reason if a part's source can't be copied."""
    bundle, files = copied(run.config)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    needed = bundle.foreign - INSTALLED - set(sys.stdlib_module_names)
    return bundle.modules, sorted(needed)


def copied(config: Config) -> tuple[Flattened, dict[str, str]]:
    """The copied source of a config's model, and the text of each Python file by its name. Raises ValueError with the
    reason if a part's source can't be copied."""
    classes = [CATALOG[name].cls for name in dict.fromkeys(name for _, name in reachable(config))]
    bundle = Flattened(
        {"toolkit.registry": REMOTE / "toolkit_registry.py"},
        {"toolkit", "components", *(cls.__module__.partition(".")[0] for cls in classes)},
    )
    for cls in (*classes, Context):
        bundle.add(cls)
    files = bundle.files()
    if taken := {*COPIED, "parts_toolkit.py"} & set(files):
        raise ValueError(f"a part is in a file of the name {sorted(taken)[0]}, which the export needs; rename it")
    files |= {name: (REMOTE / name).read_text(encoding="utf-8") for name in COPIED}
    files["parts_toolkit.py"] = _parts_file(classes, bundle.modules)
    return bundle, files


def write_model(run: Run, folder: Path, dtype: str, entries: dict[str, Any], shard: str) -> None:
    """Write config.json, generation_config.json and the weights. With a half type, the run's own model gets the
    rounded weights too, so that the proof compares like with like."""
    transformers = library.require()
    from huggingface_hub import save_torch_state_dict

    half = getattr(torch, dtype)
    state = {
        name: tensor.cpu().to(half) if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in run.model.state_dict().items()
    }
    if dtype != "float32":
        own = run.model.state_dict()
        run.model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()})
    first_names = dict(run.model.named_parameters())  # a parameter with several names is written once
    others = {name for name, _ in run.model.named_parameters(remove_duplicate=False)} - first_names.keys()
    state = {name: tensor for name, tensor in state.items() if name not in others}
    save_torch_state_dict({f"model.{name}": value for name, value in state.items()}, folder, max_shard_size=shard)
    (folder / "config.json").write_text(json.dumps(_entries(run, dtype) | entries, indent=2), encoding="utf-8")
    transformers.GenerationConfig(**entries).save_pretrained(folder)


def reachable(config: Config) -> dict[tuple[str, str], dict[str, object]]:
    """{(scope, name): knobs} of the model and of every part in it, the model first."""
    parts: dict[tuple[str, str], dict[str, object]] = {}
    waiting = [built(config, ROOT[0], config.parts[ROOT]["model"])]
    while waiting:
        label = waiting.pop(0)
        if label not in parts:
            parts[label] = config.parts.get(label, {})  # none of a part that every mixer ignores
            waiting += [built(config, label[0], each) for each in _references(list(parts[label].values()))]
    return parts


def _references(value: object) -> list[Reference]:
    """The references in a value, at any depth."""
    if isinstance(value, Reference):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [each for item in value for each in _references(item)] if isinstance(value, list | tuple) else []


def _entries(run: Run, dtype: str) -> dict[str, Any]:
    """The entries of config.json."""
    parts = reachable(run.config)
    labels = {label: _label(label) for label in parts}
    root = next(iter(parts))
    knobs = parts[root]
    return {
        "architectures": ["ToolkitForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "vocab_size": run.tokenizer.vocab_size,
        "max_position_embeddings": run.experiment.seq_len,
        "hidden_size": knobs.get("dim"),
        "num_hidden_layers": knobs.get("n_layer"),
        "num_attention_heads": knobs.get("n_head"),
        "root": labels[root],
        "parts": {
            labels[label]: {knob: _encoded(run.config, label[0], value) for knob, value in of_part.items()}
            for label, of_part in parts.items()
        },
    }


def _encoded(config: Config, scope: str, value: object) -> object:
    """The value of a knob in JSON."""
    if isinstance(value, Reference):
        return {"part": _label(built(config, scope, value))}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(config, scope, each) for each in value]}
    if isinstance(value, dict):
        return {"items": [[_encoded(config, scope, k), _encoded(config, scope, v)] for k, v in value.items()]}
    if isinstance(value, list):
        return [_encoded(config, scope, each) for each in value]
    return value


def _label(label: tuple[str, str]) -> str:
    return keys.scoped(label[1], label[0])


def _parts_file(classes: list[type], modules: list[str]) -> str:
    """The text of parts_toolkit.py. transformers copies the files that it names."""
    lines = [TITLE, "", "from .toolkit_context import Context"]
    by_module: dict[str, list[str]] = {}
    for cls in classes:
        by_module.setdefault(cls.__module__, []).append(cls.__name__)
    lines += [f"from .{flat(module)} import {', '.join(sorted(names))}" for module, names in by_module.items()]
    others = [module for module in modules if module not in by_module and module != "toolkit.context"]
    lines += [f"from .{flat(module)} import __name__ as _{flat(module)}" for module in others]
    lines += ["", "PARTS = {"]
    lines += [f'    "{cls.__name__}": {cls.__name__},' for cls in classes]
    return "\n".join([*lines, "}", "", '__all__ = ["PARTS", "Context"]', ""])
