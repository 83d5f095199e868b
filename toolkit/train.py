"""The experiment, and the loop that trains it, read from top to bottom."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from toolkit.cpu.allocator import keep_freed_memory
from toolkit.cpu.neighbours import watched
from toolkit.loop.prefetch import prefetch
from toolkit.loop.sampling import BrokenModel, generate
from toolkit.loop.scoring import evaluate
from toolkit.loop.signals import Interrupted, Signals
from toolkit.loop.spikes import Spikes
from toolkit.loop.trace import traced
from toolkit.objective import Objective
from toolkit.parallel import distributed
from toolkit.registry import able, register
from toolkit.seeding import named_seed
from toolkit.store import checkpoint
from toolkit.store.journal import Journal

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


class Diverged(Exception):
    """Loss or gradient is not finite; the weights are still those before that step."""


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


def train(
    experiment: Experiment,
    parts: Parts,
    run_dir: Path,
    device: torch.device,
    progress: dict,
    signals: Signals,
    stop_at: int | None = None,
    peak_tokens_per_s: float | None = None,
) -> dict[str, object]:
    """Train from ``progress["step"]`` to the end, to ``stop_at`` (the schedule keeps its horizon), or to a signal.

    Step s reports the loss before its update, so a row at step s and a checkpoint at step s speak of the same weights.
    Where it is known what the devices could do at their peak, rows tell the share of it that was reached (MFU).
    Returns {"state": "done" | "stopped" | "preempted", "step", final values}, and "not_saved" where the disk refused
    the best checkpoint. Raises Diverged; Interrupted for a signal before there was anything to save; OSError when the
    disk refuses three saves in a row, or the last one."""
    data, model, optimizer = parts.data, parts.model, parts.optimizer
    world, rank, main = distributed.world_size(), distributed.rank(), distributed.rank() == 0
    micro_batch = experiment.batch_size // (experiment.accumulate * world)
    tokens_per_step = experiment.batch_size * experiment.seq_len
    start, best = progress["step"], progress["best"]
    best_before = best
    last = experiment.steps if stop_at is None else min(stop_at, experiment.steps)
    spikes = Spikes(experiment.spike_sigmas, progress.get("spikes"))
    keeper = checkpoint.Keeper(run_dir / "checkpoints", experiment.keep_checkpoints)
    if main:
        keeper.prune()  # a process that was killed while it deleted an old one may have saved its last
    journal = Journal(run_dir, experiment.loggers, start, writing=main)

    if is_compiled(experiment, device):
        parts.objective.compile(fullgraph=True, dynamic=False)
    module = parts.objective
    if world > 1:
        module = DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)
    micro_steps = range(start * experiment.accumulate, last * experiment.accumulate)
    batches = prefetch(lambda i: data.batch("train", i, micro_batch), (i * world + rank for i in micro_steps), device)
    since, since_step = time.perf_counter(), start

    tracing = traced(experiment.profile_steps if main else None, run_dir, device)
    watching = watched(device) if world == 1 else contextlib.nullcontext()
    with contextlib.closing(batches), contextlib.closing(journal), tracing as trace_step, watching:
        for step in range(start, last + 1):
            # ---- once in a while: evaluate, sample, save ----------------------------------------------------------
            pause = time.perf_counter()
            distributed.beat(step)
            told = torch.tensor(float(signals.caught is not None), device=device)
            signalled = distributed.total(told).item() > 0  # a signal to one process stops them all
            ending = step == experiment.steps
            try:
                if not signalled and (ending or step % experiment.eval_every == 0):
                    with _as_judged(experiment, model, optimizer, device), signals.droppable(world == 1):
                        row = judge(experiment, parts, micro_batch, device, whole=ending)
                    journal.row(step, row)
                    progress = progress | {"step": step, "best": min(best, row["val/loss_nats"])}
                    if row["val/loss_nats"] < best and (
                        not main or keeper.save("best", model, optimizer, progress, journal.covered(step))
                    ):
                        best = row["val/loss_nats"]
                if main and not signalled and step > 0 and (ending or step % experiment.sample_every == 0):
                    with _as_judged(experiment, model, optimizer, device), signals.droppable(world == 1):
                        text = sample(experiment, parts, step)
                    journal.sample(step, text)
            except Interrupted:
                signalled = True  # the resumed run begins with what was dropped
            stopping = signalled or step == last
            progress = progress | {"step": step, "best": best, "spikes": spikes.state}
            unsaved = step > start or 0 < step and best < best_before  # then what was dropped is done now
            if main and unsaved and (stopping or step % experiment.checkpoint_every == 0):
                journal.sync()
                written = journal.covered(step)
                if keeper.save(f"step-{step:08d}", model, optimizer, progress, written, last=stopping):
                    keeper.prune()
            if stopping:
                break
            since += time.perf_counter() - pause

            # ---- one step -----------------------------------------------------------------------------------------
            multiple = parts.schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * multiple
            micro_batches = [next(batches) for _ in range(experiment.accumulate)]
            count = distributed.total(sum((targets != -100).sum() for _, targets in micro_batches))
            nats = torch.zeros((), device=device)
            with signals.droppable(step == start and world == 1):  # the first step compiles: that may take a minute
                for micro, (ids, targets) in enumerate(micro_batches):
                    torch.manual_seed(named_seed(experiment.seed, "noise", step, micro, rank))
                    silent = world > 1 and micro < experiment.accumulate - 1
                    with module.no_sync() if silent else contextlib.nullcontext():
                        with autocast(experiment, device):
                            objective, summed, _, metrics = module(ids, targets)
                        (objective * (world / count)).backward()  # data parallelism averages over the processes
                    nats += summed
            norm = nn.utils.clip_grad_norm_(model.parameters(), experiment.clip or math.inf).item()
            loss = (distributed.total(nats) / count).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                if main and step > start:
                    journal.sync()
                    written = journal.covered(step)
                    keeper.save(f"step-{step:08d}", model, optimizer, progress, written)  # and the older ones stay
                first = step * experiment.batch_size
                raise Diverged(
                    f"step {step}: loss {loss}, gradient norm {norm}, in training samples {first} to "
                    f"{first + experiment.batch_size - 1}; weights and checkpoints are those before it"
                )
            if spikes.is_spike(loss, norm):
                count_skipped = spikes.state["count"]
                journal.row(
                    step, {"skipped/loss_nats": loss, "skipped/grad_norm": norm, "skipped/count": count_skipped}
                )
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == start and device.type == "cpu":
                keep_freed_memory()  # weights and optimizer state have their places now
            trace_step()

            # ---- report -------------------------------------------------------------------------------------------
            if step % experiment.log_every == 0 or step == experiment.steps - 1:
                seconds = (time.perf_counter() - since) / (step + 1 - since_step)
                since, since_step = time.perf_counter(), step + 1
                row = {
                    "tokens": step * tokens_per_step,
                    "train/loss_nats": loss,
                    "lr": max(group["lr"] for group in optimizer.param_groups),
                    "grad_norm": norm,
                    "time/step_ms": 1000 * seconds,
                    "time/tokens_per_s": tokens_per_step / seconds,
                }
                row |= {"time/mfu": row["time/tokens_per_s"] / peak_tokens_per_s} if peak_tokens_per_s else {}
                journal.row(step, row | {name: float(value) for name, value in metrics.items()})

    state = "preempted" if signalled else "done" if ending else "stopped"
    not_saved = {"not_saved": f"checkpoints/best: {keeper.lost}"} if keeper.lost else {}
    return {"state": state, "step": step, "best": best} | journal.latest | not_saved


def judge(
    experiment: Experiment, parts: Parts, micro_batch: int, device: torch.device, whole: bool
) -> dict[str, float]:
    """Validation over ``eval_windows`` samples, and over the ``whole`` split: a row of metrics."""
    windows = {"val": experiment.eval_windows} | ({"val_full": parts.data.windows("val")} if whole else {})
    row = {}
    for name, count in windows.items():
        score = evaluate(parts.objective, parts.data, parts.tokenizer, micro_batch, count, device)
        row |= {f"{name}/{metric}": value for metric, value in score.items()}
    return row


def sample(experiment: Experiment, parts: Parts, step: int) -> str:
    """Text from the model as it is, the same whenever this step is sampled; or why there is none: that the weights are
    broken is for the next step's loss to tell, which ends the run as diverged."""
    options = {"temperature": experiment.sample_temperature, "seed": named_seed(experiment.seed, "sample", step)}
    try:
        return generate(parts.model, parts.tokenizer, experiment.sample_prompt, experiment.sample_tokens, **options)
    except BrokenModel as error:
        return f"(no sample: {error})"


@contextlib.contextmanager
def _as_judged(experiment: Experiment, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device):
    """Without dropout, in the run's precision, and with the weights to judge by where the optimizer keeps others."""
    model.eval()
    try:
        with checkpoint.evaluation_weights(model, optimizer), autocast(experiment, device):
            yield
    finally:
        model.train()
