"""One forward and backward pass of a model, with what its modules compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toolkit import attention_weights
from toolkit.objective import Objective

Precision = Callable[[], contextlib.AbstractContextManager[object]]  # the run's autocast
BACKWARD = {"gradients", "weight_gradients"}
FORWARD = {"activations", "inputs", "attention", "logits"} | BACKWARD


@dataclass
class Seen:
    """A tensor of a pass, and its version: an in-place operation changes the version."""

    tensor: Tensor
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.version = self.tensor._version

    @property
    def is_changed(self) -> bool:
        """Whether a later operation has changed the tensor in place."""
        return self.tensor._version != self.version


@dataclass
class Capture:
    """What a pass has computed, by the names of modules. A module that runs several times in a pass is there as NAME,
    NAME#2 and so on."""

    activations: dict[str, Seen] = field(default_factory=dict)
    inputs: dict[str, Seen] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    output: tuple[Tensor, Any] | None = None  # of the model: hidden states and head

    def changed(self) -> set[str]:
        """The names of modules whose input or output was changed in place after it was captured."""
        return {name for seen in (self.activations, self.inputs) for name in seen if seen[name].is_changed}


def capture(objective: Objective, ids: Tensor, targets: Tensor, needs: set[str], precision: Precision) -> Capture:
    """Run a forward pass and, if ``needs`` has gradients, a backward pass of the mean loss over ids and targets (B, T).
    Leaves gradients in the parameters. ``needs`` are names of views (toolkit/protocols.py)."""
    if not needs & FORWARD:
        return Capture()
    captured, loss = _forward(objective, ids, targets, needs, precision, set())
    if changed := captured.changed():  # rare, so that copies are made only of what needs them
        captured, loss = _forward(objective, ids, targets, needs, precision, changed)
    if needs & BACKWARD:
        loss.backward()
    return captured


def _forward(
    objective: Objective, ids: Tensor, targets: Tensor, needs: set[str], precision: Precision, copied: set[str]
) -> tuple[Capture, Tensor]:
    """One forward pass with hooks; returns what they captured, and the mean loss. The modules in ``copied`` get a copy
    of their input and pass on a copy of their output, because these are changed in place."""
    captured = Capture()
    counts: dict[str, int] = {}
    model, kernels = objective.model, set(attention_weights.kernels(objective.model).values())

    def before(name: str, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> object:
        counts[name] = counts.get(name, 0) + 1
        call = name if counts[name] == 1 else f"{name}#{counts[name]}"
        if "attention" in needs and module in kernels:
            captured.calls[call] = module, _copied(arguments), _copied(options)
        if "inputs" in needs and arguments and _is_float(arguments[0]):
            captured.inputs[call] = Seen(arguments[0].detach())
            if call in copied:
                return (arguments[0].clone(), *arguments[1:]), options
        return None

    def after(name: str, module: nn.Module, arguments: tuple[Any, ...], output: object) -> Tensor | None:
        call = name if counts[name] == 1 else f"{name}#{counts[name]}"
        if not isinstance(output, Tensor) or not _is_float(output) or not needs & {"activations", "gradients"}:
            return None
        captured.activations[call] = Seen(output.detach())
        if "gradients" in needs and output.requires_grad:
            output.register_hook(lambda gradient: captured.gradients.__setitem__(call, gradient.detach().clone()))
        return output.clone() if call in copied else None

    def keep_output(module: nn.Module, arguments: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        captured.output = output

    handles = [model.register_forward_hook(keep_output)] if "logits" in needs else []
    for name, module in model.named_modules():
        if name:
            handles += [
                module.register_forward_pre_hook(lambda *call, name=name: before(name, *call), with_kwargs=True),
                module.register_forward_hook(lambda *call, name=name: after(name, *call)),
            ]
    try:
        with torch.set_grad_enabled(bool(needs & BACKWARD)), precision():
            total, _, count, _ = objective(ids, targets)
            return captured, total / count
    finally:
        for handle in handles:
            handle.remove()


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _copied(value: Any) -> Any:
    """A value whose tensors, also in tuples and dicts, are copies without a graph."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    return value
