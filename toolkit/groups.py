"""Which parameters an optimizer treats alike: one function for all optimizers, so that decay is an explicit choice."""

from collections.abc import Sequence
from fnmatch import fnmatch

from torch import nn


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    no_decay: Sequence[str] = (),
    matrices_lr: float | None = None,
    no_matrix: Sequence[str] = (),
) -> list[dict]:
    """Groups for ``torch.optim``. Matrices and embeddings (2 or more dimensions) decay, gains and biases don't, nor
    does what matches a glob pattern in ``no_decay``. A parameter's ``lr_scale`` (set by an init) multiplies its rate.
    Each group carries ``peak_lr``, which the schedule multiplies, and a ``name`` for the printed table.

    With ``matrices_lr`` the model's hidden matrices (weights of ``nn.Linear``, but not the output matrix) form groups
    of their own at that rate, named "matrices"; what matches a pattern in ``no_matrix`` stays with the others. Their
    key "split" has an entry for each parameter: the rows of the matrices that it merges, or None where it is one.

    Raises ValueError for a pattern that matches no parameter."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for knob, patterns in (("no_decay", no_decay), ("no_matrix", no_matrix)):
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in names):
                known = ", ".join(sorted(names))
                raise ValueError(f"{knob} pattern {pattern!r} matches no parameter; there are {known}")
    splits = {} if matrices_lr is None else _hidden_matrices(model)
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = id(parameter) in splits and not any(fnmatch(name, pattern) for pattern in no_matrix)
        decays = parameter.ndim >= 2 and not any(fnmatch(name, pattern) for pattern in no_decay)
        scale = getattr(parameter, "lr_scale", 1.0)
        peak = (matrices_lr if matrix else lr) * scale
        label = ("matrices, " if matrix else "") + ("decay" if decays else "no decay")
        label += f", lr x {scale:g}" if scale != 1.0 else ""
        group = groups.setdefault((not matrix, not decays, scale), {"name": label, "params": [], "lr": peak})
        group["weight_decay"] = weight_decay if decays else 0.0
        group["peak_lr"] = peak
        group["params"].append(parameter)
        if matrix:
            group.setdefault("split", []).append(splits[id(parameter)])
    return [groups[key] for key in sorted(groups)]


def _hidden_matrices(model):
    """id of a Linear's weight -> the rows of the matrices that it merges, or None. A table or the output matrix is
    none: its rows are tokens, whoever else may share the weight."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not getattr(model, "unembed", None):
            if id(module.weight) not in tables:
                merged = getattr(module, "merged", None)
                assert merged is None or sum(merged.values()) == len(module.weight), f"{merged}: rows don't add up"
                found[id(module.weight)] = None if merged is None else list(merged.values())
    return found
