"""What a run writes while it trains: metrics.jsonl and samples.md always, and the loggers, none of which can end it.

metrics.jsonl is the truth: the loop writes it, and it is complete or the run says what it lacks. A checkpoint holds a
digest of the rows before it, and status.json one of all rows at the end, so that damage to them is noticed. A logger
shows the run to somebody; each lives in a thread of its own, and the loop waits for none of them before the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from toolkit.output.errors import clean
from toolkit.store.disk import BINARY, NO_FOLLOW, fsync, write_bytes

QUEUE = 1000  # entries that wait for one logger, at most: what comes on top of them is dropped for it
PATIENCE = 60.0  # seconds in which all loggers have to come to an end; W&B alone gives up after 30
log = logging.getLogger("toolkit")


class Journal:
    """Rows and samples of one run, from ``start`` on: what an earlier attempt wrote at or past it is cut away.
    ``latest`` holds the newest value of each metric, those before ``start`` included. A journal that is not ``writing``
    keeps that and writes nothing: of several processes, one writes. Raises OSError where metrics.jsonl can't be cut or
    opened."""

    def __init__(self, run_dir: Path, loggers: list[type], start: int, writing: bool = True):
        self.latest, self.writing, self.loggers = {}, writing, []
        for row in read(run_dir / "metrics.jsonl"):
            if row["step"] < start:
                self.latest |= {name: value for name, value in row.items() if name != "step"}
        self.metrics, self.samples = Entries(run_dir / "metrics.jsonl"), Entries(run_dir / "samples.md")
        if writing:
            self.metrics.begin(_rows(self.metrics.path, start))
            self.samples.begin(_sections(self.samples.path, start))
            self.metrics.open()
            self.loggers = [LoggerThread(cls, run_dir, start) for cls in loggers]

    def row(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, out of this process when it returns; kept, with a warning, where the disk refuses
        it, and written with a later row."""
        self.latest |= metrics
        if self.writing:
            self.metrics.add(step, json.dumps({"step": step} | metrics) + "\n")
            for logger in self.loggers:
                logger.tell("log", step, dict(metrics))

    def sample(self, step: int, text: str) -> None:
        """Text sampled during training."""
        if self.writing:
            self.samples.add(step, f"## step {step}\n\n{text.strip()}\n\n")
            for logger in self.loggers:
                logger.tell("text", step, "sample", text)

    def sync(self) -> None:
        """Rows and samples so far are on the disk when this returns, so that no checkpoint outlives them; where the
        disk refuses them, they go on waiting. Loggers are asked to do the same with what they wrote, some time soon."""
        if self.writing:
            self.metrics.sync()
            self.samples.sync()
            for logger in self.loggers:
                logger.tell("flush")

    def covered(self, step: int) -> dict[str, dict[str, object]]:
        """{file: {"size", "sha256"}} of the entries before a step: what a run that resumes there begins with."""
        return {file.path.name: file.covered(step) for file in (self.metrics, self.samples)}

    def close(self) -> None:
        """End the files, and the loggers, which hear the latest values and have ``PATIENCE`` seconds for all that they
        still hold. Raises OSError when entries are still waiting for room on the disk; an error that is under way
        already is the weightier one, and stays."""
        for logger in self.loggers:
            logger.end(dict(self.latest))
        lost = [error for file in (self.metrics, self.samples) if (error := file.close())]
        self._wait()
        for error in lost:
            if sys.exc_info()[1] is None:
                raise error
            log.warning("%s", error)

    def _wait(self):
        deadline = time.monotonic() + PATIENCE
        for logger in self.loggers:
            logger.join(max(0.0, deadline - time.monotonic()))
        late = [logger.title for logger in self.loggers if logger.is_alive() and not logger.failed]
        if late:
            log.warning("logger %s is not done after %.0f s and is left behind", ", ".join(late), PATIENCE)


