"""Choose the architecture of transformers that a model of ours is, or say why there is none."""

from __future__ import annotations

from typing import Any

from toolkit.architectures import ARCHITECTURES, Architecture, Model, mismatches
from toolkit.exchange import library, tensors


def choose(described: Model, entries: dict[str, Any], only: str | None = None) -> tuple[Architecture, Any]:
    """Return the first architecture that a model is, with its config. ``entries`` are added to the config.
    ``only``: the only architecture to consider.

    Raises ValueError with the conditions that fail, those of the nearest architecture first."""
    if only is not None and only not in ARCHITECTURES:
        raise ValueError(f"--architecture {only}: it has no mapping; known are {', '.join(ARCHITECTURES)}")
    failures: dict[str, list[str]] = {}
    for name, each in ARCHITECTURES.items() if only is None else [(only, ARCHITECTURES[only])]:
        try:
            config = library.make_config(name, each.config(described) | entries)
            failures[name] = conditions(each, config, described)
        except ValueError as error:
            failures[name] = str(error).splitlines()
            continue
        if not failures[name]:
            return each, config
    nearest = sorted(failures, key=lambda name: len(failures[name]))
    subject = "no architecture of transformers computes" if only is None else f"{only} does not compute"
    lines = [f"{subject} what this model does (tier native); conditions that fail:"]
    for name in nearest[:3]:
        lines += [f"  {name}: {line.removeprefix(f'{name}: ')}" for line in failures[name]]
    if others := ", ".join(f"{name} ({len(failures[name])})" for name in nearest[3:]):
        lines.append(f"  others, with the number of conditions that fail: {others}")
    raise ValueError("\n".join(lines))


def conditions(architecture: Architecture, config: Any, described: Model) -> list[str]:
    """The conditions that keep a model from being of a config: parts and sizes first, then shapes of tensors."""
    lines = mismatches(architecture.layout(config), described)
    if lines:
        return lines
    rules = architecture.rules(config)
    theirs = {name: tuple(t.shape) for name, t in library.tensors_of(library.empty_model(config)).items()}
    try:
        tensors.check_names(rules, "theirs", described.shapes, theirs)
        tensors.check_shapes(rules, described.shapes, theirs)
    except ValueError as error:
        return [str(error)]
    return []
