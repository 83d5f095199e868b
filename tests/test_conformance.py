"""The conformance check: each planted fault fails its line, no correct part fails one, and the command prints it."""

import json
import re
from pathlib import Path

import pytest
from planted import FAULTS, SOUND
from runs import command, rows

from toolkit.components import main as components
from toolkit.compose import load_shelf
from toolkit.conformance import CHECKS, Bench, run_checks

load_shelf()
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "components" / "README.md").read_text(encoding="utf-8")  # "Add a part"


ITEMS = [  # of the planted evaluators
    ("The hens are red.", "The hens is red.", "A fox ran by the old mill", ["home", "mill", "seven"], 0),
    ("The old foxes sleep.", "The old foxes sleeps.", "She fed the red hen", ["corn", "stone"], 0),
    ("A mill turns by the water.", "A mill turn by the water.", "The water ran cold", ["fast", "blue", "nine"], 1),
    ("They went home.", "They goes home.", "He slept", ["well", "table"], 1),
    ("Her hen was found.", "Her hen were found.", "The gate stood open", ["all night", "never egg"], 0),
]
FIELDS = ("sentence_good", "sentence_bad", "context", "choices", "answer")


@pytest.fixture
def bench_for(tmp_path):
    """The bench of a planted part; one with a knob ``paths`` gets a small file of items."""

    def build(entry):
        if "paths" not in entry.knobs:
            return Bench(entry)
        file = tmp_path / "items.jsonl"
        file.write_text("".join(json.dumps(dict(zip(FIELDS, item, strict=True))) + "\n" for item in ITEMS))
        return Bench(entry, {"paths": [str(file)]})

    return build


@pytest.mark.parametrize("entry, line", [pytest.param(*fault, id=fault[0].name) for fault in FAULTS])
def test_a_planted_fault_fails_its_own_line(entry, line, bench_for):
    (found,) = run_checks(bench_for(entry), only=line)
    assert found.verdict == "fail", found
    error, _, remedy = found.why.partition("; ")
    assert error and (remedy or "/tests/planted.py:" in error), found


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in SOUND])
def test_a_sound_part_is_not_accused(entry, bench_for):
    assert [line for line in run_checks(bench_for(entry), slow=False) if line.verdict == "fail"] == []


@pytest.mark.parametrize(
    "entry, line", [pytest.param(*f, id=f[0].name) for f in FAULTS if f[0].kind in ("evaluator", "probe")]
)
def test_a_planted_measure_fails_no_other_line(entry, line, bench_for):
    assert {found.check for found in run_checks(bench_for(entry)) if found.verdict == "fail"} == {line}


def test_every_line_has_a_part_that_fails_it_or_needs_none():
    """A check that no part can fail tests nothing."""
    planted = {line for _, line in FAULTS}
    shown_elsewhere = {
        "bfloat16 agrees with float32",
        "packed documents do not mix",
        "eval() and train() restore the weights",
        "refuses a warm-up that is too long",
        "lowers the loss of a regression",
        "logs and closes",
        "vocabulary padding changes no weights",
        "prepare() twice gives the same data",
        "steps on the meta device",
    }
    assert {check.title for check in CHECKS} == planted | shown_elsewhere


KERNEL = '''\
import torch
from torch import nn

from toolkit.registry import register


class NeverRegistered:
    pass


@register("attention")
class Mean{name}(nn.Module):
    """The mean of all values so far."""

    def __init__(self, n_head, head_dim):
        super().__init__()

    def forward(self, q, k, v, mask=None):
        count = torch.arange(1, v.shape[1] + 1, device=v.device, dtype=v.dtype)[:, None, None]
        return v.{sum} / count
'''


