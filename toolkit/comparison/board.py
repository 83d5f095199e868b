"""Writes the comparison for TensorBoard: a session of the HPARAMS tab for each run, with arm, seed and changes."""

from __future__ import annotations

from pathlib import Path

from toolkit.comparison.guards import independent
from toolkit.comparison.results import Comparison
from toolkit.output.escape import line, markdown


def write(comparison: Comparison, folder: Path) -> None:
    """Write ``folder/RUN/`` for each run, replacing older event files. View it with ``tensorboard --logdir folder``."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    runs = [*(run for arm in comparison.arms for run in arm.runs if run.facts), *comparison.selection]
    base = next((run.config for run in runs if run.arm == comparison.plan.baseline), {})
    keys = {key for run in runs for key in independent(base, run.config)}
    verdicts = {arm.name: arm.judgement.verdict.word if arm.judgement else "baseline" for arm in comparison.arms}
    for run in runs:
        for old in (folder / run.name).glob("events.out.tfevents.*"):
            old.unlink()
        settings = {"arm": run.arm, "seed": run.seed, "purpose": run.purpose, "verdict of the arm": verdicts[run.arm]}
        settings |= {key: run.config.get(key, "absent") for key in sorted(keys)}
        settings = {line(key): _plain(value) for key, value in settings.items()}
        # Not add_hparams: it would open another run, named after the time. The first of the three protos is not
        # written, since it would fix the columns; without it, the columns are the union over all runs.
        _, start, end = hparams(settings, {})
        writer = SummaryWriter(str(folder / run.name))
        assert writer.file_writer is not None  # it is open until close()
        writer.file_writer.add_summary(start, 0)
        value = run.value(comparison.metric)
        if value is not None:
            writer.add_scalar(comparison.metric, value, run.steps)
        writer.add_scalar("finished", float(value is not None), run.steps)
        for excluded, reason in comparison.excluded:
            writer.add_text("excluded by hand", markdown("{}: {}", excluded.name, reason), 0)
        writer.file_writer.add_summary(end, run.steps)
        writer.close()


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float) else line(value)
