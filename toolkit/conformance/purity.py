"""What measuring a model must leave as it was: the model, torch's settings, and the global random generators."""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


def state_of(model: nn.Module) -> dict[str, object]:
    """All of a model, and of torch's settings, that a measurement must not change, by name."""
    state: dict[str, object] = {
        "torch's grad mode": torch.is_grad_enabled(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's number of threads": torch.get_num_threads(),
        "torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's matmul precision": torch.get_float32_matmul_precision(),
    }
    for name, parameter in model.named_parameters():
        state[f"the weight {name}"] = parameter.detach().clone()
        state[f"the gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
        state[f"requires_grad of {name}"] = parameter.requires_grad
    for name, buffer in model.named_buffers():
        state[f"the buffer {name}"] = buffer.clone()
    for name, module in model.named_modules():
        name = name or "the model"
        state[f"the training mode of {name}"] = module.training
        state[f"the hooks of {name}"] = sum(len(each) for key, each in vars(module).items() if key.endswith("_hooks"))
        state[f"the method forward of {name}"] = id(vars(module).get("forward"))
    return state


def is_same(one: object, other: object) -> bool:
    """Whether two values are equal, tensors to the last bit; NaN equals NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same_form = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return same_form and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))
    return type(one) is type(other) and one == other


def generator_states() -> dict[str, bytes]:
    """The states of the global random generators of torch, numpy and Python."""
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": pickle.dumps(np.random.get_state()),
        "Python": pickle.dumps(random.getstate()),
    }


@contextlib.contextmanager
def generators_restored() -> Iterator[None]:
    """Restore numpy's and Python's generators on exit. (Every check restores that of torch.)"""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
