"""The toolkit from Python: what the command gives, and what a notebook needs besides."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SMALL, assert_exact, command, facts, rows, weights
from test_compare import write_plan, write_run

import toolkit
from toolkit.loop.signals import Signals
from toolkit.objective import Objective
from toolkit.registry import CATALOG, register
from toolkit.rundir.facts import initial_values
from toolkit.start import Preempted

ROOT = Path(__file__).parent.parent
TINY = "gin/model/tiny.gin"
BINDINGS = [*SMALL, "GPT.dropout = 0.1"]
OF_THE_CLOCK = {"seconds", "started", "ended", "peak_memory_bytes", "seal", "name"}

KERNEL = '''\
import torch
from torch import nn

from toolkit.registry import register


@register("attention")
class {name}(nn.Module):
    """Every earlier token weighs the same."""

    def __init__(self, n_head, head_dim):
        super().__init__()

    def forward(self, q, k, v, mask=None):
        return {factor} * v.cumsum(1) / torch.arange(1, v.shape[1] + 1, device=v.device)[:, None, None]
'''


def python(folder: Path, source: str) -> str:
    """Run a program from standard input: as in a notebook, __main__ has no file. Returns its output."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-"], input=source, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``command``: a run of the command. ``first`` and ``again``: the same from Python, with a run of another config
    and of another number of threads in between."""
    path = tmp_path_factory.mktemp("runs")
    flags = [flag for binding in BINDINGS for flag in ("-p", binding)]
    done = command("toolkit.run", TINY, *flags, "--runs", str(path), "--name", "command")
    assert done.returncode == 0, done.stderr
    toolkit.train(TINY, BINDINGS, "first", path)
    other = ["GPT.norm = @RMSNorm", "GPT.n_layer = 1", "Experiment.seed = 3", "Experiment.threads = 2"]
    toolkit.train([TINY], [*BINDINGS, *other], name="other", runs=path)
    toolkit.load(path / "other")
    toolkit.train([TINY], BINDINGS, name="again", runs=path)
    return path


# ---- names ------------------------------------------------------------------------------------------------------


def test_importing_the_toolkit_imports_nothing_slow_and_lists_what_it_offers(tmp_path):
    out = python(
        tmp_path,
        "import sys, toolkit\nprint(dir(toolkit))\nassert not {'torch', 'gin', 'pandas'} & sys.modules.keys()\n"
        "from toolkit import train\nassert train is toolkit.train and callable(train) and train.__doc__, train\n",
    )
    assert out == "['build', 'load', 'read', 'reader', 'register', 'runs', 'train']\n"
    modules = {path.stem for path in (ROOT / "toolkit").iterdir()}
    assert not modules & set(toolkit.__all__), "importing such a module would replace the function of its name"
    with pytest.raises(AttributeError, match="'toolkit' has no attribute 'trian'"):
        toolkit.trian  # noqa: B018


# ---- train ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first", "again"])
def test_train_gives_the_run_of_the_command(folder, name):
    ours, theirs = folder / name, folder / "command"
    assert_exact(theirs, ours, 12)
    names = [{path.relative_to(run).as_posix() for path in run.rglob("*")} for run in (ours, theirs)]
    assert len({re.sub(r"tfevents\.\S*?'", "tfevents'", str(sorted(each))) for each in names}) == 1
    for file in ("config.gin", "bindings.gin"):
        assert (ours / file).read_text() == (theirs / file).read_text()
    one, other = ({k: v for k, v in facts(run).items() if k not in OF_THE_CLOCK} for run in (ours, theirs))
    finals = [{k: v for k, v in each.pop("final").items() if not k.startswith("time/")} for each in (one, other)]
    assert one == other and finals[0] == finals[1]


def test_the_result_names_the_folder_the_state_and_the_last_metrics(tmp_path):
    result = toolkit.train(TINY, SMALL, "a", tmp_path, stop_at=5)
    assert (result.path, result.state, result.step, result.reason) == (tmp_path / "a", "stopped", 5, "")
    assert result.metrics["train/loss_nats"] == rows(tmp_path / "a")[-1]["train/loss_nats"]
    result = toolkit.train(name="a", runs=tmp_path, resume=True)  # with its own config
    assert (result.state, result.step) == ("done", 12) and "val_full/loss_nats" in result.metrics
    assert facts(tmp_path / "a")["resumed"] == [{"step": 5, "changed": {}}]
    assert toolkit.train(name="a", runs=tmp_path, resume=True) == result  # nothing is left to do
    branched = toolkit.train(TINY, SMALL, "b", tmp_path, from_checkpoint=tmp_path / "a", weights_only=True, stop_at=1)
    assert branched.step == 1 and facts(tmp_path / "b")["from"] == str(tmp_path / "a" / "checkpoints" / "best")


def test_a_run_that_diverges_is_a_result(tmp_path, capsys):
    result = toolkit.train(TINY, [*SMALL, "AdamW.lr = 1e30"], "a", tmp_path)
    assert result.state == "diverged" and re.match(r"step \d+: loss", result.reason)
    assert f"error: diverged at {result.reason}" in capsys.readouterr().err


WRONG = {
    "unknown": (["GPT.n_layers = 2"], {}, "GPT has no parameter 'n_layers'; did you mean 'n_layer'"),
    "devices": (["Experiment.devices = 2", "Experiment.accumulate = 1"], {"stop_at": 3}, "this is one: bind Exp"),
    "resume": ([], {"resume": True}, "run not found"),
    "change": ([], {"allow_change": True}, "--allow-change can only be used with --resume"),
    "stop": ([], {"stop_at": 0}, "--stop-at must be 1 or more"),
    "import": ([], {"imports": "nowhere.py"}, "nowhere.py: Python file not found"),
    "name": ([], {"name": "../a"}, "a run's name is 1 to 120 letters"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_raised_as_value_errors_and_leave_nothing(case, tmp_path):
    more, options, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        toolkit.train(TINY, [*SMALL, *more], **{"name": "a", "runs": tmp_path / "runs"} | options)
    assert not (tmp_path / "runs").exists()
    if case == "devices":  # the command that the message names is the one to run
        shown = str(caught.value).partition("run the command: ")[2]
        assert shown.startswith(f"python -m toolkit.run {TINY} -p 'GPT.dim = 32'") and shown.endswith("--stop-at 3")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: toolkit.train(TINY, {"GPT.dim": 16}), r"bindings: \{'GPT.dim': 16\} is no text"),
        (lambda: toolkit.train(None), "overlays: None is no text"),
        (lambda: toolkit.train(TINY, [("GPT.dim", 16)]), r"bindings: \('GPT.dim', 16\) is no text"),
        (lambda: toolkit.train(TINY, name=3), "name: 3 is no text; give name='3'"),
        (lambda: toolkit.train(TINY, runs=None), "runs: a NoneType is no path"),
        (lambda: toolkit.train(TINY, from_checkpoint=3), "from_checkpoint: a int is no path"),
        (lambda: toolkit.build(TINY, imports=3), "imports: 3 is no text"),
        (lambda: toolkit.build(base=3), "base: a int is no path"),
        (lambda: toolkit.build(TINY, device="gpu"), "device = 'gpu' can't be used here"),
        (lambda: toolkit.load(toolkit.start.Result(Path("a"), "done", 1, {})), "run: a Result is no path.* run.path"),
        (lambda: toolkit.reader(None), "run: a NoneType is no path"),
        (lambda: toolkit.runs(None), "patterns: None is no text"),
        (lambda: toolkit.read(*toolkit.build(TINY), ["a", "b"]), "text: a list is no text"),
    ],
)
def test_an_argument_of_another_type_or_an_unknown_device_is_a_value_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_text_in_place_of_several_is_a_value_error(folder):
    reader = toolkit.reader(folder / "command")
    with pytest.raises(ValueError, match=r"reader.nats takes a list of texts.*write \[text\]"):
        reader.nats("The hen")
    with pytest.raises(ValueError, match="reader.generate takes a list of texts"):
        reader.generate("The hen", 2)


def test_a_device_that_this_machine_lacks_is_a_value_error(folder):
    with pytest.raises(ValueError, match="device = 'cuda:99' can't be used here"):
        toolkit.load(folder / "command", device="cuda:99")


def test_an_existing_run_is_refused_and_one_process_trains_one_run(folder, tmp_path):
    with pytest.raises(ValueError, match="already exists: continue it with --resume"):
        toolkit.train(TINY, BINDINGS, "first", folder)
    errors = []

    def second():
        with pytest.raises(ValueError, match="trains another run already") as caught:
            toolkit.train(TINY, SMALL, "b", tmp_path)
        errors.append(caught.value)

    class Meanwhile:
        def __init__(self, run_dir, start_step): ...

        def log(self, step, metrics):
            if not errors:
                second()

        def text(self, step, name, text): ...
        def close(self, summary): ...

    Meanwhile.__module__ = "test_notebook"
    register("logger")(Meanwhile)
    toolkit.train(TINY, [*SMALL, "Experiment.loggers = [@Meanwhile]"], "a", tmp_path, stop_at=2)
    assert errors and not (tmp_path / "b").exists()


def test_the_number_of_threads_is_put_back(folder):
    assert facts(folder / "other")["threads"] == 2 and torch.get_num_threads() == 1


# ---- signals ----------------------------------------------------------------------------------------------------


def test_an_interrupt_saves_raises_and_puts_the_handlers_back(folder, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    metrics = tmp_path / "a" / "metrics.jsonl"

    def interrupt():
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    longer = [*(text for text in SMALL if "Experiment.steps" not in text), "Experiment.steps = 2000"]
    with pytest.raises(Preempted, match="continue it with resume=True") as caught:
        toolkit.train(TINY, longer, "a", tmp_path)
    assert isinstance(caught.value, KeyboardInterrupt) and caught.value.result.state == "preempted"
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    step = caught.value.result.step
    assert step >= 2 and json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "preempted"
    toolkit.train(name="a", runs=tmp_path, resume=True, stop_at=step + 5)
    toolkit.train(TINY, longer, "straight", tmp_path, stop_at=step + 5)
    trained = [
        {r["step"]: r["train/loss_nats"] for r in rows(tmp_path / name) if "lr" in r} for name in ("a", "straight")
    ]
    assert trained[0] == trained[1] and len(trained[0]) == step + 5


@pytest.fixture
def ctrl_c_raises():
    """A shell starts processes in the background with SIGINT ignored; here it raises KeyboardInterrupt, as usual."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_raises_at_once_and_the_process_lives(ctrl_c_raises):
    with pytest.raises(KeyboardInterrupt), Signals(second_ends_process=False) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.caught == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_train_works_in_a_thread_where_signals_can_not_be_caught(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(toolkit.train(TINY, SMALL, "a", tmp_path, stop_at=2)))
    thread.start()
    thread.join()
    assert results[0].state == "stopped"


