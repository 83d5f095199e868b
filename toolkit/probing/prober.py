"""The probes of a run: copies the model at some steps, and measures the copy with them."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.experiment import Experiment, Parts, autocast
from toolkit.loop.prefetch import prefetch
from toolkit.objective import Objective
from toolkit.output.errors import clean
from toolkit.probing.capture import Precision, capture
from toolkit.probing.views import Views, check_needs
from toolkit.protocols import Data, Probe
from toolkit.seeding import named_seed
from toolkit.store.journal import Journal

log = logging.getLogger("toolkit")
SHARE = 8  # the probe batch is this part of a step's sequences
MOST_SEQUENCES = 4
LARGEST_ARRAY = 100_000  # numbers
NAME = re.compile(r"[^\s/]+(/[^\s/]+)?")  # STATISTIC or STATISTIC/MODULE


@dataclass
class Observation:
    """What the probes measured at one step, by full names ``probe/NAME/STATISTIC/MODULE``.

    row            single numbers, all finite
    distributions  arrays, flat, all finite
    left_out       names whose value is None, since they do not apply to this model, or is not finite
    """

    row: dict[str, float] = field(default_factory=dict)
    distributions: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class Prober:
    """Observes the model in training at the steps that ``Experiment.probe_every`` says, and at the last one.

    It runs a copy of the model on a fixed batch: the first sequences of the validation split, an eighth of a step's
    sequences, but at least one and at most four. The copy holds the weights before the update of the step, is in
    evaluation mode, is never compiled, and computes in the run's precision. So training is the same to the last bit
    with and without probes. Between these steps the copy takes no memory. Raises ValueError for a model that can't be
    copied."""

    def __init__(self, experiment: Experiment, parts: Parts, device: torch.device, enabled: bool = True):
        self.experiment, self.parts, self.device = experiment, parts, device
        self.copy = copy_of(parts.objective) if enabled and parts.probes else None
        self.batch: tuple[Tensor, Tensor] | None = None  # ids and targets, once they are drawn
        self.is_filled = False  # whether the copy holds weights
        self.warned: set[str] = set()

    def keep_weights(self, step: int) -> None:
        """Before a step: copy the weights if the step is to be observed."""
        is_last = step == self.experiment.steps - 1
        if self.copy is not None and (is_last or step % self.experiment.probe_every == 0):
            fill(self.copy, self.parts.objective)
            self.is_filled = True

    def observe(self, step: int, journal: Journal) -> None:
        """After a step whose weights were kept: observe them, and what the step has added to them, and write the result
        to the journal. Raises ValueError for a probe whose result is not of the form that toolkit/protocols.py asks
        for."""
        if self.copy is None or not self.is_filled:
            return
        if self.batch is None:
            self.batch = probe_batch(self.parts.data, self.experiment.batch_size, self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(named_seed(self.experiment.seed, "probe", step))
            observation = observe(self.parts.probes, self.copy, self.parts.objective, self.batch, self._precision)
        empty(self.copy)
        self.is_filled = False
        self._warn(observation)
        if observation.row:
            journal.row(step, observation.row)
        for name, values in observation.distributions.items():
            journal.histogram(step, name, values)

    def _precision(self) -> torch.autocast:
        return autocast(self.experiment, self.device)

    def _warn(self, observation: Observation) -> None:
        """Say once for each probe, and each reason, what is left out."""
        for name in self.parts.probes:
            prefix = f"probe/{name}/"
            for reason in ("does not apply to this model", "is not finite"):
                of_reason = [
                    metric.removeprefix(prefix)
                    for metric, why in observation.left_out.items()
                    if why == reason and metric.startswith(prefix)
                ]
                if of_reason:
                    more = f" and {len(of_reason) - 3} more" if len(of_reason) > 3 else ""
                    self._warn_once(f"probe {name}: {', '.join(of_reason[:3])}{more}", reason, name)
            measured = [*observation.row, *observation.distributions, *observation.left_out]
            if not any(metric.startswith(prefix) for metric in measured):
                model = type(self.parts.model).__name__
                self._warn_once(f"probe {name}: measures nothing", f"finds nothing to look at in {model}", name)

    def _warn_once(self, what: str, reason: str, name: str) -> None:
        if f"{name} {reason}" not in self.warned:
            self.warned.add(f"{name} {reason}")
            log.warning("%s: %s; it is left out", what, reason)


def copy_of(objective: Objective) -> Objective:
    """A copy of model and loss, in evaluation mode and not compiled, without memory for its weights. Raises ValueError
    for a model that can't be copied."""
    try:
        copied = copy.deepcopy(objective).eval()
    except Exception as error:
        raise ValueError(
            f"{type(objective.model).__name__} can't be copied, which probes need: {clean(error)}; keep open files, "
            "locks and tensors of a forward pass out of its attributes, or leave out Experiment.probes"
        ) from error
    empty(copied)
    return copied


