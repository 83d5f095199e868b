"""Checks of a logger: it works, and a full disk does not make it hang or end the run."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

from toolkit.conformance.bench import Bench
from toolkit.conformance.lines import Broken, Gauge, NotApplicable, check
from toolkit.protocols import Logger
from toolkit.store.factsfile import Facts

PATIENCE = 60.0  # seconds after which a logger on a full disk counts as hanging
LIMIT = 32_768  # largest file size in bytes: it simulates a full disk


@check("logs and closes", "logger")
def logs(bench: Bench) -> Gauge:
    """The logger accepts rows with changing columns, a text and close(), in a new run and in a resumed one."""
    gauge = Gauge(note="rows, text and close()")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = _run_folder(folder)
        for start in (0, 5):
            logger = _build_logger(bench, run, start)
            for step in range(start, start + 5):
                logger.log(step, {"tokens": step * 10, "train/loss_nats": 2.0, "lr": 1e-3, "grad_norm": 1.0})
            logger.log(start + 5, {"val/loss_nats": 2.1, "val/bits_per_byte": 1.0})
            logger.text(start + 5, "sample", "Once upon a time <b>\u2026 [red]")
            logger.close({"train/loss_nats": 2.0, "val/loss_nats": 2.1})
            gauge.record(0, f"start_step {start}")
    return gauge


@check("a full disk does not end the run", "logger")
def full_disk(bench: Bench) -> Gauge:
    """On a full disk, logging may raise an error, which the journal handles. It must not hang or kill the process."""
    if sys.platform == "win32":
        raise NotApplicable("a full disk can't be simulated on Windows")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        # Before the disk is full: raises NotApplicable if the logger can't be used here.
        _build_logger(bench, _run_folder(folder), 0).close({})
    with tempfile.TemporaryDirectory() as folder:
        child = multiprocessing.get_context("fork").Process(target=_fill_disk, args=(bench, _run_folder(folder)))
        child.start()
        child.join(PATIENCE)
        if child.is_alive():
            child.kill()
            raise Broken(
                f"it still runs {PATIENCE:.0f} s after the disk was full, and must return; look for retries without an "
                "end"
            )
    if child.exitcode:
        raise Broken(
            f"the process exited with {child.exitcode} when the disk was full; a logger may raise an error but must "
            "not end the process; look for os._exit(), sys.exit() and signals"
        )
    gauge = Gauge(note="the run continues")
    gauge.record(0, f"files of at most {LIMIT // 1024} KiB")
    return gauge


def _fill_disk(bench: Bench, run: Path) -> None:
    """Log far more than LIMIT, in a separate thread, as a run does."""
    import logging
    import resource
    import signal

    from toolkit.store.journal import LoggerThread

    logging.getLogger("toolkit").setLevel(logging.CRITICAL)
    sys.stdout = sys.stderr = open("/dev/null", "w")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then raises an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    logger = LoggerThread(bench.cls, run, 0)
    for step in range(900):  # few enough for the queue
        logger.tell("log", step, {f"train/metric_{i}": float(step) for i in range(25)})
    logger.tell("text", 900, "sample", "x" * 100_000)
    logger.end({"train/metric_0": 900.0})
    logger.join()


def _run_folder(folder: str) -> Path:
    """A run folder with the files that a logger may read."""
    run = Path(folder) / "run"
    run.mkdir()
    (run / "config.gin").write_text("Experiment.steps = 10\n")
    facts: Facts = {
        "name": "run",
        "steps": 10,
        "seed": 0,
        "device": "cpu",
        "precision": "float32",
        "config": {"GPT.dim": 32},
    }
    (run / "facts.json").write_text(json.dumps(facts))
    return run


def _build_logger(bench: Bench, run: Path, start: int) -> Logger:
    """The logger. Raises NotApplicable if its package or its settings are missing here."""
    try:
        return bench.cls(run, start)
    except (ImportError, ValueError) as error:
        raise NotApplicable(f"it can't be used here: {str(error)[:160]}") from error
