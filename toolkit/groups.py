"""Which parameters an optimizer treats alike: one function for all optimizers, so that decay is an explicit choice."""

from collections.abc import Sequence
from fnmatch import fnmatch

from torch import nn


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, no_decay: Sequence[str] = ()) -> list[dict]:
    """Groups for ``torch.optim``. Matrices and embeddings (2 or more dimensions) decay, gains and biases don't, nor
    does what matches a glob pattern in ``no_decay``. A parameter's ``lr_scale`` (set by an init) multiplies its rate.
    Each group carries ``peak_lr``, which the schedule multiplies, and a ``name`` for the printed table.

    Raises ValueError for a pattern that matches no parameter."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for pattern in no_decay:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"no_decay pattern {pattern!r} matches no parameter; there are {', '.join(sorted(names))}")
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and not any(fnmatch(name, pattern) for pattern in no_decay)
        scale = getattr(parameter, "lr_scale", 1.0)
        label = ("decay" if decays else "no decay") + (f", lr x {scale:g}" if scale != 1.0 else "")
        group = groups.setdefault((not decays, scale), {"name": label, "params": [], "lr": lr * scale})
        group["weight_decay"] = weight_decay if decays else 0.0
        group["peak_lr"] = lr * scale
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
