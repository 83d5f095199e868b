"""Loggers: show the metrics of a run. The loop itself writes them to metrics.jsonl, so no result depends on a
logger."""

from __future__ import annotations

import atexit
import contextlib
import csv
import html
import json
import math
import os
import secrets
import sys
import textwrap
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic, sleep, time
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import rich.console
from annotated_types import Gt
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

from toolkit.registry import register
from toolkit.store import journal
from toolkit.store.factsfile import Facts

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter


@register("logger")
class Console:
    """A progress bar in a terminal, elsewhere plain lines; at each evaluation a line for each evaluator.

    ``seconds`` is the shortest time between two lines about training. The time left is estimated from the last 500
    rows, by the clock. So it includes evaluations, but not what came before the first row, such as compilation."""

    def __init__(self, run_dir: Path, start_step: int, seconds: Annotated[float, Gt(0)] = 10.0):
        self.steps, self.seconds = _facts(run_dir)["steps"], seconds
        self.width = len(f"{self.steps:,}")
        self.rows: deque[tuple[float, int]] = deque(maxlen=500)  # (clock, step) of recent training rows
        self.last_shown, self.val = -math.inf, ""
        self.bar: Progress | None = None
        live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.console = _Screen(force_terminal=live, force_jupyter=False, markup=False, highlight=False)
        if live:
            columns: list[ProgressColumn] = [TextColumn("{task.completed:,}/{task.total:,}", style="bold")]
            columns += [BarColumn(bar_width=None)] if self.console.width >= 80 else []
            columns += [TextColumn("{task.fields[status]}")]
            # No refresh thread: it would compete with the training loop, and data workers would inherit it by fork.
            self.bar = Progress(*columns, console=self.console, auto_refresh=False, expand=True)
            self.task = self.bar.add_task("", total=self.steps, completed=start_step, status="[dim]first steps ...")
            self.bar.start()
            self.console.show_cursor(True)  # if hidden, it would stay hidden after the process is killed
            atexit.register(self.bar.stop)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "val/loss_nats" in metrics:
            self.val = f"{metrics['val/loss_nats']:.4f}"
            for result in _evaluation(f"step {step:>{self.width},}", metrics, self.console.width):
                self._print(result)
        if "train/loss_nats" not in metrics:
            return
        now = monotonic()
        self.rows.append((now, step))
        due = now - self.last_shown >= (0.1 if self.bar else self.seconds) or len(self.rows) <= 3 or step >= self.steps
        self.last_shown = now if due else self.last_shown
        loss, speed = f"{metrics['train/loss_nats']:.4f}", _short(metrics.get("time/tokens_per_s", math.nan))
        left = _time_left(self.steps, self.rows, metrics.get("time/step_ms", math.nan))
        if self.bar:
            val = f"   [dim]val[/] {self.val}" if self.val else ""
            status = f"[dim]loss[/] [cyan]{loss}[/]{val}   {speed} [dim]tok/s[/]   {left} [dim]left[/]"
            self.bar.update(self.task, completed=step, status=status, refresh=due)
        elif due:
            line = f"step {step:>{self.width},}/{self.steps:,}   loss {loss}   {speed} tokens/s   {left} left"
            self._print(line)

    def text(self, step: int, name: str, text: str) -> None:
        title, short = f"{name} at step {step:,}", _printable(text, 300, self.console.encoding)
        if self.bar:
            self._print(Panel(short, title=title, title_align="left", style="dim", padding=(0, 1)), soft_wrap=False)
        else:
            self._print(f"{title}\n{textwrap.indent(short, '  ')}")

    def close(self, summary: dict[str, float]) -> None:
        if self.bar:
            self.bar.stop()
            atexit.unregister(self.bar.stop)
        if summary:
            self._print(_results("final", summary))

    def _print(self, content: str | Text | Panel, soft_wrap: bool = True) -> None:
        try:
            self.console.print(content, soft_wrap=soft_wrap)
        except OSError:  # stdout is a file on a full disk; the text in its buffer would raise again at exit
            self.console.mute()
            raise


class _Screen(rich.console.Console):
    """A console that falls silent when its reader is gone (``| head``), where rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.mute()

    def mute(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@register("logger")
class TensorBoard:
    """TensorBoard event files in the run's folder. ``tensorboard --logdir runs`` lists the runs by name, and its tab
    HPARAMS compares them. ``flush_seconds`` is the longest time until an entry is written."""

    def __init__(self, run_dir: Path, start_step: int, flush_seconds: Annotated[int, Gt(0)] = 10):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        facts, config = _facts(run_dir), (Path(run_dir) / "config.gin").read_text(encoding="utf-8")
        # purge_step hides entries of an earlier process from start_step on, so that each step appears once.
        open_writer = partial(SummaryWriter, str(run_dir), purge_step=start_step, flush_secs=flush_seconds)
        self.writer = _open_last(Path(run_dir), open_writer)
        self.step, self.seen = start_step, _logged_before(Path(run_dir), start_step)
        self.writer.add_text("config", _code_block(config), start_step)
        # The first of the three protos lists the columns. It is left out: TensorBoard would use the list of the first
        # run that it reads, and hide knobs that only other runs have. Without a list it shows the knobs of all runs.
        _, start, self.end = hparams(_settings(facts), {})
        self._add_summary(start, start_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.step = step
        self.seen.update(metrics)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write all entries to the file. Called at each checkpoint."""
        self.writer.flush()

    def text(self, step: int, name: str, text: str) -> None:
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 100) or [""]]
        self.writer.add_text(name, _code_block("\n".join(lines)), step)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self.writer.add_histogram(name, values, step)

    def close(self, summary: dict[str, float]) -> None:
        # HPARAMS shows the last value of each scalar, so a metric that was logged before needs no second point.
        for name in summary.keys() - self.seen:
            self.writer.add_scalar(name, summary[name], self.step)
        self._add_summary(self.end, self.step)
        self.writer.close()

    def _add_summary(self, summary: object, step: int) -> None:
        self.writer.file_writer.add_summary(summary, step)  # type: ignore[attr-defined]  # torch declares it as None


