"""Parameter groups for every optimizer: which parameters decay, and at which learning rate each is trained."""

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    no_decay: Sequence[str] = (),
    matrices_lr: float | None = None,
    no_matrix: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Split a model's parameters into groups for ``torch.optim``.

    Parameters of 2 or more dimensions (matrices, embeddings) have weight decay, unless their name matches a glob
    pattern in ``no_decay``. All others (gains, biases) have no weight decay. A parameter's ``lr_scale``, which an init
    may set, multiplies its learning rate. Each group has a ``peak_lr``, which the loop multiplies by the schedule's
    factor, and a ``name`` for the printed table.

    With ``matrices_lr`` the hidden matrices (weights of ``nn.Linear``, except the output matrix) form separate groups
    with this learning rate. Matrices that match a pattern in ``no_matrix`` stay in the other groups. The names of the
    separate groups start with "matrices". They have a list "split" with an entry per parameter: the row counts of the
    matrices that it merges, or None for a single matrix.

    Raises ValueError for a pattern that matches no parameter."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for knob, patterns in (("no_decay", no_decay), ("no_matrix", no_matrix)):
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in names):
                known = ", ".join(sorted(names))
                raise ValueError(f"{knob} pattern {pattern!r} matches no parameter; the parameters are {known}")
    splits = {} if matrices_lr is None else _hidden_matrices(model)
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_hidden_matrix = id(parameter) in splits and not any(fnmatch(name, pattern) for pattern in no_matrix)
        decays = parameter.ndim >= 2 and not any(fnmatch(name, pattern) for pattern in no_decay)
        scale = getattr(parameter, "lr_scale", 1.0)
        peak = (lr if matrices_lr is None or not is_hidden_matrix else matrices_lr) * scale
        label = ("matrices, " if is_hidden_matrix else "") + ("decay" if decays else "no decay")
        label += f", lr x {scale:g}" if scale != 1.0 else ""
        group = groups.setdefault((not is_hidden_matrix, not decays, scale), {"name": label, "params": [], "lr": peak})
        group["weight_decay"] = weight_decay if decays else 0.0
        group["peak_lr"] = peak
        group["params"].append(parameter)
        if is_hidden_matrix:
            group.setdefault("split", []).append(splits[id(parameter)])
    return [groups[key] for key in sorted(groups)]


def _hidden_matrices(model: nn.Module) -> dict[int, list[int] | None]:
    """Map id(weight) of each Linear to the row counts of the matrices that the weight merges, or to None.

    Embedding tables and the output matrix are left out, even if a Linear shares the weight: each of their rows belongs
    to a token."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    row_counts = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not getattr(model, "unembed", None):
            if id(module.weight) not in tables:
                merged = getattr(module, "merged", None)
                if merged is not None and sum(merged.values()) != len(module.weight):
                    raise ValueError(
                        f"a {type(module).__name__} has merged = {merged}, whose rows must add up to the "
                        f"{len(module.weight)} rows of its weight"
                    )
                row_counts[id(module.weight)] = None if merged is None else list(merged.values())
    return row_counts
