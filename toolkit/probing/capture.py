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
    """One forward pass with hooks; returns what they captured, and the mean loss. ``copied``: the modules whose inputs
    and outputs are copied, because later operations change them in place."""
    captured = Capture()
    counts: dict[str, int] = {}
    model, kernels = objective.model, set(attention_weights.kernels(objective.model).values())

    def before(name: str, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        counts[name] = counts.get(name, 0) + 1
        call = name if counts[name] == 1 else f"{name}#{counts[name]}"
        if "inputs" in needs and arguments and _is_float(arguments[0]):
            captured.inputs[call] = Seen(_detached(arguments[0], call in copied))
        if "attention" in needs and module in kernels:
            captured.calls[call] = module, _detached(arguments, True), _detached(options, True)

    def after(name: str, module: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        call = name if counts[name] == 1 else f"{name}#{counts[name]}"
        if isinstance(output, Tensor) and _is_float(output):
            if "activations" in needs:
                captured.activations[call] = Seen(_detached(output, call in copied))
            if "gradients" in needs and output.requires_grad:
                output.register_hook(lambda gradient: captured.gradients.__setitem__(call, gradient.detach().clone()))

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


def _detached(value: Any, copied: bool) -> Any:
    """A value whose tensors, also in tuples and dicts, are without a graph and, if ``copied``, are copies."""
    if isinstance(value, Tensor):
        return value.detach().clone() if copied else value.detach()
    if isinstance(value, tuple):
        return tuple(_detached(item, copied) for item in value)
    if isinstance(value, Mapping):
        return {name: _detached(item, copied) for name, item in value.items()}
    return value