class Entries:
    """A text file that grows by whole entries, each of a step; steps do not decrease. What the disk refuses waits in
    memory, in order, and is tried again with each later entry."""

    def __init__(self, path: Path):
        self.path, self.waiting, self.file = path, deque(), None
        self.size, self.torn, self.warned = 0, False, False  # torn: half an entry may follow the whole ones
        self._step, self._digest, self._length = -1, hashlib.sha256(), 0  # of all entries, the waiting ones included
        self._before = self._digest.copy(), 0  # of those before the last one's step

    def begin(self, kept: bytes) -> None:
        """Leave this content alone in the file. Raises OSError."""
        self._digest, self._length = hashlib.sha256(kept), len(kept)
        self._before = self._digest.copy(), self._length
        if self.path.exists() or self.path.is_symlink():
            try:
                write_bytes(self.path, kept)
            except OSError as error:
                raise OSError(
                    f"can't cut {self.path} back to where the run goes on: {error}; nothing was changed"
                ) from error

    def open(self) -> None:
        """Make the file, or go on at its end. Raises OSError."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_FOLLOW | BINARY, 0o666)
        self.file = os.fdopen(handle, "ab", buffering=0)  # a buffer would keep, and write again, what was refused
        self.size = os.fstat(self.file.fileno()).st_size

    def covered(self, step: int) -> dict[str, object]:
        """Size and SHA-256 of the entries before a step, which is at least that of the last entry."""
        digest, size = self._before if step == self._step else (self._digest, self._length)
        return {"size": size, "sha256": digest.hexdigest()}

    def add(self, step: int, text: str) -> None:
        """Write an entry after those that wait; warns the first time that the disk refuses."""
        data = text.encode()
        if step != self._step:
            self._step, self._before = step, (self._digest.copy(), self._length)
        self._digest.update(data)
        self._length += len(data)
        self.waiting.append((step, data))
        try:
            self._write()
        except OSError as error:
            if not self.warned:
                log.warning("can't write %s, it is tried again with each later entry: %s", self.path, error)
            self.warned = True

    def sync(self) -> None:
        """Try once more, and wait for the disk."""
        with contextlib.suppress(OSError):  # told when an entry was refused; ``close`` has the last word
            self._write()
            if self.file is not None:
                os.fsync(self.file.fileno())

    def close(self) -> OSError | None:
        """Try once more, and see that it is all on the disk. Returns what went wrong."""
        try:
            self._write()
            if self.file is not None:
                os.fsync(self.file.fileno())  # some file systems tell only now that a quota is used up
        except OSError as error:
            if not self.waiting:
                return OSError(f"{self.path} may not be whole on the disk: {error}")
            first = self.waiting[0][0]
            return OSError(
                f"{self.path} lacks its last {len(self.waiting)} entries, from step {first} on: {error}; make room, "
                f"delete the checkpoints past step {first}, and --resume writes them again"
            )
        finally:
            if self.file is not None:
                self.file.close()
                self.file = None
        return None

    def _write(self):
        while self.waiting:
            if self.file is None:
                self.open()
            try:
                self._append(self.waiting[0][1])
            except OSError:
                with contextlib.suppress(OSError):
                    self.file.truncate(self.size)  # readers find whole entries alone
                raise
            self.waiting.popleft()

    def _append(self, data):
        if self.torn:  # taking the part back may have failed as well
            self.file.truncate(self.size)
        self.torn, written = True, 0
        while written < len(data):  # a disk that is nearly full takes a part, and then says why
            written += self.file.write(data[written:])
        self.torn, self.size = False, self.size + written


class LoggerThread(threading.Thread):
    """A logger, built and used in this thread alone, which does what it is told in order. An error, or sys.exit(), at
    any point costs one warning, and the logger, which is closed once more to let go of its files."""

    def __init__(self, cls: type, run_dir: Path, start_step: int):
        super().__init__(name=f"logger {cls.__name__}", daemon=True)  # daemon: one that hangs can't keep the process
        self.run_dir = run_dir
        self.title, self.failed, self.full, self.logger = cls.__name__, False, False, None
        self.build, self.entries = lambda: cls(run_dir, start_step), queue.SimpleQueue()
        self.start()

    def tell(self, method: str, *arguments: object) -> None:
        """Call a method of the logger some time soon. Never waits: with ``QUEUE`` calls before it, it is dropped."""
        if self.failed:
            return
        if self.entries.qsize() < QUEUE:
            self.entries.put((method, arguments))
        elif not self.full:
            self.full = True
            log.warning("logger %s is too slow: %s entries wait for it, more are dropped", self.title, QUEUE)

    def end(self, summary: dict[str, float]) -> None:
        """Close the logger after all that waits for it."""
        self.entries.put(("close", (summary,)))

    def run(self) -> None:
        method = None
        try:
            self.logger = self.build()
            while method != "close":
                method, arguments = self.entries.get()
                if method == "flush":
                    self._flush()
                else:
                    getattr(self.logger, method)(*arguments)
        except BaseException as error:  # sys.exit() would end a thread without a word
            self.failed = True
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            log.warning("logger %s is left out from here on: %s%s", self.title, kind, clean(error))
            if self.logger is not None and method != "close":
                with contextlib.suppress(BaseException):
                    self.logger.close({})

    def _flush(self):
        """Let the logger write what it holds back, where it can, and wait until the run's files are on the disk."""
        if callable(flush := getattr(self.logger, "flush", None)):
            flush()
        for path in self.run_dir.iterdir():
            if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    fsync(path)


