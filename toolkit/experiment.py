"""The experiment: which parts to train, and how; and what it is made of, built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from toolkit.objective import Objective
from toolkit.parallel import distributed
from toolkit.registry import able, register

Count = Annotated[int, Gt(0)]


@register("experiment")
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Which parts to train, and how: the whole config. Counts are in optimizer steps unless they say otherwise.

    batch_size      sequences per optimizer step, over all devices; devices x accumulate has to divide it
    accumulate      micro-batches per step
    seq_len         tokens per sequence, the model's context
    clip            gradient norm above which gradients are scaled down; None leaves them
    seed            of initial weights, data order and dropout
    precision       "auto": bfloat16 autocast on CUDA where it is supported, else float32
    threads         CPU threads; None is torch's own choice. Sums depend on it, so it never changes by itself
    compile         "auto": on CUDA; True compiles on a CPU as well, which takes a C++ compiler
    devices         processes to train with, on as many GPUs where there are any; "all" GPUs
    rank_timeout    seconds without a sign of life after which one of them counts as hanging, and all end
    eval_windows    validation windows per evaluation, the same every time; the whole split is read once at the end
    sample_prompt   continued by ``sample_tokens`` tokens at ``sample_temperature`` every ``sample_every`` steps
    keep_checkpoints  step checkpoints kept, besides the best
    mask_documents  attention inside documents alone, positions from each document's start
    spike_sigmas    a step whose loss or gradient norm lies so many standard deviations above the mean of the last 128
                    is left out, and recorded; None applies every step that is finite
    profile_steps   traced by torch.profiler, after ten others, into the run's folder; None traces none
    """

    model: type
    data: type
    tokenizer: type
    optimizer: type
    schedule: type
    loss: type
    loggers: list[type]
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
    """What an experiment is made of, built."""

    tokenizer: object
    data: object
    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: object


def build(experiment: Experiment, device: torch.device, tokenizer=None, data=None) -> Parts:
    """Build every part. On the meta device this costs neither time nor memory, and finds what can't work. Initial
    values are drawn on the CPU in float32, whatever the device. Raises ValueError."""
    micro = experiment.accumulate * distributed.world_size()
    if experiment.batch_size % micro:
        raise ValueError(
            f"Experiment.batch_size = {experiment.batch_size} is not a multiple of Experiment.accumulate x devices = "
            f"{micro}"
        )
    tokenizer = tokenizer or experiment.tokenizer()
    data = data or experiment.data(tokenizer, experiment.seq_len, experiment.seed)
    torch.manual_seed(experiment.seed)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        model = experiment.model(tokenizer.vocab_size, experiment.seq_len)
    if next(model.parameters()).device.type != device.type:
        model.to(device)
    if experiment.mask_documents:
        for mixer in getattr(model, "mixers", []):
            if "documents" not in getattr(mixer, "supports", ()):
                part = getattr(mixer, "attention", mixer)
                kind = "mixer" if part is mixer else "attention"
                raise ValueError(
                    f"Experiment.mask_documents: {type(part).__name__} can't keep documents apart; use another "
                    f"GPT.{kind}, such as {able(kind, 'documents') or '@SelfAttention'}"
                )
    objective = Objective(model, experiment.loss(), tokenizer.eot if experiment.mask_documents else None)
    return Parts(tokenizer, data, model, objective, experiment.optimizer(model), experiment.schedule(experiment.steps))


def build_blank(experiment: Experiment) -> Parts:
    """Build every part on the meta device, to count and to check. A part that computes with values while it is built
    can't be built there: then every part is built on the CPU. Raises ValueError."""
    try:
        return build(experiment, torch.device("meta"))
    except (NotImplementedError, RuntimeError):
        return build(experiment, torch.device("cpu"))


def process_count(experiment: Experiment) -> int:
    """Processes that ``Experiment.devices`` asks for on this machine."""
    return max(1, torch.cuda.device_count()) if experiment.devices == "all" else experiment.devices


def micro_batch_size(experiment: Experiment, processes: int) -> int:
    """Sequences of one forward pass of one process."""
    return max(1, experiment.batch_size // (experiment.accumulate * processes))


def autocast(experiment: Experiment, device: torch.device):
    """The precision that the experiment trains, evaluates and samples in, as a context manager."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype_of(experiment, device) == torch.bfloat16)


def dtype_of(experiment: Experiment, device: torch.device) -> torch.dtype:
    """bfloat16 or float32, as ``Experiment.precision`` and the device say."""
    half = experiment.precision == "bfloat16"
    if experiment.precision == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if half else torch.float32


def is_compiled(experiment: Experiment, device: torch.device) -> bool:
    """Whether ``Experiment.compile`` means yes on this device."""
    return experiment.compile is True or (experiment.compile == "auto" and device.type == "cuda")
