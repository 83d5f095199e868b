"""The conformance check: each planted fault fails its line, no sound part is accused, and the command says so."""

import json
import re

import pytest
from planted import FAULTS, SOUND

from toolkit.components import main as components
from toolkit.compose import load_shelf
from toolkit.conformance import CHECKS, Bench, lines

load_shelf()


@pytest.mark.parametrize("entry, line", [pytest.param(*fault, id=fault[0].name) for fault in FAULTS])
def test_a_planted_fault_fails_its_own_line(entry, line):
    (found,) = lines(Bench(entry), only=line)
    assert found.verdict == "fail" and found.why, found


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in SOUND])
def test_a_sound_part_is_not_accused(entry):
    assert [line for line in lines(Bench(entry), slow=False) if line.verdict == "fail"] == []


def test_every_line_has_a_part_that_fails_it_or_needs_none():
    """A line that nothing can fail checks nothing."""
    planted = {line for _, line in FAULTS}
    shown_elsewhere = {
        "bfloat16 against float32",
        "documents stay apart",
        "evaluation weights come and go",
        "an impossible warm-up is refused",
        "lowers the loss of a regression",
        "logs, and ends",
        "padding the vocabulary changes nothing",
        "prepared once, with one fingerprint",
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
    assert "causality, by values" in out and "T=2, 13, 33, 64" in out
    assert components(["check", *line, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["part"] == name and {line["verdict"] for line in report["lines"]} == {"pass", "n/a"}


def test_the_command_says_what_a_broken_part_breaks(tmp_path, capsys):
    file = tmp_path / "mean_broken.py"
    file.write_text(KERNEL.format(name="Broken", sum="sum(1, keepdim=True).expand_as(v)"))
    assert components(["check", f"{file}:MeanBroken"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert any("causality, by values" in line and "at T=" in line for line in failed)


def test_the_command_refuses_what_it_can_not_load(tmp_path, capsys):
    file = tmp_path / "mean_other.py"
    file.write_text(KERNEL.format(name="Other", sum="cumsum(1)"))
    wrong = {
        "RSMNorm": "there is no part 'RSMNorm'; did you mean 'RMSNorm'?",
        f"{file}:NeverRegistered": f"{file} registers no part 'NeverRegistered'; put @register",
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