# ---- parts of one's own -------------------------------------------------------------------------------------------


def own_part(file: Path, factor: int) -> None:
    file.write_text(KERNEL.format(name="Averaging", factor=factor))


def test_a_changed_file_is_imported_again_and_the_run_keeps_what_was_trained(tmp_path):
    bindings = [*SMALL, "GPT.attention = @Averaging"]
    file = tmp_path / "averaging_part.py"
    own_part(file, 1)
    toolkit.train(TINY, bindings, "one", tmp_path, imports=[file], stop_at=3)
    own_part(file, 2)  # as long as before, and within the same second
    toolkit.train(TINY, bindings, "two", tmp_path, imports=[file], stop_at=3)
    assert "return 2 *" in (tmp_path / "two" / "code" / "averaging_part.py").read_text()
    (tmp_path / "twice_part.py").write_text(KERNEL.format(name="Twice", factor=2))
    same = [*SMALL, "GPT.attention = @Twice"]
    toolkit.train(TINY, same, "same", tmp_path, imports=tmp_path / "twice_part.py", stop_at=3)
    assert rows(tmp_path / "two") == rows(tmp_path / "same") != rows(tmp_path / "one")
    toolkit.load(tmp_path / "two")
    with pytest.raises(ValueError, match="another 'averaging_part' is already loaded.*use a separate process"):
        toolkit.load(tmp_path / "one")
    file.write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="can't import .*averaging_part.py again: ZeroDivisionError"):
            toolkit.build(TINY, bindings)
    own_part(file, 3)
    assert toolkit.build(TINY, bindings, imports=[file])[0].mixers[0].attention


