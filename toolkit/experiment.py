"""The experiment: which parts to train and how, and the functions that build its parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from toolkit.config.layers import Config
from toolkit.objective import Objective
from toolkit.parallel import distributed
from toolkit.protocols import Data, Evaluator, Probe, Schedule, Tokenizer
from toolkit.registry import able, register

Count = Annotated[int, Gt(0)]


@register("experiment")
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The root of the config: which parts to train, and how. ``steps`` and the knobs ``..._every`` are in optimizer
    steps.

    batch_size      sequences per optimizer step, over all devices; a multiple of devices x accumulate
    accumulate      micro-batches per step
    seq_len         tokens per sequence; the length of the model's context
    clip            maximum norm of the gradient: a larger gradient is scaled down to it; None: no maximum
    seed            seed of initial weights, data order and dropout
    precision       "auto": bfloat16 autocast on GPUs that support it, else float32
    threads         number of CPU threads; None: torch's choice. Rounding depends on this number, so the toolkit never
                    changes it by itself
    compile         "auto": only on CUDA; True: on a CPU as well, which needs a C++ compiler
    devices         processes that train together, each on its own GPU if there are GPUs; "all": one for each GPU
    rank_timeout    seconds: if a process gives no sign of life for so long, all processes end
    evaluators      what else to measure at every evaluation; final_evaluators: only at the last evaluation
    probes          what to observe inside the model, every ``probe_every`` steps and at the last one
    eval_windows    validation windows per evaluation, the same every time; the last evaluation adds the whole split
    sample_prompt   text that the model continues every ``sample_every`` steps, by ``sample_tokens`` tokens that are
                    sampled at ``sample_temperature``
    keep_checkpoints  how many step checkpoints to keep besides the best one
    mask_documents  tokens attend only inside their document, and positions restart with each document
    spike_sigmas    skip and record a step whose loss or gradient norm exceeds the mean of the last 128 accepted steps
                    by more than this many standard deviations; None: skip no step
    profile_steps   number of steps that torch.profiler traces, after the first ten steps; None: no trace. The trace
                    goes into the run's folder
    """

    model: type
    data: type
    tokenizer: type
    optimizer: type
    schedule: type
    loss: type
    loggers: list[type]
    evaluators: list[type] | tuple[type, ...] = ()
    final_evaluators: list[type] | tuple[type, ...] = ()
    probes: list[type] | tuple[type, ...] = ()
    steps: Annotated[int, Gt(0), Le(99_999_999)] = 100_000  # a checkpoint's name has eight digits
    batch_size: Count = 8
    accumulate: Count = 1
    seq_len: Count = 1024
    clip: Annotated[float, Gt(0)] | None = 1.0
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Count | None = None
    compile: Literal["auto"] | bool = "auto"
    devices: Literal["all"] | Count = 1
    rank_timeout: Annotated[int, Ge(5)] = 60
    log_every: Count = 10
    eval_every: Count = 1000
    eval_windows: Count = 256
    probe_every: Count = 50
    sample_every: Count = 1000
    sample_prompt: str = "Once upon a time"
    sample_tokens: Count = 200
    sample_temperature: Annotated[float, Ge(0)] = 0.8
    checkpoint_every: Count = 1000
    keep_checkpoints: Annotated[int, Ge(2)] = 2
    mask_documents: bool = False
    spike_sigmas: Annotated[float, Gt(0)] | None = None
    profile_steps: Count | None = None


@dataclass
class Parts:
    """The built parts of an experiment."""

    tokenizer: Tokenizer
    data: Data
    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    evaluators: dict[str, Evaluator] = field(default_factory=dict)  # by name; at every evaluation
    final_evaluators: dict[str, Evaluator] = field(default_factory=dict)  # only at the last evaluation
    probes: dict[str, Probe] = field(default_factory=dict)  # by name


def build_list(config: Config, slot: str, classes: Iterable[type]) -> dict[str, Any]:
    """Build the parts in a list of Experiment: {name: part}. Raises ValueError for a name that occurs twice."""
    parts: dict[str, Any] = {}
    for name, cls in zip(config.names(slot), classes, strict=True):
        if name in parts:
            raise ValueError(
                f"Experiment.{slot} has {name} twice, so their metrics would have the same names; give one of them a "
                f"scope, as in @second/{name}"
            )
        parts[name] = cls()
    return parts


