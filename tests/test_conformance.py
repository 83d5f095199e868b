"""The conformance check: each planted fault fails its line, no sound part is accused, and the command says so."""

import pytest
from planted import FAULTS, SOUND

from toolkit.compose import load_shelf
from toolkit.conformance import CHECKS, Bench, lines

load_shelf()


@pytest.mark.parametrize("entry, line", [pytest.param(*fault, id=fault[0].name) for fault in FAULTS])
def test_a_planted_fault_fails_its_own_line(entry, line):
    found = {each.check: each for each in lines(Bench(entry), slow="compile" in line)}
    assert found[line].verdict == "fail", found[line]
    assert found[line].why


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