@register("logger")
class CSV:
    """metrics.csv, with one row for each call of ``log``. Training and evaluation of one step are two rows of the same
    table. The first columns are the same in every run; each further metric gets a column at the end."""

    def __init__(self, run_dir: Path, start_step: int):
        self.path = Path(run_dir) / "metrics.csv"
        self.columns = ["step", "tokens", "train/loss_nats", "lr", "grad_norm", "time/step_ms", "time/tokens_per_s"]
        self.columns += ["val/loss_nats", "val/bits_per_byte"]
        before = self._read() if self.path.exists() else []
        self._rewrite([row for row in before if (row["step"] or "").isdigit() and int(row["step"]) < start_step])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        new = [name for name in metrics if name not in self.columns]
        if new:
            before = self._read()
            self.columns += new
            self.file.close()
            self._rewrite(before)
        with _closing_on_error(self.file):
            self.writer.writerow({"step": step, **metrics})

    def text(self, step: int, name: str, text: str) -> None:
        """Does nothing: samples.md contains the text."""

    def close(self, summary: dict[str, float]) -> None:
        self.file.close()

    def _read(self) -> list[dict[str, str]]:
        text = self.path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]  # without the half line that a killed process may have left
        rows = csv.DictReader(complete.splitlines())
        self.columns += [name for name in rows.fieldnames or [] if name not in self.columns]
        return [{"step": "", **row} for row in rows]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        draft = self.path.with_name("metrics.csv.tmp")
        # Line buffering writes each row at once. The open file stays valid when it is renamed.
        self.file = open(draft, "w", encoding="utf-8", newline="", buffering=1)
        self.writer = csv.DictWriter(self.file, self.columns, extrasaction="ignore", lineterminator="\n")
        with _closing_on_error(self.file):  # on a full disk, the old table stays
            self.writer.writeheader()
            self.writer.writerows(rows)
        os.replace(draft, self.path)


@register("logger")
class WandB:
    """Weights & Biases, with files in the run's folder. If the server can't be reached within ten seconds, the run is
    logged offline, for a later ``wandb sync``. A resumed run keeps its id.

    project   the project on the server
    mode      "online", "offline" or "disabled"; None: wandb's own choice
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        project: str = "gpt-ablation",
        mode: Literal["online", "offline", "disabled"] | None = None,
    ):
        try:
            import wandb
        except ImportError as error:
            remedy = 'python -m pip install -e ".[wandb]"'
            raise ValueError(
                f"WandB needs the wandb package: {remedy}, or remove it from Experiment.loggers"
            ) from error
        facts, stored = _facts(run_dir), Path(run_dir) / "wandb_id"
        if start_step == 0 or not stored.exists():
            stored.write_text(secrets.token_hex(4))
        # console="off": wandb's capture of the console would disturb the progress bar.
        settings = wandb.Settings(init_timeout=10, login_timeout=30, finish_timeout=30, console="off", quiet=True)
        config = facts["config"] | {"facts": {name: value for name, value in facts.items() if name != "config"}}
        chosen = {"project": project, "name": facts["name"], "id": stored.read_text().strip(), "config": config}
        chosen |= {"dir": str(run_dir), "settings": settings, "resume": "allow"}
        try:
            self.run = wandb.init(mode=mode, **chosen)
        except wandb.errors.UsageError as error:
            raise ValueError(f"WandB: {error} (to log offline, set WandB.mode = 'offline')") from error
        except wandb.errors.CommError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"W&B isn't reachable; this run is logged offline, for wandb sync ({reason})", stacklevel=2)
            wandb.teardown()  # otherwise the id counts as in use
            self.run = wandb.init(mode="offline", **chosen)
        self.html, self.as_histogram = wandb.Html, wandb.Histogram
        self.first = self.run.step  # the server ignores steps before its last one

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step >= self.first:
            self.run.log(metrics, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        page = self.html(f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>', inject=False)
        self.log(step, {name: page})

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self.log(step, {name: self.as_histogram(values)})

    def close(self, summary: dict[str, float]) -> None:
        self.run.summary.update(summary)
        self.run.finish()


def _logged_before(run_dir: Path, start_step: int) -> set[str]:
    """The names of the metrics that were logged before the step at which a resumed run continues."""
    rows = journal.read(run_dir / "metrics.jsonl") if start_step else []
    return {name for row in rows if row["step"] < start_step for name in row}


def _open_last(run_dir: Path, open_writer: Callable[[], SummaryWriter]) -> SummaryWriter:
    """Open a writer whose file name sorts after those of all earlier event files.

    TensorBoard reads the files in the order of their names, and the new file's purge_step must come after the entries
    that it hides. A name starts with the time in seconds, then has the process id as text, so that "10" sorts before
    "9". If an earlier file of the same second sorts later, this waits for the next second."""
    earlier = set(run_dir.glob("events.out.tfevents.*"))
    writer = open_writer()
    path = max(set(run_dir.glob("events.out.tfevents.*")) - earlier)
    if all(name < path for name in earlier):
        return writer
    writer.close()
    path.unlink()
    sleep(1.01 - time() % 1)
    return open_writer()


@contextlib.contextmanager
def _closing_on_error(file: IO[str]) -> Iterator[None]:
    """Close a file that can't be written. Otherwise its buffer would raise again when Python collects it."""
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError):
            file.close()
        raise


