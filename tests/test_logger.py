"""What the loggers leave behind, read back with the tools that people read it with."""

import csv
import gc
import json
import math
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import components.logger as shelf
from components.logger import CSV, Console, TensorBoard, WandB
from toolkit.registry import CATALOG
from toolkit.store.journal import Journal, read

ROOT = Path(shelf.__file__).parents[1]
CONFIG = {
    "GPT.dim": 768,
    "GPT.norm": "@LayerNorm",
    "GPT.attention": ["@short/Flash", "@Flash"],
    "GPT.n_kv_head": None,
    "GPT.tie_embeddings": True,
    "AdamW.lr": 3e-4,
    "TextFiles.paths": "x" * 200,
    "Experiment.log_every": 10,
}
GIN = "GPT.dim = 768\nGPT.norm = @LayerNorm  # *not* emphasis\n"


@pytest.fixture
def run_dir(tmp_path):
    return _run(tmp_path / "arm-1")


def _run(folder, **config):
    folder.mkdir()
    facts = {"name": folder.name, "steps": 20_000, "seed": 1, "device": "cpu", "precision": "float32"}
    (folder / "facts.json").write_text(json.dumps(facts | {"config": CONFIG | config}))
    (folder / "config.gin").write_text(GIN)
    return folder


def _train(step, loss=2.5):
    names = ("tokens", "train/loss_nats", "lr", "grad_norm", "time/step_ms", "time/tokens_per_s")
    return dict(zip(names, (step * 1024, loss, 3e-4, 1.5, 100.0, 152_345.0), strict=True))


def _val(loss=2.3412):
    return {"val/loss_nats": loss, "val/bits_per_byte": 0.7123}


def _session(logger, start, stop):
    """What the loop does between two steps: a row each 10 steps, an evaluation and a sample each 20."""
    for step in range(start, stop, 10):
        logger.log(step, _train(step, loss=3 - step / 1000))
        if step % 20 == 0:
            logger.log(step, _val(3.1 - step / 1000))
            logger.text(step, "sample", f"Once upon step {step}.\n# no heading")


def test_all_are_on_the_shelf_with_their_knobs():
    knobs = {name: list(entry.knobs) for name, entry in CATALOG.items() if entry.kind == "logger"}
    assert knobs["Console"] == ["seconds"] and knobs["CSV"] == []
    assert knobs["TensorBoard"] == ["flush_seconds"] and knobs["WandB"] == ["project", "mode"]
    assert all(CATALOG[name].hints for name in ("Console", "TensorBoard", "WandB"))


# ---------------------------------------------------------------------------------------------------- TensorBoard


def _events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def _steps(events, tag):
    return [event.step for event in events.Scalars(tag)]


