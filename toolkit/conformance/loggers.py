"""Checks of a logger: that it works, and that a full disk ends neither it nor the run."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

from toolkit.conformance.bench import Bench
from toolkit.conformance.report import Broken, Gauge, NotApplicable, check

PATIENCE = 60.0  # seconds in which a logger on a full disk has to give up
LIMIT = 32_768  # bytes that a file may grow to: the stand-in for a full disk


@check("logs, and ends", "logger")
def logs(bench: Bench) -> Gauge:
    """Rows of changing columns, a text, and the end, from the start and from a resume."""
    gauge = Gauge(note="rows, text and close()")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = _run_folder(folder)
        for start in (0, 5):
            logger = _built(bench, run, start)
            for step in range(start, start + 5):
                logger.log(step, {"tokens": step * 10, "train/loss_nats": 2.0, "lr": 1e-3, "grad_norm": 1.0})
            logger.log(start + 5, {"val/loss_nats": 2.1, "val/bits_per_byte": 1.0})
            logger.text(start + 5, "sample", "Once upon a time <b>\u2026 [red]")
            logger.close({"train/loss_nats": 2.0, "val/loss_nats": 2.1})
            gauge.see(0, f"start_step {start}")
    return gauge


@check("a full disk ends no run", "logger")
def full_disk(bench: Bench) -> Gauge:
    """On a disk that takes no more, logging may fail with an error, which the journal keeps to itself, but it neither
    hangs nor kills the process."""
    if sys.platform == "win32":
        raise NotApplicable("a full disk can't be played on Windows")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        _built(bench, _run_folder(folder), 0).close({})  # one that can't be had here says so before the disk is full
    with tempfile.TemporaryDirectory() as folder:
        child = multiprocessing.get_context("fork").Process(target=_fill, args=(bench, _run_folder(folder)))
        child.start()
        child.join(PATIENCE)
        if child.is_alive():
            child.kill()
            raise Broken(f"it still hung {PATIENCE:.0f} s after the disk was full")
    if child.exitcode:
        raise Broken(f"the process ended with {child.exitcode} on a full disk")
    gauge = Gauge(note="the run goes on")
    gauge.see(0, f"files of at most {LIMIT // 1024} KiB")
    return gauge


def _fill(bench, run):
    """Log far more than fits, in a thread of the logger's own, as a run does."""
    import logging
    import resource
    import signal

    from toolkit.store.journal import LoggerThread

    logging.getLogger("toolkit").setLevel(logging.CRITICAL)
    sys.stdout = sys.stderr = open("/dev/null", "w")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is then an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    logger = LoggerThread(bench.cls, run, 0)
    for step in range(900):  # all of them find room in the queue
        logger.tell("log", step, {f"train/metric_{i}": float(step) for i in range(25)})
    logger.tell("text", 900, "sample", "x" * 100_000)
    logger.end({"train/metric_0": 900.0})
    logger.join()


def _run_folder(folder):
    run = Path(folder) / "run"
    run.mkdir()
    (run / "config.gin").write_text("Experiment.steps = 10\n")
    known = {"name": "run", "steps": 10, "seed": 0, "device": "cpu", "precision": "float32", "config": {"GPT.dim": 32}}
    (run / "facts.json").write_text(json.dumps(known))
    return run


def _built(bench, run, start):
    try:
        return bench.cls(run, start)
    except (ImportError, ValueError) as error:
        raise NotApplicable(f"it can't be had here: {str(error)[:160]}") from error
