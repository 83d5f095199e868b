"""What a run writes while it trains: metrics.jsonl and samples.md always, and the loggers, none of which can end it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

log = logging.getLogger("toolkit")


class Journal:
    """Rows and samples of one run, from ``start`` on: what an earlier attempt wrote at or past it is cut away.
    ``latest`` holds the newest value of each metric. A journal that is not ``writing`` keeps that and writes nothing:
    of several processes, one writes."""

    def __init__(self, run_dir: Path, loggers: list[type], start: int, writing: bool = True):
        self.metrics, self.samples = run_dir / "metrics.jsonl", run_dir / "samples.md"
        self.latest, self.loggers, self.file = {}, [], None
        if not writing:
            return
        self._cut(start)
        self.file = open(self.metrics, "a", encoding="utf-8")
        for cls in loggers:
            try:
                self.loggers.append(cls(run_dir, start))
            except Exception as error:
                log.warning("logger %s is left out: %s", cls.__name__, error)

    def row(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, out of this process when it returns."""
        self.latest |= metrics
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step} | metrics) + "\n")
        self.file.flush()
        self._tell("log", step, metrics)

    def sample(self, step: int, text: str) -> None:
        """Text sampled during training."""
        with open(self.samples, "a", encoding="utf-8") as file:
            file.write(f"## step {step}\n\n{text.strip()}\n\n")
        self._tell("text", step, "sample", text)

    def close(self) -> None:
        """End the file and the loggers, which hear the latest values."""
        try:
            if self.file is not None:
                self.file.close()
        finally:
            self._tell("close", self.latest)

    def _tell(self, method, *arguments):
        for logger in list(self.loggers):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:
                self.loggers.remove(logger)
                log.warning("logger %s failed and is left out from here on: %s", type(logger).__name__, error)

    def _cut(self, start):
        rows = read(self.metrics)
        kept = [row for row in rows if row["step"] < start]
        self.metrics.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        if self.samples.exists():
            sections = re.split(r"(?m)^(?=## step \d+$)", self.samples.read_text(encoding="utf-8"))
            kept = [s for s in sections if s.startswith("## step ") and int(s.split(maxsplit=3)[2]) < start]
            self.samples.write_text("".join(kept), encoding="utf-8")


def read(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that was cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