def test_a_class_in_a_notebook_is_built_replaced_and_refused_by_train(tmp_path):
    cell = KERNEL.format(name="InCell", factor=1)
    again = KERNEL.format(name="InCell", factor=2)
    out = python(
        tmp_path,
        f"""
import toolkit
bindings = {[*SMALL, "GPT.attention = @InCell"]!r}
exec({cell!r})
one = toolkit.build({TINY!r}, bindings)
exec({again!r})
two = toolkit.build({TINY!r}, bindings)
name = "blocks.0.mixer.attention"
print([toolkit.read(*each, "Once").attention[name].sum(-1).mean().item() for each in (one, two)])
try:
    toolkit.train({TINY!r}, bindings, "a")
except ValueError as error:
    print(error)
with open("in_cell.py", "w") as file:
    file.write({again!r})
print(toolkit.train({TINY!r}, bindings, "a", imports="in_cell.py", stop_at=1).state)
try:
    exec({cell.replace("InCell", "SDPA")!r})
except ValueError as error:
    print(error)
""",
    )
    lines = out.splitlines()
    assert lines[0] == "[1.0, 2.0]"
    assert lines[1].startswith("InCell: defined in the notebook or the script itself") and "%%writefile" in lines[1]
    assert "stopped" in lines and "the name is taken by the attention in components.attention" in lines[-1]
    assert (tmp_path / "runs" / "a" / "code" / "in_cell.py").read_text() == again


