"""After the other files of this folder: no part with numbers of its own has gone without a reference."""

import importlib.util

import pytest
from conftest import PARITY, parts

NUMERIC = (
    "attention",
    "position",
    "mixer",
    "norm",
    "ffn",
    "block",
    "init",
    "loss",
    "optimizer",
    "schedule",
    "evaluator",
    "probe",
)


PACKAGES = {"LMEval": "lm_eval"}  # parts that need an extra, which the tests' own environment may lack


def test_every_part_was_compared_with_something_that_is_not_ours(request):
    folder = {item.path.name for item in request.session.items if item.path.parent.name == "parity"}
    if not {f"test_{kind}.py" for kind in NUMERIC} <= folder or request.config.option.keyword:
        pytest.skip("the rest of the folder is not part of this run")
    compared = set(request.config.stash.get(PARITY, []))
    absent = {name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is None}
    assert {part.values[0].name for part in parts(*NUMERIC)} - compared - absent == set()
