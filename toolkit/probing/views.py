"""What a probe may look at (``Views`` in toolkit/protocols.py). Each view is computed when it is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import TypeVar

import torch
from torch import Tensor, nn

from toolkit import attention_weights
from toolkit.probing.capture import FORWARD, Capture, Precision
from toolkit.probing.places import places

Value = TypeVar("Value")
NEEDS = FORWARD | {"updates"}


class Views:
    """The views of one probe, named ``probe``. It may read those in ``needs``; the others raise ValueError.

    ``model`` is the copy that was run, and ``after`` the model in training, after the update of the step."""

    def __init__(
        self,
        probe: str,
        needs: Set[str],
        model: nn.Module,
        after: nn.Module,
        batch: tuple[Tensor, Tensor],
        captured: Capture,
        precision: Precision,
    ):
        self.probe, self.needs, self.model = probe, needs, model
        self.ids, self.targets = batch
        self._after, self._captured, self._precision = after, captured, precision

    @functools.cached_property
    def places(self) -> dict[str, str]:
        """{module name: "block", "mixer" or "ffn"}."""
        return places(self.model)

    @property
    def activations(self) -> Mapping[str, Tensor]:
        """The output of each module."""
        self._check("activations")
        return {name: seen.tensor for name, seen in self._captured.activations.items()}

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The first input of each module."""
        self._check("inputs")
        return {name: seen.tensor for name, seen in self._captured.inputs.items()}

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """The gradient of the mean loss for the output of each module."""
        self._check("gradients")
        return self._captured.gradients

    @property
    def attention(self) -> Mapping[str, Tensor | None]:
        """(B,H,T,S), the attention weights of each kernel, or None if its output is no weighted sum."""
        self._check("attention")
        return _Computed(self._captured.calls, self._attention_weights)

    @property
    def logits(self) -> Tensor:
        """(B,T,V), float32."""
        self._check("logits")
        assert self._captured.output is not None, "the pass has run"
        hidden, head = self._captured.output
        with torch.no_grad(), self._precision():
            return head.logits(hidden.detach()).float()

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Each parameter."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    @property
    def weight_gradients(self) -> Mapping[str, Tensor]:
        """The gradient of the mean loss for each parameter that has one."""
        self._check("weight_gradients")
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    @property
    def updates(self) -> Mapping[str, Tensor]:
        """What the step has added to each parameter."""
        self._check("updates")
        before, after = dict(self.model.named_parameters()), dict(self._after.named_parameters())
        return _Computed(before, lambda name: after[name].detach() - before[name].detach())

    def _attention_weights(self, name: str) -> Tensor | None:
        kernel, arguments, options = self._captured.calls[name]
        with torch.no_grad(), self._precision():
            return attention_weights.weights(kernel, *arguments, **options)

    def _check(self, view: str) -> None:
        if view not in self.needs:
            raise ValueError(
                f"{self.probe} reads views.{view} without asking for it: add {view!r} to its class attribute needs"
            )


class _Computed(Mapping[str, Value]):
    """A mapping whose values are computed each time they are read, so that only one of them is in memory."""

    def __init__(self, names: Mapping[str, object], compute: Callable[[str], Value]):
        self._names, self._compute = list(names), compute

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def check_needs(probe: str, needs: object) -> None:
    """Raise ValueError unless ``needs`` is a set, or another collection, of names of views."""
    if isinstance(needs, str) or not isinstance(needs, Set | Sequence):
        raise ValueError(
            f"{probe}.needs is {needs!r:.60}; a probe must say which views it reads: a class attribute such as "
            "needs = {'activations'}; views.weights needs no name there, and an empty set is set()"
        )
    for name in needs:
        if name not in NEEDS:
            raise ValueError(f"{probe}.needs has {name!r}; the views are {', '.join(sorted(NEEDS))}")