def _facts(run_dir: Path) -> Facts:
    return json.loads((Path(run_dir) / "facts.json").read_text(encoding="utf-8"))


def _settings(facts: Facts) -> dict[str, float | str]:
    """The knobs that distinguish runs in a table, as numbers and short text. ``log_every`` and the like do not."""
    settings = {"seed": facts.get("seed"), "device": facts.get("device"), "precision": facts.get("precision")}
    knobs: dict[str, Any] = facts["config"] | settings
    knobs = {name: value for name, value in knobs.items() if value is not None and not name.endswith("_every")}
    plain = {name: value if type(value) in (int, float, str) else json.dumps(value) for name, value in knobs.items()}
    return {name: value for name, value in plain.items() if not isinstance(value, str) or len(value) <= 100}


def _code_block(text: str) -> str:
    """Format text as a Markdown code block. It is indented, not fenced, so that nothing in the text can end it."""
    return textwrap.indent(text, "    ", lambda line: True)


def _results(label: str, metrics: dict[str, float]) -> Text:
    """One line: the label, then those losses that ``metrics`` has."""
    line = Text(label, style="dim")
    shown = ("train/loss_nats", "train loss ", " nats"), ("val/loss_nats", "val loss ", " nats")
    for name, before, after in (*shown, ("val/bits_per_byte", "", " bits/byte")):
        if name in metrics:
            line.append(f"   {before}", "not dim").append(f"{metrics[name]:.4f}", "not dim bold green")
            line.append(after, "not dim")
    return line


def _evaluation(label: str, metrics: dict[str, float], width: int) -> Iterator[Text]:
    """The losses, and a line for each evaluator: its name, and those of its metrics that fit into ``width`` terminal
    columns. What the names of all its metrics begin with, as nats_at/1-1 and nats_at/2-3, follows its own name."""
    yield _results(label, metrics)
    values_of: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if name.startswith("eval/"):
            _, evaluator, metric = name.split("/", 2)
            values_of.setdefault(evaluator, {})[metric] = value
    for evaluator, values in values_of.items():
        shared = os.path.commonprefix(list(values)).rpartition("/")[0] if len(values) > 1 else ""
        line = Text(" " * (len(label) + 3)).append(f"{evaluator}/{shared}".rstrip("/"), "dim")
        for place, (metric, value) in enumerate(values.items()):
            name, left = f"   {metric.removeprefix(f'{shared}/')} ", len(values) - place
            needed = len(name) + len(f"{value:.4f}") + (len(f"   {left - 1} more") if left > 1 else 0)
            if place and len(line) + needed > width:
                line.append(f"   {left} more", "dim")
                break
            line.append(name).append(f"{value:.4f}", "bold green")
        yield line


def _time_left(steps: int, rows: deque[tuple[float, int]], step_ms: float) -> str:
    """The time left as h:mm:ss, from (clock, step) of recent rows. With one row, from the time of its last step."""
    (then, first), (now, step) = rows[0], rows[-1]
    per_step = (now - then) / (step - first) if step > first else step_ms / 1000
    seconds = max(0, steps - step) * per_step
    if not 0 <= seconds < 1e8:  # also if it is nan
        return "-:--:--"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def _short(value: float) -> str:
    """A number with three digits: 987, 15.2k, 152k, 1.52M."""
    if not math.isfinite(value):
        return "-"
    size, letter = next((s for s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= 0.9995 * s[0]), (1, ""))
    return f"{value / size:.3g}{letter}" if abs(value) < 999.5 * size else f"{value / size:.0f}{letter}"


def _printable(text: str, limit: int, encoding: str) -> str:
    """The first ``limit`` characters of a text that a model wrote. Control characters and letters that the terminal
    can't show are replaced."""
    short = text[:limit] + (" ..." if len(text) > limit else "")
    short = "".join(c if c.isprintable() or c == "\n" else " " for c in short).strip()
    return short.encode(encoding, "replace").decode(encoding)
