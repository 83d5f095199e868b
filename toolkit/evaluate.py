"""``python -m toolkit.evaluate RUN [OVERLAY.gin ...]``: nats per token and bits per byte of a checkpoint on a split."""

from __future__ import annotations

import argparse
import json
import math

from toolkit.command import run_command


def evaluate(objective, data, tokenizer, batch: int, windows: int, device, split: str = "val") -> dict[str, float]:
    """Plain cross-entropy over the first ``windows`` samples of a split: {"loss_nats" per token, "bits_per_byte"}.
    Bytes are those of the text that the predicted tokens stand for; specials count none. The samples are shared out
    over the processes of a data-parallel run; a last batch is filled up with targets that don't count."""
    import torch

    from toolkit import distributed
    from toolkit.prefetch import prefetch

    windows = min(windows, data.windows(split))
    lengths = torch.as_tensor(tokenizer.byte_lengths, device=device)
    rank, world = distributed.rank(), distributed.world_size()
    totals = torch.zeros(3, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    with torch.no_grad():
        mine = range(rank, -(-windows // batch), world)
        for index, (ids, targets) in zip(
            mine, prefetch(lambda i: data.batch(split, i, batch), mine, device), strict=True
        ):
            targets[max(0, windows - index * batch) :] = -100
            _, nats, count, _ = objective(ids, targets)
            size = lengths[targets.clamp_min(0)] * (targets != -100)
            totals += torch.stack((nats, count, size.sum())).to(totals)
    nats, count, size = distributed.total(totals).tolist()
    return {"loss_nats": nats / count, "bits_per_byte": nats / (math.log(2) * size) if size else math.nan}


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    from rich.console import Console

    from toolkit.compose import open_run
    from toolkit.objective import Objective
    from toolkit.train import autocast

    run = open_run(arguments.run, overlays=arguments.overlays, bindings=arguments.bindings)
    experiment, device = run.experiment, run.device
    data = experiment.data(run.tokenizer, experiment.seq_len, experiment.seed)
    data.prepare()
    objective = Objective(run.model, experiment.loss(), run.tokenizer.eot if experiment.mask_documents else None)
    windows = data.windows(arguments.split)
    batch = max(1, experiment.batch_size // experiment.accumulate)
    with autocast(experiment, device):
        score = evaluate(objective, data, run.tokenizer, batch, windows, device, arguments.split)
    facts = {"checkpoint": str(run.checkpoint), "split": arguments.split, "windows": windows}
    if arguments.json:
        print(json.dumps(facts | score))
    else:
        console = Console(highlight=False)
        console.print(
            f"{run.checkpoint}, split {arguments.split}: {windows:,} windows of {experiment.seq_len:,} tokens"
        )
        console.print(f"{score['loss_nats']:.4f} nats per token, perplexity {math.exp(score['loss_nats']):.2f}")
        console.print(f"{score['bits_per_byte']:.4f} bits per byte")
    return 0


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m toolkit.evaluate", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "run", metavar="RUN|CHECKPOINT", help="a run (its best checkpoint is used) or a checkpoint folder"
    )
    parser.add_argument(
        "overlays", metavar="OVERLAY.gin", nargs="*", help="laid over the run's config: other text, say"
    )
    parser.add_argument("-p", "--gin_param", dest="bindings", metavar="BINDING", action="append", default=[])
    parser.add_argument("--split", choices=("val", "train"), default="val", help="which split to read (default val)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    run_command(main)
