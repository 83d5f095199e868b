"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from toolkit.cpu.allocator import keep_freed_memory
from toolkit.cpu.neighbours import watched
from toolkit.evaluation import evaluators, itemfile
from toolkit.evaluation.reader import reader_of
from toolkit.experiment import Experiment, Parts, autocast, micro_batch_size
from toolkit.loop import step as one_step
from toolkit.loop.prefetch import prefetch
from toolkit.loop.sampling import BrokenModel, generate
from toolkit.loop.scoring import evaluate
from toolkit.loop.signals import Interrupted, Signals
from toolkit.loop.spikes import Spikes
from toolkit.loop.stopwatch import Stopwatch
from toolkit.loop.trace import traced
from toolkit.parallel import distributed
from toolkit.probing.prober import Prober
from toolkit.seeding import named_seed
from toolkit.store import checkpoint
from toolkit.store.journal import Journal

log = logging.getLogger("toolkit")


class Diverged(Exception):
    """The loss or the gradient of a step is not finite. This step has not changed the weights."""


def train(
    experiment: Experiment,
    parts: Parts,
    run_dir: Path,
    device: torch.device,
    progress: dict[str, Any],
    signals: Signals,
    stop_at: int | None = None,
    peak_tokens_per_s: float | None = None,
) -> dict[str, object]:
    """Train from ``progress["step"]`` until ``Experiment.steps``, until ``stop_at``, or until a signal.

    ``stop_at`` does not change the learning rate schedule. Step s reports the loss before its update, so a row at step
    s and a checkpoint at step s describe the same weights. ``peak_tokens_per_s`` is the peak speed of all devices. If
    it is given, rows contain the fraction of it that the run reached (MFU).

    Returns {"state": "done" | "stopped" | "preempted", "step", "best"} with the latest metrics, and with "not_saved" if
    the best checkpoint could not be written. Raises Diverged, Interrupted for a signal before there was anything to
    save, and OSError if three saves in a row fail, or the last one."""
    data, model, optimizer = parts.data, parts.model, parts.optimizer
    world, rank, is_main = distributed.world_size(), distributed.rank(), distributed.rank() == 0
    micro_batch = micro_batch_size(experiment, world)
    start, best = progress["step"], progress["best"]
    best_at_start = best
    last = experiment.steps if stop_at is None else min(stop_at, experiment.steps)
    spikes = Spikes(experiment.spike_sigmas, progress.get("spikes"))
    keeper = checkpoint.Keeper(run_dir / "checkpoints", experiment.keep_checkpoints)
    if is_main:
        keeper.prune()  # a process that was killed while pruning may have left old checkpoints
        itemfile.remove_from(run_dir / itemfile.FOLDER, start)
    prober = Prober(experiment, parts, device, enabled=is_main)
    journal = Journal(run_dir, experiment.loggers, start, writing=is_main)

    module = one_step.training_module(experiment, parts.objective, device)
    micro_steps = range(start * experiment.accumulate, last * experiment.accumulate)
    batches = prefetch(data, "train", micro_batch, (i * world + rank for i in micro_steps), device)
    stopwatch = Stopwatch(start)
    tracing = traced(experiment.profile_steps if is_main else None, run_dir, device)
    neighbour_watch = watched(device, alone=world == 1)
    with contextlib.closing(batches), contextlib.closing(journal), tracing as trace_step, neighbour_watch:
        for step in range(start, last + 1):
            # ---- at some steps: evaluate, sample, save ------------------------------------------------------------
            stopwatch.pause()
            distributed.beat(step)
            signalled = distributed.any_of(signals.caught is not None, device)  # a signal to one process stops all
            is_final_step = step == experiment.steps
            try:
                if not signalled and (is_final_step or step % experiment.eval_every == 0):
                    with evaluation_mode(experiment, parts, device), signals.droppable(world == 1):
                        row = validate(experiment, parts, micro_batch, device, whole=is_final_step)
                        row |= measure(experiment, parts, run_dir, step) if is_main else {}
                    journal.row(step, row)
                    progress = progress | {"step": step, "best": min(best, row["val/loss_nats"])}
                    if row["val/loss_nats"] < best and (
                        not is_main or keeper.save("best", model, optimizer, progress, journal.covered(step))
                    ):
                        best = row["val/loss_nats"]
                if is_main and not signalled and step > 0 and (is_final_step or step % experiment.sample_every == 0):
                    with evaluation_mode(experiment, parts, device), signals.droppable(world == 1):
                        text = sample(experiment, parts, step)
                    journal.sample(step, text)
            except Interrupted:
                signalled = True  # a resumed run repeats what was interrupted
            except Exception:  # of an evaluator, for example: what was trained is kept, and a resumed run measures it
                if is_main and step > start:
                    progress = progress | {"step": step, "best": best, "spikes": spikes.state}
                    journal.sync()
                    keeper.save(f"step-{step:08d}", model, optimizer, progress, journal.covered(step), last=True)
                raise
            is_last_pass = signalled or step == last
            progress = progress | {"step": step, "best": best, "spikes": spikes.state}
            # A resumed run repeats an interrupted evaluation at ``start``. If this gives a new best score, save it.
            has_new_state = step > start or 0 < step and best < best_at_start
            if is_main and has_new_state and (is_last_pass or step % experiment.checkpoint_every == 0):
                journal.sync()
                covered = journal.covered(step)
                if keeper.save(f"step-{step:08d}", model, optimizer, progress, covered, last=is_last_pass):
                    keeper.prune()
            if is_last_pass:
                break
            prober.keep_weights(step)
            stopwatch.resume()

            # ---- one step -----------------------------------------------------------------------------------------
            one_step.set_learning_rate(optimizer, parts.schedule(step))
            micro_batches = [next(batches) for _ in range(experiment.accumulate)]
            with signals.droppable(step == start and world == 1):  # the first step may compile for a minute
                gradient = one_step.gradient(experiment, module, micro_batches, step, device)
            if not gradient.finite:
                if is_main and step > start:
                    journal.sync()
                    covered = journal.covered(step)
                    keeper.save(f"step-{step:08d}", model, optimizer, progress, covered)  # prunes none
                first = step * experiment.batch_size
                raise Diverged(
                    f"step {step}: loss {gradient.loss}, gradient norm {gradient.norm}, in training samples {first} to "
                    f"{first + experiment.batch_size - 1}; the weights and checkpoints are from before this step"
                )
            if spikes.is_spike(gradient.loss, gradient.norm):
                skipped = {"loss_nats": gradient.loss, "grad_norm": gradient.norm, "count": spikes.state["count"]}
                journal.row(step, {f"skipped/{name}": value for name, value in skipped.items()})
                optimizer.zero_grad(set_to_none=True)
            else:
                one_step.update(optimizer)
            if step == start and device.type == "cpu":
                keep_freed_memory()  # weights and optimizer state are allocated now
            trace_step()

            # ---- report -------------------------------------------------------------------------------------------
            if step % experiment.log_every == 0 or step == experiment.steps - 1:
                row = training_row(experiment, optimizer, step, gradient, stopwatch.seconds_per_step(step + 1))
                row |= {"time/mfu": row["time/tokens_per_s"] / peak_tokens_per_s} if peak_tokens_per_s else {}
                journal.row(step, row | {name: float(value) for name, value in gradient.metrics.items()})
            stopwatch.pause()
            prober.observe(step, journal)
            stopwatch.resume()

    state = "preempted" if signalled else "done" if is_final_step else "stopped"
    not_saved: dict[str, object] = {"not_saved": f"checkpoints/best: {keeper.lost}"} if keeper.lost else {}
    return {"state": state, "step": step, "best": best} | journal.latest | not_saved