def probe_batch(data: Data, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and targets (B, T): the first sequences of the validation split."""
    sequences = min(max(1, batch_size // SHARE), MOST_SEQUENCES, data.windows("val"))
    with contextlib.closing(prefetch(data, "val", sequences, [0], device)) as batches:
        return next(batches)


def observe(
    probes: Mapping[str, Probe],
    copied: Objective,
    objective: Objective,
    batch: tuple[Tensor, Tensor],
    precision: Precision,
) -> Observation:
    """Run the copy of an objective once, and let each probe look at it. ``objective`` holds the weights after the
    update. Raises ValueError."""
    needs = {need for probe in probes.values() for need in probe.needs}
    captured = capture(copied, *batch, needs, precision)
    observation = Observation()
    for name, probe in probes.items():
        views = Views(name, set(probe.needs), copied.model, objective.model, batch, captured, precision)
        with torch.no_grad():
            sort_values(observation, name, probe.observe(views))
    return observation


def sort_values(observation: Observation, probe: str, values: object) -> None:
    """Sort the result of a probe into single numbers, arrays and what is left out. Raises ValueError for a result of
    another form than toolkit/protocols.py asks for."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{probe}.observe returned {values!r:.80}; it must return {{'STATISTIC/MODULE': number or array}}"
        )
    single: dict[str, Tensor] = {}
    for short, value in values.items():
        if not isinstance(short, str) or not NAME.fullmatch(short):
            raise ValueError(
                f"{probe}.observe: {short!r} is not a name; write STATISTIC, or STATISTIC/MODULE with the dotted name "
                "of a module or parameter, without white space or further slashes"
            )
        name = f"probe/{probe}/{short}"
        if value is None:
            observation.left_out[name] = "does not apply to this model"
        elif isinstance(value, numbers.Real) and not isinstance(value, bool):
            observation.row[name] = _number(value)
        elif not isinstance(value, Tensor | np.ndarray):
            raise ValueError(f"{probe}.observe: the value of {short} must be a number or an array, not {value!r:.40}")
        elif isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                f"{probe}.observe: {short} is a tensor on the device meta, which holds no values; compute it from the "
                "views, which are on the device of the run"
            )
        elif isinstance(value, Tensor) and value.ndim == 0 and value.layout == torch.strided and not value.is_complex():
            single[name] = value.detach().float().reshape(())
        elif value.ndim == 0:
            observation.row[name] = float(_array(f"{probe}.observe: {short}", value)[0])
        else:
            observation.distributions[name] = _array(f"{probe}.observe: {short}", value)
    if single:  # one transfer from the device for all
        devices = {tensor.device for tensor in single.values()}
        tensors = list(single.values()) if len(devices) == 1 else [tensor.cpu() for tensor in single.values()]
        observation.row |= dict(zip(single, torch.stack(tensors).tolist(), strict=True))
    for name in [name for name in observation.row if not math.isfinite(observation.row[name])]:
        del observation.row[name]
        observation.left_out[name] = "is not finite"
    for name in [name for name, array in observation.distributions.items() if not np.isfinite(array).all()]:
        del observation.distributions[name]
        observation.left_out[name] = "is not finite"


def _number(value: numbers.Real) -> float:
    """A number as a float, inf if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _array(what: str, value: Tensor | np.ndarray) -> np.ndarray:
    """A flat array of floats. Raises ValueError for a large or empty one, and for one that does not hold real
    numbers."""
    size = value.numel() if isinstance(value, Tensor) else value.size
    if not 0 < size <= LARGEST_ARRAY:
        raise ValueError(
            f"{what} has {size:,} numbers; an array of a probe has 1 to {LARGEST_ARRAY:,}: return a summary"
        )
    try:
        if torch.is_complex(value) if isinstance(value, Tensor) else np.iscomplexobj(value):
            raise TypeError("its numbers are complex")
        array = value.detach().float().cpu().numpy() if isinstance(value, Tensor) else value.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"{what} is an array of {value.dtype}, which can't be read as numbers ({clean(error)}); return a dense "
            "array of real numbers"
        ) from error
    return array.reshape(-1)


def check(parts: Parts) -> None:
    """Raise ValueError for a probe that does not say which views it needs, and for probes of a model that can't be
    copied."""
    for name, probe in parts.probes.items():
        check_needs(name, getattr(probe, "needs", None))
    if parts.probes:
        copy_of(parts.objective)


def fill(copied: nn.Module, source: nn.Module) -> None:
    """Copy all parameters and buffers."""
    for mine, theirs in zip(_tensors(copied), _tensors(source), strict=True):
        mine.data = theirs.detach().clone()


def empty(copied: nn.Module) -> None:
    """Release the memory of all parameters, gradients and buffers."""
    for tensor in _tensors(copied):
        tensor.data = tensor.data.new_empty(0)
        tensor.grad = None


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