def test_a_module_that_is_reloaded_replaces_its_parts_and_a_name_given_twice_is_an_error(tmp_path, monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "reloaded_part.py"
    file.write_text(KERNEL.format(name="Reloaded", factor=1))
    module = importlib.import_module("reloaded_part")
    before = CATALOG["Reloaded"].cls
    importlib.reload(module)
    assert CATALOG["Reloaded"].cls is module.Reloaded is not before
    file.write_text(KERNEL.format(name="Reloaded", factor=1) + KERNEL.format(name="Reloaded", factor=2))
    with pytest.raises(ValueError, match="the name is taken by the attention in reloaded_part"):
        importlib.reload(module)


# ---- build, load and read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["Experiment.tokenizer = @BPE", "BPE.vocab_size = 300"]], ids=["bytes", "bpe"])
def test_build_gives_the_weights_of_a_run_at_step_0(more, folder, tmp_path):
    run = folder / "first"
    if more:
        run = toolkit.train(TINY, [*BINDINGS, *more], "a", tmp_path, stop_at=1).path
    torch.rand(3)  # whatever was drawn before
    model, tokenizer = toolkit.build(TINY, [*BINDINGS, *more])
    assert initial_values(model) == facts(run)["init"]
    assert not model.training and tokenizer.decode(tokenizer.encode("Once upon a time")) == "Once upon a time"
    assert tokenizer.fingerprint() == facts(run)["tokenizer"]
    other, _ = toolkit.build(TINY, [*BINDINGS, *more, "Experiment.seed = 1"])
    assert initial_values(other) != initial_values(model)
    with pytest.raises(ValueError, match="did you mean 'n_layer'"):
        toolkit.build(TINY, ["GPT.n_layers = 3"])


def test_load_gives_the_weights_of_the_run(folder):
    model, _ = toolkit.load(folder / "first" / "checkpoints" / "step-00000012", device="cpu")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights(folder / "first", 12).items())