def training_row(
    experiment: Experiment, optimizer: torch.optim.Optimizer, step: int, gradient: one_step.Gradient, seconds: float
) -> dict[str, float]:
    """The metrics of a training step that took ``seconds``."""
    tokens_per_step = experiment.batch_size * experiment.seq_len
    return {
        "tokens": step * tokens_per_step,
        "train/loss_nats": gradient.loss,
        "lr": max(group["lr"] for group in optimizer.param_groups),
        "grad_norm": gradient.norm,
        "time/step_ms": 1000 * seconds,
        "time/tokens_per_s": tokens_per_step / seconds,
    }


def validate(
    experiment: Experiment, parts: Parts, micro_batch: int, device: torch.device, whole: bool
) -> dict[str, float]:
    """Evaluate on ``eval_windows`` validation samples and, if ``whole``, also on the whole split. Returns metrics."""
    windows = {"val": experiment.eval_windows} | ({"val_full": parts.data.windows("val")} if whole else {})
    row: dict[str, float] = {}
    for name, count in windows.items():
        score = evaluate(parts.objective, parts.data, parts.tokenizer, micro_batch, count, device)
        row |= {f"{name}/{metric}": value for metric, value in score.items()}
    return row


def measure(experiment: Experiment, parts: Parts, run_dir: Path, step: int) -> dict[str, float]:
    """Measure with the experiment's evaluators, at the last step also with its final ones: a row of metrics."""
    chosen = parts.evaluators | (parts.final_evaluators if step == experiment.steps else {})
    if not chosen:
        return {}
    measured = evaluators.measure(chosen, reader_of(experiment, parts.model, parts.tokenizer))
    try:
        itemfile.write(run_dir / itemfile.FOLDER, step, measured)
    except OSError as error:  # toolkit.evaluate can measure a checkpoint again
        log.warning("the items measured at step %d are not saved: %s", step, error)
    return evaluators.row(measured)


def sample(experiment: Experiment, parts: Parts, step: int) -> str:
    """Generate text with the current weights; the same step always gives the same text.

    If the weights give no finite logits, return a note in place of the text. The next step then raises Diverged."""
    prompt, count, temperature = experiment.sample_prompt, experiment.sample_tokens, experiment.sample_temperature
    seed = named_seed(experiment.seed, "sample", step)
    try:
        return generate(parts.model, parts.tokenizer, prompt, count, temperature=temperature, seed=seed)
    except BrokenModel as error:
        return f"(no sample: {error})"


@contextlib.contextmanager
def evaluation_mode(experiment: Experiment, parts: Parts, device: torch.device) -> Iterator[None]:
    """Switch off dropout, use the run's precision, and use the optimizer's averaged weights if it has such weights."""
    parts.model.eval()
    try:
        with checkpoint.evaluation_weights(parts.model, parts.optimizer), autocast(experiment, device):
            yield
    finally:
        parts.model.train()
