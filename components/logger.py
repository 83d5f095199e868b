"""Loggers show a run while metrics.jsonl, which the loop writes itself, keeps it: losing one loses no result."""

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic, sleep, time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import rich.console
from annotated_types import Gt
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from toolkit.registry import register
from toolkit.store import journal
from toolkit.store.factsfile import Facts

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@register("logger")
class Console:
    """A progress bar in a terminal; elsewhere plain lines, training rows at most every ``seconds``.

    Time left comes from the wall clock over the last 500 rows: evaluations count in their due share, while the start
    (compilation, the evaluation at step 0) and steps done before a resume don't count at all.
    """

    def __init__(self, run_dir: Path, start_step: int, seconds: Annotated[float, Gt(0)] = 10.0):
        self.steps, self.seconds = _facts(run_dir)["steps"], seconds
        self.width = len(f"{self.steps:,}")
        self.rows, self.shown, self.val, self.bar = deque(maxlen=500), -math.inf, "", None
        live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.console = rich.console.Console(force_terminal=live, force_jupyter=False, markup=False, highlight=False)
        self.console.on_broken_pipe = partial(_mute, self.console)
        if live:
            columns = [TextColumn("{task.completed:,}/{task.total:,}", style="bold")]
            columns += [BarColumn(bar_width=None)] if self.console.width >= 80 else []
            columns += [TextColumn("{task.fields[status]}")]
            # No refresh thread: it would take turns with the training loop and be forked along with data workers.
            self.bar = Progress(*columns, console=self.console, auto_refresh=False, expand=True)
            self.task = self.bar.add_task("", total=self.steps, completed=start_step, status="[dim]first steps ...")
            self.bar.start()
            self.console.show_cursor(True)  # a killed process could not bring it back
            atexit.register(self.bar.stop)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "val/loss_nats" in metrics:
            self.val = f"{metrics['val/loss_nats']:.4f}"
            self._print(_results(f"step {step:>{self.width},}", metrics))
        if "train/loss_nats" not in metrics:
            return
        now = monotonic()
        self.rows.append((now, step))
        due = now - self.shown >= (0.1 if self.bar else self.seconds) or len(self.rows) <= 3 or step >= self.steps
        self.shown = now if due else self.shown
        loss, speed = f"{metrics['train/loss_nats']:.4f}", _short(metrics.get("time/tokens_per_s", math.nan))
        left = _left(self.steps, self.rows, metrics.get("time/step_ms", math.nan))
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

    def _print(self, what, soft_wrap: bool = True) -> None:
        try:
            self.console.print(what, soft_wrap=soft_wrap)
        except OSError:  # stdout is a file on a full disk; what waits in its buffer would fail the end of the process
            _mute(self.console)
            raise


@register("logger")
class TensorBoard:
    """Events in the run's own folder: ``tensorboard --logdir runs`` lists runs by name and compares them in HPARAMS."""

    def __init__(self, run_dir: Path, start_step: int, flush_seconds: Annotated[int, Gt(0)] = 10):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        facts, config = _facts(run_dir), (Path(run_dir) / "config.gin").read_text(encoding="utf-8")
        # purge_step hides what an earlier process logged at or past start_step, so that each step shows once.
        arguments = {"purge_step": start_step, "flush_secs": flush_seconds}
        self.writer = _after_all_others(Path(run_dir), partial(SummaryWriter, str(run_dir), **arguments))
        self.step, self.seen = start_step, _logged_before(Path(run_dir), start_step)
        self.writer.add_text("config", _code(config), start_step)
        # The first of the three protos lists the columns; TensorBoard would take them from whichever run it meets
        # first, hiding knobs that only other arms have. Without it the columns are the union over all runs.
        _, start, self.end = hparams(_settings(facts), {})
        self.writer.file_writer.add_summary(start, start_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.step = step
        self.seen.update(metrics)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Hand over to the system what waits to be written; called at a checkpoint."""
        self.writer.flush()

    def text(self, step: int, name: str, text: str) -> None:
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 100) or [""]]
        self.writer.add_text(name, _code("\n".join(lines)), step)

    def close(self, summary: dict[str, float]) -> None:
        # HPARAMS shows the last value of each scalar; what was logged already needs no second point.
        for name in summary.keys() - self.seen:
            self.writer.add_scalar(name, summary[name], self.step)
        self.writer.file_writer.add_summary(self.end, self.step)
        self.writer.close()


@register("logger")
class CSV:
    """metrics.csv: a row for each call of ``log``, so train and evaluation of one step are two rows of one wide table.
    The header is the same in every run; a metric beyond it gets a column at the end."""

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
        with _given_up(self.file):
            self.writer.writerow({"step": step, **metrics})

    def text(self, step: int, name: str, text: str) -> None:
        """Text has no place in a table; samples.md holds it."""

    def close(self, summary: dict[str, float]) -> None:
        self.file.close()

    def _read(self) -> list[dict[str, str]]:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a killed process may have left half a line, and half a step number
        rows = csv.DictReader(whole.splitlines())
        self.columns += [name for name in rows.fieldnames or [] if name not in self.columns]
        return [{"step": "", **row} for row in rows]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        draft = self.path.with_name("metrics.csv.tmp")
        # Line buffering: each row is on disk at once. The open file stays valid through the rename.
        self.file = open(draft, "w", encoding="utf-8", newline="", buffering=1)
        self.writer = csv.DictWriter(self.file, self.columns, extrasaction="ignore", lineterminator="\n")
        with _given_up(self.file):  # a full disk leaves the table as it is
            self.writer.writeheader()
            self.writer.writerows(rows)
        os.replace(draft, self.path)


@register("logger")
class WandB:
    """Weights & Biases, files under the run's folder. When the server can't be reached within ten seconds the run is
    logged offline, for ``wandb sync``. A resumed run goes on under the same id."""

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
            raise ValueError(f"WandB needs the wandb package: {remedy}, or take WandB out of the loggers") from error
        facts, stored = _facts(run_dir), Path(run_dir) / "wandb_id"
        if start_step == 0 or not stored.exists():
            stored.write_text(secrets.token_hex(4))
        # Its own capture of the console would fight with the progress bar, hence console="off".
        settings = wandb.Settings(init_timeout=10, login_timeout=30, finish_timeout=30, console="off", quiet=True)
        config = facts["config"] | {"facts": {name: value for name, value in facts.items() if name != "config"}}
        chosen = {"project": project, "name": facts["name"], "id": stored.read_text().strip(), "config": config}
        chosen |= {"dir": str(run_dir), "settings": settings, "resume": "allow"}
        try:
            self.run = wandb.init(mode=mode, **chosen)
        except wandb.errors.UsageError as error:
            raise ValueError(f"WandB: {error} (or log offline: WandB.mode = 'offline')") from error
        except wandb.errors.CommError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"W&B isn't reachable, this run is logged offline, for wandb sync ({reason})", stacklevel=2)
            wandb.teardown()  # or the id would count as in use
            self.run = wandb.init(mode="offline", **chosen)
        self.html, self.first = wandb.Html, self.run.step  # the server keeps what it has: steps only go up

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step >= self.first:
            self.run.log(metrics, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        page = self.html(f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>', inject=False)
        self.log(step, {name: page})

    def close(self, summary: dict[str, float]) -> None:
        self.run.summary.update(summary)
        self.run.finish()


def _logged_before(run_dir: Path, start_step: int) -> set[str]:
    """The metrics of which an earlier attempt of the run has logged values that count."""
    rows = journal.read(run_dir / "metrics.jsonl") if start_step else []
    return {name for row in rows if row["step"] < start_step for name in row}


def _after_all_others(run_dir: Path, opened: Callable[[], SummaryWriter]) -> SummaryWriter:
    """A writer whose file comes last in the folder. TensorBoard reads files in the order of their names, and names of
    one second go on with process and count as text, where 10 comes before 9: such a file is given up for a later one,
    or what it hides would be read after it."""
    earlier = set(run_dir.glob("events.out.tfevents.*"))
    writer = opened()
    made = max(set(run_dir.glob("events.out.tfevents.*")) - earlier)
    if all(name < made for name in earlier):
        return writer
    writer.close()
    made.unlink()
    sleep(1.01 - time() % 1)
    return opened()


@contextlib.contextmanager
def _given_up(file):
    """Closes a file that can't be written: what its buffer holds would fail again when Python collects it."""
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError):
            file.close()
        raise


