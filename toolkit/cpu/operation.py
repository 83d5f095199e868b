"""Registers functions that torch.compile calls unchanged, because the code that it generates is slower or fails."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from toolkit.cpu import switch

# "toolkit". A copy of this file beside exported weights gets a name of its own: a name can be registered only once.
LIBRARY = re.sub(r"\W", "_", re.sub(r"[._]cpu[._]operation$", "", __name__))


def operation(name: str, function: Callable, fake: Callable) -> Callable:
    """Register ``function`` as the operation ``name`` of the library toolkit, and return the operation.

    ``fake`` returns empty outputs of the same shapes. ``function`` must not change its arguments. The operation has no
    gradient, so call it from a torch.autograd.Function. ``torch.library.custom_op`` would do the same, but its checks
    in Python take 0.1 ms for each call between two large products."""
    qualified = f"{LIBRARY}::{name}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", function)
    torch.library.register_fake(qualified, fake)
    return getattr(getattr(torch.ops, LIBRARY), name).default


def helps(x: Tensor) -> bool:
    """Whether to call the registered operation for ``x``, not the function: while torch.compile traces for a CPU."""
    return switch.FAST and torch.compiler.is_compiling() and x.device.type == "cpu"