def _texts(events, tag):
    return {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")}


def test_tensorboard_holds_every_row_sample_and_the_config(run_dir):
    logger = TensorBoard(run_dir, 0)
    _session(logger, 0, 100)
    logger.log(100, {"train/loss_nats": math.nan, "grad_norm": math.inf})
    logger.close({"val/loss_nats": 3.0})
    events = _events(run_dir)
    assert set(events.Tags()["scalars"]) == {*_train(0), *_val()}
    assert _steps(events, "train/loss_nats") == list(range(0, 101, 10))
    assert _steps(events, "val/loss_nats") == list(range(0, 100, 20))
    assert events.Scalars("train/loss_nats")[3].value == pytest.approx(2.97)
    assert math.isnan(events.Scalars("train/loss_nats")[-1].value)
    assert _texts(events, "config") == {0: textwrap.indent(GIN, "    ")}
    assert _texts(events, "sample")[40] == "    Once upon step 40.\n    # no heading"
    assert not [path for path in run_dir.iterdir() if path.is_dir()]  # no sub-run


def test_tensorboard_shows_each_step_once_after_a_resume(run_dir):
    logger = TensorBoard(run_dir, 0)
    _session(logger, 0, 200)
    logger.writer.flush()  # then killed, never closed, 150 steps past its checkpoint
    logger = TensorBoard(run_dir, 50)
    _session(logger, 50, 120)
    logger.close({})
    assert len(list(run_dir.glob("events*"))) == 2
    events = _events(run_dir)
    assert _steps(events, "train/loss_nats") == list(range(0, 120, 10))
    assert _steps(events, "val/loss_nats") == list(range(0, 120, 20))
    # The older reader above forgets to purge text; what the TensorBoard server itself uses does not.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"tensors": 0}).Reload()
    assert [event.step for event in events.Tensors("sample/text_summary")] == list(range(0, 120, 20))
    assert [event.step for event in events.Tensors("config/text_summary")] == [0, 50]
    assert [event.step for event in events.Tensors("lr")] == list(range(0, 120, 10))


def test_tensorboard_reads_what_two_attempts_wrote_within_a_second_in_their_order(run_dir):
    """Its names tell second, process and count as text: file 10 would be read before file 9."""
    logger = TensorBoard(run_dir, 0)
    _session(logger, 0, 100)
    logger.close({})
    (first,) = run_dir.glob("events*")
    first.rename(run_dir / f"events.out.tfevents.{int(time.time()):010}.~")
    logger = TensorBoard(run_dir, 50)
    _session(logger, 50, 120)
    logger.close({})
    assert len(list(run_dir.glob("events*"))) == 2
    assert _steps(_events(run_dir), "train/loss_nats") == list(range(0, 120, 10))


def test_a_finished_run_that_is_resumed_still_shows_its_result(run_dir):
    TensorBoard(run_dir, 20_000).close(_val(2.25))
    assert [(e.step, e.value) for e in _events(run_dir).Scalars("val/loss_nats")] == [(20_000, 2.25)]


def test_the_hparams_tab_compares_arms_whose_knobs_differ(tmp_path):
    """Asked of TensorBoard's own backend, as the tab in the browser asks it."""
    for name, knobs, loss in ("a", {}, 2.5), ("b", {"GPT.norm": "@RMSNorm", "RMSNorm.eps": 1e-6}, 2.25):
        logger = TensorBoard(_run(tmp_path / name, **knobs), 0)
        _session(logger, 0, 40)
        logger.log(40, _val(loss))
        logger.close(_val(loss))
    experiment, groups = _hparams_tab(tmp_path)
    columns = {info.name: info for info in experiment.hparam_infos}
    wanted = {"GPT.dim", "GPT.norm", "GPT.attention", "GPT.tie_embeddings", "AdamW.lr", "RMSNorm.eps"}
    assert set(columns) == wanted | {"seed", "device", "precision"}
    assert columns["GPT.norm"].differs and not columns["GPT.dim"].differs
    assert "val/loss_nats" in {info.name.tag for info in experiment.metric_infos}
    rows = {group.sessions[0].name: group for group in groups}
    assert sorted(rows) == ["a", "b"]  # runs by their names, no timestamps
    assert rows["b"].hparams["RMSNorm.eps"].number_value == 1e-6
    assert rows["a"].hparams["GPT.attention"].string_value == '["@short/Flash", "@Flash"]'
    finals = {run: {m.name.tag: m.value for m in group.metric_values} for run, group in rows.items()}
    assert finals["a"]["val/loss_nats"] == 2.5 and finals["b"]["val/loss_nats"] == 2.25
    assert all(group.sessions[0].status == 1 for group in groups)  # STATUS_SUCCESS


def _hparams_tab(logdir):
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, list_session_groups
    from tensorboard.plugins.hparams.backend_context import Context

    events = EventMultiplexer(size_guidance={"scalars": 0, "tensors": 0}).AddRunsFromDirectory(str(logdir))
    events.Reload()
    provider = MultiplexerDataProvider(events, str(logdir))
    context, request = Context(TBContext(data_provider=provider)), RequestContext()
    told = context.hparams_metadata(request, "")
    experiment = context.experiment_from_metadata(request, "", True, told, [])
    query = api_pb2.ListSessionGroupsRequest(slice_size=10, start_index=0, include_metrics=True)
    query.allowed_statuses.extend([0, 1, 2, 3])
    for metric in experiment.metric_infos:
        query.col_params.add().metric.CopyFrom(metric.name)
    handler = list_session_groups.Handler(request, context, "", query)
    return experiment, handler.run().session_groups


# ------------------------------------------------------------------------------------------------------------ CSV


def _table(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_is_one_wide_table(run_dir):
    logger = CSV(run_dir, 0)
    logger.log(0, _val())
    logger.log(10, _train(10, loss=1 / 3))
    rows = _table(run_dir)  # each row is there at once
    assert list(rows[0]) == ["step", *_train(0), *_val()]
    assert [row["step"] for row in rows] == ["0", "10"]
    assert rows[0]["val/loss_nats"] == "2.3412" and rows[0]["train/loss_nats"] == ""
    assert float(rows[1]["train/loss_nats"]) == 1 / 3
    logger.log(20, {**_train(20, math.nan), "moe/balance": 0.5})
    logger.text(20, "sample", "x")
    logger.close(_val())
    rows = _table(run_dir)
    assert list(rows[0]) == ["step", *_train(0), *_val(), "moe/balance"]
    assert [row["moe/balance"] for row in rows] == ["", "", "0.5"] and rows[2]["train/loss_nats"] == "nan"
    assert sorted(p.name for p in run_dir.iterdir()) == ["config.gin", "facts.json", "metrics.csv"]


def test_csv_after_a_resume_holds_each_step_once(run_dir):
    logger = CSV(run_dir, 0)
    _session(logger, 0, 200)
    logger.log(200, {"extra": 1.0})
    logger.file.close()  # as a killed process leaves it
    with open(run_dir / "metrics.csv", "a") as file:
        file.write("1")  # half of "190,...": not step 1
    logger = CSV(run_dir, 50)
    _session(logger, 50, 100)
    logger.close({})
    rows = _table(run_dir)
    assert [int(row["step"]) for row in rows if row["lr"]] == list(range(0, 100, 10))
    assert [int(row["step"]) for row in rows if row["val/loss_nats"]] == list(range(0, 100, 20))
    assert len(rows) == 15 and "extra" in rows[0]
    CSV(run_dir, 0).close({})
    assert _table(run_dir) == []


# ------------------------------------------------------------------------------------------------------ full disks

FULL = Path("/dev/full")
on_linux = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


class Others:
    """A logger that has to go on hearing of everything, whatever happens to the one before it."""

    def __init__(self, run_dir, start_step):
        self.heard = []

    def log(self, step, metrics):
        self.heard.append(step)

    def text(self, step, name, text):
        self.heard.append(text)

    def close(self, summary):
        self.heard.append("close")


def _idle(thread):
    """The logger of a thread that has done all it was told."""
    deadline = time.monotonic() + 30
    while thread.logger is None and time.monotonic() < deadline:
        time.sleep(0.01)
    done = threading.Event()
    thread.logger.mark = done.set
    thread.tell("mark")
    assert done.wait(30)
    return thread.logger


def _fill(logger, run_dir):
    """From here on the disk of that logger's file is full. Returns the path at which its earlier rows are kept."""
    if isinstance(logger, CSV):
        with open(FULL, "w") as full:
            os.dup2(full.fileno(), logger.file.fileno())
        return run_dir / "metrics.csv"
    logger.writer.flush()
    (events,) = run_dir.glob("events*")
    kept = events.rename(run_dir / f"kept.{events.name}")
    events.symlink_to(FULL)  # the writer opens its file anew for each record
    return kept


@on_linux
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread says so
@pytest.mark.parametrize("rows_after", [0, 1, 40])
@pytest.mark.parametrize("cls", [CSV, TensorBoard])
def test_a_full_disk_costs_a_logger_and_nothing_else(cls, rows_after, run_dir, caplog):
    journal = Journal(run_dir, [cls, Others], 0)
    for step in range(3):
        journal.row(step, _train(step))
    broken, others = (_idle(thread) for thread in journal.loggers)
    kept = _fill(broken, run_dir)
    before = kept.read_bytes()
    start = time.monotonic()
    for step in range(3, 3 + rows_after):
        journal.row(step, _train(step))
        journal.sample(step, "Once")
    journal.close()
    assert time.monotonic() - start < 20
    assert kept.read_bytes() == before and len(read(run_dir / "metrics.jsonl")) == 3 + rows_after
    assert len(others.heard) == 3 + 2 * rows_after + 1
    said = [message for message in caplog.messages if cls.__name__ in message]
    assert len(said) == (1 if rows_after or cls is TensorBoard else 0) == len(caplog.messages)
    assert all("No space left" in message for message in said)
    del broken, journal
    gc.collect()  # nothing is left that fails later


@on_linux
@pytest.mark.parametrize("at", ["start", "a new column"])
def test_a_csv_that_can_not_be_rewritten_stays_as_it_is(at, run_dir, caplog):
    logger = CSV(run_dir, 0)
    _session(logger, 0, 50)
    if at == "start":
        logger.close({})
    before = (run_dir / "metrics.csv").read_bytes()
    (run_dir / "metrics.csv.tmp").symlink_to(FULL)
    if at == "start":
        journal = Journal(run_dir, [CSV, Others], 20)
        journal.row(20, _train(20))
        journal.close()
        assert len(caplog.messages) == 1 and "logger CSV failed and is not used any more" in caplog.text
    else:
        with pytest.raises(OSError, match="No space left"):
            logger.log(50, {"new": 1.0})
    assert (run_dir / "metrics.csv").read_bytes() == before
    del logger
    gc.collect()
    (run_dir / "metrics.csv.tmp").unlink()
    CSV(run_dir, 30).close({})
    assert max(int(row["step"]) for row in _table(run_dir)) == 20


@on_linux
@pytest.mark.parametrize("name", ["CSV", "TensorBoard"])
def test_a_record_that_only_half_fits_spoils_none_before_it(name, run_dir):
    """The limit on a file's size stands for the last free bytes of a disk."""
    script = """
import resource, sys
from pathlib import Path
from components.logger import CSV, TensorBoard
folder = Path(sys.argv[1])
logger = {"CSV": CSV, "TensorBoard": TensorBoard}[sys.argv[2]](folder, 0)
logger.log(0, {"train/loss_nats": 1.0})
if sys.argv[2] == "TensorBoard":
    logger.writer.flush()
(file,) = (p for p in folder.iterdir() if p.name.startswith(("events", "metrics.csv")))
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 333, most))
for step in range(1, 200):
    try:
        logger.log(step, {"train/loss_nats": 1.0})
    except OSError:
        print(step)
        break
"""
    command = [sys.executable, "-c", script, str(run_dir), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and 0 < int(done.stdout) < 199
    if name == "CSV":
        CSV(run_dir, 10_000).close({})  # resumed where there is room again: the half row goes
        steps = [int(row["step"]) for row in _table(run_dir)]
    else:
        steps = _steps(_events(run_dir), "train/loss_nats")
    assert len(steps) > 3 and steps == list(range(len(steps)))


@on_linux
def test_console_survives_a_full_disk(run_dir):
    script = SCRIPT.replace("for step in", "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nfor step in")
    script = script.replace("    console.log(step, {", "    tell(step, {")
    raising = "def tell(*row):\n    try:\n        console.log(*row)\n    except OSError as error:\n"
    raising += "        print(error, file=sys.stderr)\n"
    script = script.replace("console = Console", f"{raising}console = Console") + "\nprint('as the report does')"
    done = subprocess.run([sys.executable, "-c", script, str(run_dir)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "step  1,000" in done.stdout
    assert done.stderr == "[Errno 28] No space left on device\n"  # once: it is mute from then on


# -------------------------------------------------------------------------------------------------------- Console


# The stand-in for the package keeps the rest of the shelf, and with it two seconds of torch, out of each process.
SCRIPT = """
import math, sys, types
sys.modules["components"] = types.ModuleType("components")
sys.modules["components"].__path__ = ["components"]
from components.logger import Console
console = Console(sys.argv[1], 1000)
console.log(1000, {"val/loss_nats": 2.3412, "val/bits_per_byte": 0.7123})
for step in range(1010, 1200, 10):
    loss = math.nan if step == 1020 else 2.5
    console.log(step, {"train/loss_nats": loss, "lr": 3e-4, "time/step_ms": 100., "time/tokens_per_s": 152345.})
console.text(1200, "sample", "[bold]Once\\x1b[31m upon\\x07 a time in caf\u00e9s " + "and on " * 100 + "END")
assert not {"torch", "tensorboard", "wandb"} & set(sys.modules), "start-up time"
console.log(20000, {"train/loss_nats": 2.25, "time/tokens_per_s": math.inf})
console.close({"val/loss_nats": 2.2, "val/bits_per_byte": math.inf})
"""


def test_console_in_a_pipe_is_plain(run_dir):
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(run_dir)]
    loud = os.environ | {"FORCE_COLOR": "1", "PYTHONIOENCODING": "ascii"}  # as some build servers set it
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=loud)
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search(r"[^\n -~]", done.stdout), "control characters, or letters that the pipe does not know"
    lines = done.stdout.splitlines()
    assert lines[0] == "step  1,000   val loss 2.3412 nats   0.7123 bits/byte"
    assert lines[1] == "step  1,010/20,000   loss 2.5000   152k tokens/s   0:31:39 left"
    assert lines[2].startswith("step  1,020/20,000   loss nan   152k tokens/s   ")
    assert [line.split("/")[0] for line in lines[3:5]] == ["step  1,030", "sample at step 1,200"]  # the rest is soon
    assert lines[5].startswith("  [bold]Once [31m upon  a time in caf?s") and len(lines[5]) < 320
    assert "END" not in done.stdout
    assert lines[6] == "step 20,000/20,000   loss 2.2500   - tokens/s   0:00:00 left"
    assert lines[7:] == ["final   val loss 2.2000 nats   inf bits/byte"]


MANY = {f"eval/PositionLoss/nats_at/{2**n}-{2 ** (n + 1) - 1}": 5 - n / 10 for n in range(11)}
EVALUATED = {
    "eval/MinimalPairs/accuracy": 0.5123,
    "eval/MinimalPairs/accuracy/agreement": 0.6,
    "eval/far-TextLoss/bits_per_byte": 1.25,
    "eval/far-TextLoss/loss_nats": math.nan,
    "probe/rms/blocks.0": 3.0,
}


@pytest.mark.parametrize("columns, shown", [(80, 2), (120, 5), (40, 1)])
def test_console_shows_what_evaluators_measured_in_a_line_each(columns, shown, run_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    Console(run_dir, 0).log(1000, _val() | EVALUATED | MANY)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step  1,000   val loss 2.3412 nats   0.7123 bits/byte" and len(lines) == 4
    indent = " " * 14
    pairs = "MinimalPairs   accuracy 0.5123   " + ("1 more" if columns == 40 else "accuracy/agreement 0.6000")
    if columns > 40:
        assert lines[2] == indent + "far-TextLoss   bits_per_byte 1.2500   loss_nats nan"
        assert max(map(len, lines)) <= columns
    assert lines[1] == indent + pairs
    first = indent + "PositionLoss/nats_at   1-1 5.0000"
    assert lines[3].startswith(first) and lines[3].endswith(f"   {11 - shown} more")
    assert len(re.findall(r"\d+-\d+ \d\.\d{4}", lines[3])) == shown


def test_console_survives_a_reader_that_leaves(run_dir):
    script = SCRIPT + "\nprint('others too', flush=True)\nprint('still here', file=sys.stderr)"
    command = [sys.executable, "-c", script, str(run_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == "still here\n"
    assert process.wait() == 0


def test_console_in_a_terminal_has_a_bar(run_dir):
    shown = _terminal(SCRIPT, run_dir)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "step  1,000   val loss 2.3412 nats   0.7123 bits/byte\r\n" in text
    assert re.search(r"1,010/20,000 [━╸╺ ]+ loss 2\.5000   val 2\.3412   152k tok/s   0:31:39 left", text)
    assert "─ sample at step 1,200 ─" in text and "[bold]Once [31m upon  a time in caf\u00e9s" in text
    last = text.split("\r\n")[-3:]
    assert re.search(r"20,000/20,000 ━+ loss 2\.2500 ", last[0]) and last[1].startswith("final   val loss 2.2000")
    assert "\x07" not in shown and "\x1b[31m upon" not in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l"), "the cursor stayed hidden"


def test_console_leaves_the_cursor_to_a_killed_terminal(run_dir):
    killed = SCRIPT.replace("console.text(", "import os; os._exit(9)\nconsole.text(")
    shown = _terminal(killed, run_dir)
    assert "1,010/20,000" in shown and shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")


def _terminal(script, run_dir):
    """All that a script writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "error", "-c", script, str(run_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:
        pass  # how Linux reports that the other side is closed
    process.wait()
    os.close(ours)
    return shown.decode()


def test_console_time_left_counts_evaluations_and_no_start(run_dir, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(shelf, "monotonic", lambda: now)
    console = Console(run_dir, 10_000)
    now += 300  # compilation, the first evaluation
    for step in range(10_010, 15_001, 10):
        now += 1 + (99 if step % 1000 == 0 else 0)  # 0.1 s a step, and 99 s of evaluation each 1,000 steps
        console.log(step, _train(step))
    lines = [line for line in capsys.readouterr().out.splitlines() if "left" in line]
    clocks = re.findall(r"(\d+):(\d\d):(\d\d) left", "\n".join(lines))
    left = [int(h) * 3600 + int(m) * 60 + int(s) for h, m, s in clocks]
    assert left[0] == 999  # 9,990 steps of 100 ms, as the first row says
    assert left[-1] == pytest.approx(5000 * 0.1 + 5 * 99, rel=0.02)
    assert 30 < len(lines) < 110  # 1,000 s: a line each 10 s at most, fewer during evaluation


@pytest.mark.parametrize(
    "rows, step_ms, shown",
    [([(0, 10)], 1000, "0:01:30"), ([(0, 10)], math.nan, "-:--:--"), ([(0, 10)], math.inf, "-:--:--"),
     ([(5, 10), (5 + 4000, 20)], math.nan, "8:53:20"), ([(0, 200)], 1000, "0:00:00")],
)  # fmt: skip
def test_time_left(rows, step_ms, shown):
    assert shelf._time_left(100, rows, step_ms) == shown


@pytest.mark.parametrize(
    "value, shown",
    [(0, "0"), (7.25, "7.25"), (999.4, "999"), (999.9, "1k"), (15_234, "15.2k"), (999_499, "999k"), (999_999, "1M"),
     (1.523e6, "1.52M"), (3e9, "3G"), (5e12, "5000G"), (math.nan, "-"), (math.inf, "-")],
)  # fmt: skip
def test_short_numbers(value, shown):
    assert shelf._short(value) == shown


# ---------------------------------------------------------------------------------------------------------- WandB


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    module = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield module
    module.teardown()


def _history(path):
    """Config and rows of an offline run, from the file that ``wandb sync`` reads."""
    from wandb.proto.wandb_internal_pb2 import Record

    config, rows = {}, []
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        for item in record.run.config.update:
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        if record.history.item:
            pairs = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
            rows.append({key: json.loads(value) for key, value in pairs})
    return config, rows


def _records(data):
    """The records of a LevelDB log: blocks of 32 KiB hold fragments with a header (checksum 4, length 2, type 1)."""
    at, parts = 7, b""  # the file begins with seven bytes of its own
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""


def test_wandb_offline_keeps_rows_config_and_id(run_dir, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandB(run_dir, 0)
    _session(logger, 0, 50)
    logger.close(_val())
    wandb.teardown()  # as at exit: wandb's own process may write for a moment longer than finish() takes
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    config, rows = _history(path)
    assert config["GPT.dim"] == 768 and config["GPT.norm"] == "@LayerNorm" and config["facts"]["seed"] == 1
    assert config["GPT.attention"] == ["@short/Flash", "@Flash"]
    assert [row["_step"] for row in rows] == [0, 10, 20, 30, 40]
    assert rows[2]["train/loss_nats"] == 2.98 and rows[2]["val/loss_nats"] == 3.08
    assert rows[2]["sample/_type"] == "html-file" and "sample/_type" not in rows[1]
    identity = (run_dir / "wandb_id").read_text()
    assert path.name == f"run-{identity}.wandb"

    logger = WandB(run_dir, 30, mode="offline")  # resumed: the same run
    logger.log(30, _train(30))
    logger.close({})
    assert {p.name for p in run_dir.glob("wandb/offline-run-*/*.wandb")} == {path.name}
    WandB(run_dir, 0, mode="disabled").close({})  # from the start again: another
    assert (run_dir / "wandb_id").read_text() != identity


def test_wandb_without_a_server_is_offline_soon(run_dir, wandb, monkeypatch):
    """The server answers nothing; what wandb does then is slow and tested by hand, our part of it here."""
    real, stop, asked = wandb.init, wandb.teardown, []

    def init(mode, **chosen):
        asked.append((mode, chosen["settings"].init_timeout))
        if mode != "offline":
            raise wandb.errors.CommError("connection refused\nand more")
        return real(mode=mode, **chosen)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "teardown", lambda: asked.append("teardown") or stop())
    with pytest.warns(UserWarning, match=r"offline, for wandb sync \(connection refused\)$"):
        logger = WandB(run_dir, 0, mode="online")
    logger.log(10, _train(10))
    logger.close({})
    assert asked == [("online", 10), "teardown", ("offline", 10)]  # else wandb finds the id in use
    wandb.teardown()
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert [row["_step"] for row in _history(path)[1]] == [10]


def test_wandb_without_a_key_names_the_remedy(run_dir, wandb, monkeypatch):
    monkeypatch.setenv("NETRC", os.devnull)
    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        with pytest.raises(ValueError, match=r"wandb login.*WandB.mode = 'offline'"):
            WandB(run_dir, 0, mode="online")


def test_wandb_not_installed_names_the_remedy(run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=re.escape('python -m pip install -e ".[wandb]"')):
        WandB(run_dir, 0)