def _mute(console: rich.console.Console) -> None:
    """Nothing can be shown any more (``| head`` has left; rich would leave the process): a run goes on, unseen."""
    console.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _facts(run_dir: Path) -> Facts:
    return json.loads((Path(run_dir) / "facts.json").read_text(encoding="utf-8"))


def _settings(facts: Facts) -> dict[str, float | str]:
    """What tells runs apart in a table: numbers and short text. How often something is shown or saved does not."""
    settings = {"seed": facts.get("seed"), "device": facts.get("device"), "precision": facts.get("precision")}
    named: dict[str, Any] = facts["config"] | settings
    told = {name: value for name, value in named.items() if value is not None and not name.endswith("_every")}
    plain = {name: value if type(value) in (int, float, str) else json.dumps(value) for name, value in told.items()}
    return {name: value for name, value in plain.items() if not isinstance(value, str) or len(value) <= 100}


def _code(text: str) -> str:
    """Markdown of a code block. Indented, not fenced: nothing in the text can end it."""
    return textwrap.indent(text, "    ", lambda line: True)


def _results(label: str, metrics: dict[str, float]) -> Text:
    """One line: label, then the losses that are there."""
    line = Text(label, style="dim")
    shown = ("train/loss_nats", "train loss ", " nats"), ("val/loss_nats", "val loss ", " nats")
    for name, before, after in (*shown, ("val/bits_per_byte", "", " bits/byte")):
        if name in metrics:
            line.append(f"   {before}", "not dim").append(f"{metrics[name]:.4f}", "not dim bold green")
            line.append(after, "not dim")
    return line


def _left(steps: int, rows: deque[tuple[float, int]], step_ms: float) -> str:
    """Time left as h:mm:ss, from (clock, step) of recent rows; from the first row alone by its own step time."""
    (then, first), (now, step) = rows[0], rows[-1]
    per_step = (now - then) / (step - first) if step > first else step_ms / 1000
    seconds = max(0, steps - step) * per_step
    if not 0 <= seconds < 1e8:  # nan as well
        return "-:--:--"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def _short(value: float) -> str:
    """Three digits: 987, 15.2k, 152k, 1.52M."""
    if not math.isfinite(value):
        return "-"
    size, letter = next((s for s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= 0.9995 * s[0]), (1, ""))
    return f"{value / size:.3g}{letter}" if abs(value) < 999.5 * size else f"{value / size:.0f}{letter}"


def _printable(text: str, limit: int, encoding: str) -> str:
    """The beginning of a text that a model wrote: it may hold terminal control sequences, or letters that the
    terminal can't show."""
    short = text[:limit] + (" ..." if len(text) > limit else "")
    short = "".join(c if c.isprintable() or c == "\n" else " " for c in short).strip()
    return short.encode(encoding, "replace").decode(encoding)
