"""The loop that trains an experiment, read from top to bottom."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from toolkit.cpu.allocator import keep_freed_memory
from toolkit.cpu.neighbours import watched
from toolkit.experiment import Experiment, Parts, autocast, is_compiled, micro_batch_size
from toolkit.loop import step as one_step
from toolkit.loop.prefetch import prefetch
from toolkit.loop.sampling import BrokenModel, generate
from toolkit.loop.scoring import evaluate
from toolkit.loop.signals import Interrupted, Signals
from toolkit.loop.spikes import Spikes
from toolkit.loop.trace import traced
from toolkit.parallel import distributed
from toolkit.seeding import named_seed
from toolkit.store import checkpoint
from toolkit.store.journal import Journal


class Diverged(Exception):
    """Loss or gradient is not finite; the weights are still those before that step."""


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
    micro_batch = micro_batch_size(experiment, world)
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
            one_step.set_learning_rate(optimizer, parts.schedule(step))
            micro_batches = [next(batches) for _ in range(experiment.accumulate)]
            with signals.droppable(step == start and world == 1):  # the first step compiles: that may take a minute
                gradient = one_step.gradient(experiment, module, micro_batches, step, device)
            if not gradient.finite:
                if main and step > start:
                    journal.sync()
                    written = journal.covered(step)
                    keeper.save(f"step-{step:08d}", model, optimizer, progress, written)  # and the older ones stay
                first = step * experiment.batch_size
                raise Diverged(
                    f"step {step}: loss {gradient.loss}, gradient norm {gradient.norm}, in training samples {first} to "
                    f"{first + experiment.batch_size - 1}; weights and checkpoints are those before it"
                )
            if spikes.is_spike(gradient.loss, gradient.norm):
                skipped = {"loss_nats": gradient.loss, "grad_norm": gradient.norm, "count": spikes.state["count"]}
                journal.row(step, {f"skipped/{name}": value for name, value in skipped.items()})
                optimizer.zero_grad(set_to_none=True)
            else:
                one_step.update(optimizer)
            if step == start and device.type == "cpu":
                keep_freed_memory()  # weights and optimizer state have their places now
            trace_step()

            # ---- report -------------------------------------------------------------------------------------------
            if step % experiment.log_every == 0 or step == experiment.steps - 1:
                seconds = (time.perf_counter() - since) / (step + 1 - since_step)
                since, since_step = time.perf_counter(), step + 1
                row = {
                    "tokens": step * tokens_per_step,
                    "train/loss_nats": gradient.loss,
                    "lr": max(group["lr"] for group in optimizer.param_groups),
                    "grad_norm": gradient.norm,
                    "time/step_ms": 1000 * seconds,
                    "time/tokens_per_s": tokens_per_step / seconds,
                }
                row |= {"time/mfu": row["time/tokens_per_s"] / peak_tokens_per_s} if peak_tokens_per_s else {}
                journal.row(step, row | {name: float(value) for name, value in gradient.metrics.items()})

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