def read(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; lines that can't be read are left out, and are those of ``corrupt``."""
    return [row for _, _, row in _lines(path) if row is not None]


def corrupt(path: Path) -> list[int]:
    """The numbers of the lines of a metrics.jsonl that can't be read; half a line at the end, which a process that is
    killed leaves behind, is none of them."""
    return [number for number, line, row in _lines(path) if row is None and line.endswith(b"\n")]


def measure(run_dir: Path) -> dict[str, dict[str, object]]:
    """{file: {"size", "sha256"}} of the whole journal as it is on the disk; what is missing is left out."""
    found = {}
    for name in ("metrics.jsonl", "samples.md"):
        with contextlib.suppress(OSError):
            content = (run_dir / name).read_bytes()
            found[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return found


def damage(run_dir: Path, covered: dict[str, dict[str, object]], whole: bool = False) -> str | None:
    """In what a run's journal differs from what was written, in words; None where it does not. ``covered`` is what
    ``Journal.covered`` or ``measure`` gave; with ``whole`` nothing may follow it."""
    for name, expected in covered.items():
        path, size = run_dir / name, expected["size"]
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            return f"{path} can't be read: {error.strerror}"
        if len(content) < size:
            return f"{path} has {len(content):,} bytes, but {size:,} were written"
        if hashlib.sha256(content[:size]).hexdigest() != expected["sha256"]:
            return f"{path} is not what was written, somewhere in its first {size:,} bytes"
        if whole and len(content) > size:
            return f"{path} has {len(content) - size:,} bytes more than were written"
    return None


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict | None]]:
    """(number, line, row) of each line; the row is None where the line holds no object with a step."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            step = row.get("step") if isinstance(row, dict) else None
            known = isinstance(step, int) and 0 <= step < 10**9 and line.endswith(b"\n")
            yield number, line, row if known else None


def _rows(path, start):
    """The lines of a metrics.jsonl before a step, as they are."""
    return b"".join(line for _, line, row in _lines(path) if row is not None and row["step"] < start)


def _sections(path, start):
    """The text of a samples.md before a step, as it is."""
    text = path.read_bytes() if path.exists() else b""
    whole = b"".join(text.rpartition(b"\n\n")[:2])  # what follows the last blank line is half a heading
    sections = re.split(rb"(?m)^(?=## step \d{1,18}$)", whole)
    return b"".join(s for s in sections if s.startswith(b"## step ") and int(s.split(maxsplit=3)[2]) < start)