@pytest.mark.parametrize("form", ["file", "module", "name"])
def test_the_command_checks_a_part_of_ones_own(form, tmp_path, monkeypatch, capsys):
    file = tmp_path / f"mean_{form}.py"
    file.write_text(KERNEL.format(name=form.title(), sum="cumsum(1)"))
    monkeypatch.syspath_prepend(tmp_path)
    name = f"Mean{form.title()}"
    line = {"file": [f"{file}:{name}"], "module": [f"mean_{form}:{name}"], "name": [name, "--import", str(file)]}[form]
    assert components(["check", *line]) == 0
    out = capsys.readouterr().out
    assert f"{name} (attention" in out and "0 fail" in out
    assert "causal: later tokens change no output" in out and "T=2, 13, 33, 64" in out
    assert components(["check", *line, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["part"] == name and {line["verdict"] for line in report["lines"]} == {"pass", "n/a"}


def test_the_command_says_what_a_broken_part_breaks(tmp_path, capsys):
    file = tmp_path / "mean_broken.py"
    file.write_text(KERNEL.format(name="Broken", sum="sum(1, keepdim=True).expand_as(v)"))
    assert components(["check", f"{file}:MeanBroken"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert any("causal: later tokens change no output" in line and "at T=" in line for line in failed)


def test_the_command_refuses_what_it_can_not_load(tmp_path, capsys):
    file = tmp_path / "mean_other.py"
    file.write_text(KERNEL.format(name="Other", sum="cumsum(1)"))
    wrong = {
        "RSMNorm": "part not found: 'RSMNorm'; did you mean 'RMSNorm'?",
        f"{file}:NeverRegistered": f"part not found: 'NeverRegistered'; {file} does not register it; put @register",
        f"{tmp_path}/nowhere.py:X": "Python file not found",
        "no.such.module:X": "can't import 'no.such.module'",
        "TextFiles": "TextFiles.paths is not bound",
    }
    for name, said in wrong.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            components(["check", name])


def test_knobs_can_be_given_to_check_with(capsys):
    assert components(["check", "SlidingWindow", "-p", "SlidingWindow.window = 3"]) == 0
    with pytest.raises(ValueError, match="SlidingWindow.window = 0"):
        components(["check", "SlidingWindow", "-p", "SlidingWindow.window = 0"])


def masked(line: str) -> str:
    """A line of the report without what differs between processors: measured numbers, and where they were largest."""
    return re.sub(r"(?<=: )[\d.]+(e[-+]\d+)?( at T=\d+)?", "#", line).strip()


def test_the_pages_quote_the_report_as_it_is(tmp_path):
    """Followed literally: the page's file under another name, checked; then with the mask that is off by one."""
    source = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    report: set[str] = set()
    for name, changed in {"MyAttention": source, "OffByOne": source.replace("triu(1)", "triu(2)")}.items():
        file = tmp_path / f"{name.lower()}.py"
        file.write_text(changed.replace("CosineAttention", name))
        done = command("toolkit.components", "check", f"{file}:{name}")
        assert done.returncode == (name == "OffByOne"), done.stdout + done.stderr
        report |= {masked(line) for line in done.stdout.splitlines()}
    quoted = re.compile(r"^(?:pass|fail|n/a)  .*$|^\d+ pass, .*$", re.MULTILINE)
    for page in (PAGE, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert quoted.findall(page)
        assert [line for line in quoted.findall(page) if masked(line) not in report] == []


@pytest.mark.slow
def test_the_part_of_the_page_trains(tmp_path):
    (tmp_path / "my_attention.py").write_text(
        re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1].replace("CosineAttention", "MyAttention")
    )
    bindings = ["GPT.attention = @MyAttention", "Experiment.steps = 20", "warmup_steps = 2"]
    flags = [flag for binding in bindings for flag in ("-p", binding)]
    words = ["gin/model/tiny.gin", "--import", f"{tmp_path}/my_attention.py", *flags, "--runs", str(tmp_path)]
    done = command("toolkit.run", *words, "--name", "a")
    assert done.returncode == 0, done.stderr
    losses = [row["train/loss_nats"] for row in rows(tmp_path / "a") if "train/loss_nats" in row]
    assert losses[-1] < losses[0] - 1 and (tmp_path / "a" / "code" / "my_attention.py").is_file()