def build(
    experiment: Experiment, device: torch.device, tokenizer: Tokenizer | None = None, data: Data | None = None
) -> Parts:
    """Build every part, except a ``tokenizer`` or ``data`` that is given. Raises ValueError.

    Initial weights are drawn on the CPU in float32 and then moved to the device. On the meta device no weights are
    drawn: building takes no memory there and only finds errors."""
    micro_batches = experiment.accumulate * distributed.world_size()
    if experiment.batch_size % micro_batches:
        raise ValueError(
            f"Experiment.batch_size = {experiment.batch_size} is not a multiple of Experiment.accumulate x devices = "
            f"{micro_batches}"
        )
    tokenizer = tokenizer or experiment.tokenizer()
    data = data or experiment.data(tokenizer, experiment.seq_len, experiment.seed)
    torch.manual_seed(experiment.seed)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        model = experiment.model(tokenizer.vocab_size, experiment.seq_len)
    if not isinstance(getattr(model, "max_len", None), int):
        raise ValueError(
            f"{type(model).__name__} has no attribute max_len, the length of its context; set self.max_len = max_len "
            "in its constructor"
        )
    if next(model.parameters()).device.type != device.type:
        model.to(device)
    if experiment.mask_documents:
        check_keeps_documents_apart(model)
    objective = Objective(model, experiment.loss(), tokenizer.eot if experiment.mask_documents else None)
    optimizer = experiment.optimizer(model)
    if any(not {"name", "peak_lr"} <= group.keys() for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} has groups of parameters without a name and peak_lr, which the loop reads; "
            "pass it toolkit.groups.parameter_groups(model, ...) instead of model.parameters()"
        )
    return Parts(tokenizer, data, model, objective, optimizer, experiment.schedule(experiment.steps))


def check_keeps_documents_apart(model: nn.Module) -> None:
    """Raise ValueError unless the model, or each of its mixers, declares that it supports "documents"."""
    if "documents" in getattr(model, "supports", ()):
        return
    mixers = getattr(model, "mixers", ())
    if not mixers:
        raise ValueError(
            f"Experiment.mask_documents: {type(model).__name__} does not declare whether it keeps documents apart; "
            "give it an attribute mixers, the list of its mixers, or the class attribute supports = {'documents'} if "
            "none of its tokens attends to another document (context.documents)"
        )
    for mixer in mixers:
        if "documents" not in getattr(mixer, "supports", ()):
            part = getattr(mixer, "attention", mixer)
            kind = "mixer" if part is mixer else "attention"
            raise ValueError(
                f"Experiment.mask_documents: {type(part).__name__} can't keep documents apart; use another "
                f"GPT.{kind}, such as {able(kind, 'documents') or '@SelfAttention'}"
            )


def build_blank(experiment: Experiment) -> Parts:
    """Build every part on the meta device, to count parameters and to find errors. Raises ValueError.

    The meta device has no values. If a part computes with values in its constructor, every part is built on the CPU
    instead."""
    try:
        return build(experiment, torch.device("meta"))
    except (NotImplementedError, RuntimeError):
        return build(experiment, torch.device("cpu"))


def micro_batch_size(experiment: Experiment, processes: int) -> int:
    """How many sequences one process handles in one forward pass."""
    return max(1, experiment.batch_size // (experiment.accumulate * processes))


def autocast(experiment: Experiment, device: torch.device) -> torch.autocast:
    """A context manager for the precision in which the experiment trains, evaluates and samples."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype_of(experiment, device) == torch.bfloat16)


def dtype_of(experiment: Experiment, device: torch.device) -> torch.dtype:
    """bfloat16 or float32, by ``Experiment.precision`` and the device."""
    use_bfloat16 = experiment.precision == "bfloat16"
    if experiment.precision == "auto":
        use_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if use_bfloat16 else torch.float32


def is_compiled(experiment: Experiment, device: torch.device) -> bool:
    """Whether ``Experiment.compile`` means that the objective is compiled on this device."""
    return experiment.compile is True or (experiment.compile == "auto" and device.type == "cuda")
