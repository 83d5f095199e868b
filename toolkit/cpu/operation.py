"""Functions that a compiler calls as they are, where it would otherwise make worse of them."""

from collections.abc import Callable

import torch


def operation(name: str, function: Callable, fake: Callable) -> Callable:
    """``function`` as the operation toolkit::``name``; ``fake`` makes outputs of the same shapes out of nothing. No
    argument is changed, no gradient passes: an autograd Function has to stand around it. ``torch.library.custom_op``
    would do it too, with checks in Python around each call: 0.1 ms when it comes between two large products."""
    qualified = f"toolkit::{name}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", function)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.toolkit, name).default
