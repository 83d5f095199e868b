"""The table of tiers: in which form ``convert --to hf`` writes each part."""

import pytest
import tiers_table
from remotefolders import MODEL_KINDS, built

from toolkit import convert
from toolkit.exchange import choice, describe, tiers
from toolkit.registry import CATALOG

OWN = """
from torch import nn
from toolkit.registry import register

@register("norm")
class Halved(nn.Module):
    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x):
        return 0.5 * x

def make():
    @register("norm")
    class Hidden(nn.Module):
        def __init__(self, dim: int):
            super().__init__()

    return Hidden

make()
"""


@pytest.fixture
def catalogue():
    """The catalogue, without what a test adds."""
    before = dict(CATALOG)
    yield CATALOG
    CATALOG.clear()
    CATALOG.update(before)


def test_the_page_shows_the_tiers_as_they_are():
    text = tiers_table.PAGE.read_text(encoding="utf-8")
    written = text.partition(tiers_table.BEGIN)[2].partition(tiers_table.END)[0]
    assert written == tiers_table.markdown(), "run python -m tests.tiers_table"


def test_every_part_of_a_model_has_one_tier_and_parts_of_ones_own_too(tmp_path, catalogue, capsys, monkeypatch):
    (tmp_path / "own_tiers.py").write_text(OWN)
    monkeypatch.setenv("COLUMNS", "80")
    assert convert.main(["--tiers", "--import", str(tmp_path / "own_tiers.py")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line.split()[0] for line in lines if line[:2] == "  " and line[2] != " "]
    parts = [entry.name for entry in catalogue.values() if entry.kind in (*MODEL_KINDS, "tokenizer")]
    assert sorted(name for name in shown if not name.startswith("gin/")) == sorted(parts)
    tiers_of = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line[:2] == "  " and line[2] != " "}
    assert tiers_of["Halved"] == "code" and tiers_of["RMSNorm"].startswith("native: llama")
    assert tiers_of["Hidden"].startswith("refused: ") and tiers_of["Symbols"].startswith("refused: ")


def test_a_row_says_what_the_command_does():
    """The first type of a row is the one that the command writes, and a row without types has none."""
    for row in tiers.rows([entry for entry in CATALOG.values() if entry.kind == "ffn"]):
        if row.kind == "ffn" and not row.name.startswith("gin/"):
            described = describe.describe(built(f"GPT.ffn = @{row.name}"))
            if row.native:
                assert choice.choose(described, {})[0].model_type == row.native[0]
            else:
                with pytest.raises(ValueError, match="no architecture"):
                    choice.choose(described, {})


def test_a_position_that_no_mixer_uses_has_no_knobs_and_is_no_architectures():
    with pytest.raises(ValueError, match="no architecture of transformers computes"):
        choice.choose(describe.describe(built("GPT.mixer = @GatedLinearRecurrence")), {})