def test_a_reading_has_the_logits_nats_and_attention_of_the_model(folder):
    model, tokenizer = toolkit.load(folder / "first")
    text = "Once upon a té"
    reading = toolkit.read(model, tokenizer, text)
    ids = tokenizer.encode(text)
    inputs = torch.tensor([[tokenizer.eot, *ids]])
    with torch.no_grad():
        hidden, head = model(inputs)
        loss = Objective(model, CATALOG["CrossEntropy"].cls(), None)(inputs[:, :-1], inputs[:, 1:])[0]
    assert reading.ids.tolist() == ids and reading.tokens[:4] == list("Once") and reading.tokens[-1] == "\ufffd"
    assert torch.equal(reading.logits, head.logits(hidden)[0])
    assert reading.nats.sum().item() == pytest.approx(loss.item(), rel=1e-5)
    nats = toolkit.reader(folder / "first").nats([text])[0].nats
    assert np.allclose(reading.nats, nats, rtol=1e-5)
    assert list(reading.attention) == ["blocks.0.mixer.attention", "blocks.1.mixer.attention"]
    for weight in reading.attention.values():
        assert weight.shape == (4, len(ids) + 1, len(ids) + 1) and not weight.triu(1).any()
        assert torch.allclose(weight.sum(-1), torch.ones(()), atol=1e-5)


def test_a_text_is_read_as_in_training_with_documents_apart():
    """The token before the text ends another document: no token of the text reads it."""
    bindings = [*SMALL, "Experiment.mask_documents = True", "GPT.attention = @SDPA"]
    model, tokenizer = toolkit.build(TINY, bindings)
    apart = toolkit.read(model, tokenizer, "Once").attention["blocks.0.mixer.attention"]
    assert not apart[:, 1:, 0].any()
    model, tokenizer = toolkit.build(TINY, [*SMALL, "GPT.attention = @SDPA"])
    assert toolkit.read(model, tokenizer, "Once").attention["blocks.0.mixer.attention"][:, 1:, 0].all()


def test_a_reading_says_what_it_can_not_read():
    model, tokenizer = toolkit.build(TINY, SMALL)
    with pytest.raises(ValueError, match=r"40 tokens; .* holds 31: .* toolkit.reader\(run\).nats"):
        toolkit.read(model, tokenizer, "x" * 40)
    assert len(toolkit.read(model, tokenizer, "x" * 31).nats) == 31
    assert toolkit.read(model, tokenizer, "").logits.shape == (1, 257)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        toolkit.read(model.train(), tokenizer, "x")
    linear, tokenizer = toolkit.build([TINY, "gin/mixer/gated_linear_recurrence.gin"])
    assert toolkit.read(linear, tokenizer, "x").attention == {}


# ---- runs -------------------------------------------------------------------------------------------------------


def test_runs_are_a_table_of_final_values_and_of_rows(folder):
    frame = toolkit.runs(folder / "*")
    assert list(frame["run"]) == ["again", "command", "first", "other"]
    assert list(frame.columns[:6]) == ["run", "arm", "seed", "state", "step", "steps"]
    assert {"Experiment.threads", "GPT.norm", "GPT.n_layer", "LayerNorm.eps"} < set(frame.columns[6:])
    assert list(frame["GPT.norm"]) == ["@LayerNorm"] * 3 + ["@RMSNorm"] and list(frame["seed"]) == [0, 0, 0, 3]
    assert "GPT.dim" not in frame and "Experiment.seed" not in frame and set(frame["damage"]) == {""}
    for metric, value in facts(folder / "first")["final"].items():
        if metric not in ("state", "step", "best", "tokens"):
            assert frame.set_index("run").loc["first", metric] == value, metric
    assert frame["parameters"].max() == facts(folder / "first")["parameters"]["total"]
    table = toolkit.runs([folder / "first", folder / "other"], rows=True)
    first = table[table["run"] == "first"].drop(columns=["run", "path"])
    expected = rows(folder / "first")
    assert len(first) == len(expected) and set(table["run"]) == {"first", "other"}
    for (_, line), row in zip(first.iterrows(), expected, strict=True):
        found = {name: value for name, value in line.items() if value == value and not name.startswith("time/")}
        assert found == row


