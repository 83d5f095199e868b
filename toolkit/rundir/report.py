"""What commands print about a run: the header before the first step, the footer at the end, and the dry run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from toolkit.config.layers import Config
from toolkit.experiment import Experiment, Parts, dtype_of, micro_batch_size
from toolkit.output.terminal import Terminal, styled
from toolkit.parallel.distributed import process_count
from toolkit.rundir import facts
from toolkit.store.factsfile import Facts, Parameters

console = Terminal()


def say(text: str) -> None:
    """Print a text as it is, without wrapping its lines."""
    console.print(text, soft_wrap=True)


def resume_flags(run: Path) -> str:
    """The flags that continue a run."""
    runs = "" if run.parent == Path("runs") else f"--runs {shlex.quote(str(run.parent))} "
    return f"{runs}--name {shlex.quote(run.name)} --resume"


def header(run: Path, info: Facts, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Print architecture, parameters, the optimizer's parameter groups, the device, and the size of the data."""
    count = info["parameters"]
    console.print(styled((str(run), "bold"), f"  {_architecture(info['config'])}"), soft_wrap=True)
    console.print(parameter_table(model, count))
    for group in optimizer.param_groups:
        size = sum(parameter.numel() for parameter in group["params"])
        tensors = f"{len(group['params'])} tensors, {size:,} parameters"
        console.print(f"{type(optimizer).__name__}, {group['name']}: {tensors}, weight decay {group['weight_decay']:g}")
    threads = f", {info['threads']} thread{'s' if info['threads'] > 1 else ''}" if info["device"] == "cpu" else ""
    processes = f", {info['processes']} processes" if info["processes"] > 1 else ""
    compiled = "compiled" if info["compiled"] else "not compiled"
    console.print(f"{info['device_name']} ({info['device']}{threads}{processes}), {info['precision']}, {compiled}")
    console.print(f"attention: {info['attention']}")
    console.print(f"data: {info['windows']['train']:,} training windows, {info['windows']['val']:,} for validation\n")


def footer(run: Path, outcome: Mapping[str, Any], prompt: str) -> None:
    """Print the final validation loss, the last sample, where the curve is, and commands to try next. ``outcome``: see
    ``toolkit.training.train``."""
    loss = outcome.get("val_full/loss_nats")
    if loss is not None:
        bits = outcome["val_full/bits_per_byte"]
        console.print(f"\nvalidation, whole split: {loss:.4f} nats per token, {bits:.4f} bits per byte", style="bold")
    for name, value in outcome.items():
        if name.startswith("eval/"):
            say(f"{name}: {value:.4f}")
    samples = run / "samples.md"
    if samples.exists():
        last = re.split(r"(?m)^## step (\d+)$", samples.read_text(encoding="utf-8"))[-2:]
        console.print(f"sample at step {int(last[0]):,}:\n", style="dim")
        console.print(last[1].strip() + "\n")
    if outcome["state"] != "done":
        say(f"{outcome['state']} at step {outcome['step']:,}; continue with {resume_flags(run)}")
    say(f"curve: {run / 'curve.png'}")
    if (run / "probes.html").is_file():
        say(f"probes: {run / 'probes.html'}")
    say("next:")
    for command in (
        f"python -m toolkit.generate {shlex.quote(str(run))} --prompt {shlex.quote(prompt)}",
        f"python -m toolkit.evaluate {shlex.quote(str(run))}",
        f"tensorboard --logdir {shlex.quote(str(run.parent))}",
    ):
        console.print(f"  {command}", soft_wrap=True)


def dry_run(config: Config, experiment: Experiment, blank: Parts, as_json: bool) -> int:
    """Print the resolved config, parameters, FLOPs and memory of an experiment; returns the exit code. ``blank`` holds
    its parts, built on the meta device. ``as_json``: print one JSON object instead."""
    count = facts.parameters(blank.model)
    flops = facts.on_meta(facts.flops_per_token, blank.model, experiment.seq_len)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = dtype_of(experiment, device) == torch.bfloat16
    micro_batch = micro_batch_size(experiment, process_count(experiment.devices))
    shape = (micro_batch, experiment.seq_len)
    size = facts.on_meta(facts.memory, blank.objective, blank.optimizer, *shape, half)
    if as_json:
        record = {
            "parameters": count["total"],
            "parameters_non_embedding": count["non_embedding"],
            "parameters_active": count["active"],
            "parameters_padding": count["padding"],
            "flops_per_token": flops,
            "memory_bytes": size,
            "config": config.flat,
        }
        say(json.dumps(record))
        return 0
    say(config.text)
    console.print(parameter_table(blank.model, count))
    if flops is not None:
        console.print(f"training FLOPs per token: {flops:,} (forward and backward, causal)")
    if size is not None:
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in size.items())
        whole = f"{sum(size.values()) / 2**30:.1f} GiB"
        say(f"memory, estimated for a micro-batch of {micro_batch}: {whole} ({parts})")
    return 0


def parameter_table(model: torch.nn.Module, count: Parameters) -> Table:
    """A table of a model's parameters, with one row for the layers of a stack."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("parameters", "shape"):
        table.add_column(title)
    for title in ("count", "share"):
        table.add_column(title, justify="right")
    everything = count["total"] + count["padding"]
    for name, shape, size in facts.parameter_table(model):
        table.add_row(name, shape, f"{size:,}", f"{size / everything:.1%}")
    if count["padding"]:
        table.add_row("rows that pad the vocabulary", "", f"-{count['padding']:,}", "")
    table.add_row(styled(("total", "bold")), "", styled((f"{count['total']:,}", "bold")), "")
    table.add_row("without embeddings", "", f"{count['non_embedding']:,}", "")
    if count["active"] != count["total"]:
        table.add_row("active per token", "", f"{count['active']:,}", "")
    return table


def _architecture(config: dict[str, object]) -> str:
    """A flat config's model in one line: its sizes and the parts in its slots."""
    model = str(config["Experiment.model"]).removeprefix("@")
    knobs = {key.removeprefix(f"{model}."): value for key, value in config.items() if key.startswith(f"{model}.")}
    sizes = [
        f"{knobs[key]:,} {word}"
        for key, word in (("dim", "wide"), ("n_layer", "layers"), ("n_head", "heads"))
        if key in knobs
    ]
    slots = [str(knobs[s]).replace("@", "") for s in ("block", "norm", "position", "attention", "ffn") if s in knobs]
    context = f"context {config['Experiment.seq_len']:,}"
    return f"{model}: {', '.join([*sizes, context])}; {', '.join(slots)}"