def test_runs_of_a_plan_have_their_arms_also_those_not_begun(tmp_path):
    plan = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(2))
    (plan / "NoPE-s1").rename(tmp_path / "elsewhere")
    frame = toolkit.runs(plan).set_index("run")
    assert dict(frame["arm"]) == {"rope-s0": "rope", "rope-s1": "rope", "NoPE-s0": "NoPE", "NoPE-s1": "NoPE"}
    assert frame.loc["NoPE-s1", "state"] == "not begun" and frame.loc["NoPE-s1", "seed"] == 1
    assert np.isnan(frame.loc["NoPE-s1", "val_full/loss_nats"])
    assert frame.loc["rope-s0", "GPT.position"] == "@RoPE" and "RoPE.theta" in frame
    assert len(toolkit.runs([str(plan), str(plan / "rope-*"), str(tmp_path / "*")])) == 5  # each run once


def test_damaged_and_foreign_folders(tmp_path, caplog):
    for name, state in {"a": "done", "b": "done", "c": "diverged", "d": "running"}.items():
        write_run(tmp_path / name, state=state)
    (tmp_path / "b" / "facts.json").write_text('{"name": "b", "seal": "0"}')
    (tmp_path / "notes").mkdir()
    (tmp_path / "empty.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        frame = toolkit.runs(tmp_path / "*").set_index("run")
    assert list(frame.index) == ["a", "b", "c", "d"] and "facts.json is damaged" in frame.loc["b", "damage"]
    assert "its metrics are left out" in caplog.text and np.isnan(frame.loc["b", "val/loss_nats"])
    assert list(frame["state"]) == ["done", "done", "diverged", "running"]
    assert "b" not in set(toolkit.runs(tmp_path, rows=True)["run"])
    (tmp_path / "plan.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert len(toolkit.runs(tmp_path)) == 4
    assert "its runs are read without their arms" in caplog.text


@pytest.mark.parametrize("pattern", ["nothing/*", "notes", []])
def test_a_pattern_that_matches_no_run_is_an_error(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    with pytest.raises(ValueError, match="no run or plan found|name at least one run"):
        toolkit.runs(pattern)


def test_a_missing_pandas_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match="python -m pip install pandas"):
        toolkit.runs("runs/*")


# ---- the page and the notebook ------------------------------------------------------------------------------------


def blocks_of_the_page() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "notebook.md").read_text(), re.MULTILINE | re.DOTALL)


def cells_of_the_notebook() -> list[str]:
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def as_program(cells: list[str]) -> str:
    """The cells in order; one that begins with a file's name, or %%writefile and the name, is written into the file."""
    lines = []
    for cell in cells:
        match = re.match(r"(?:# |%%writefile )(\w+\.py)\n", cell)
        body = cell[match.end() :] if match else ""
        lines.append(f"open({match[1]!r}, 'w').write({body!r})" if match else re.sub(r"^%.*$", "", cell, flags=re.M))
    return "\n".join(lines)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path):
    out = python(tmp_path, as_program(blocks_of_the_page()))
    assert "done 40 " in out and "torch.Size([1, 16, 64])" in out and "step" in out
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"rope", "alibi", "nope", "mean"}
    assert (tmp_path / "runs" / "mean" / "code" / "mean_attention.py").is_file()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    program = as_program(cells_of_the_notebook()).replace("steps = 800", "steps = 40", 1)
    assert "steps = 40" in program
    python(tmp_path, program)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"rope", "nope", "mean"}
    assert all(facts(path)["steps"] == 40 for path in (tmp_path / "runs").iterdir())


def test_the_notebook_was_executed_and_names_no_machine():
    path = ROOT / "docs" / "notebook.ipynb"
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    shown = json.dumps([output.get("text", "") for output in outputs])
    assert not re.search(r"(?<![\w/.])/(?:home|root|work|tmp|usr)/", shown) and path.stat().st_size < 300_000
