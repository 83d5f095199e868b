"""Damage to the files of a run is noticed when a command reads them, and named; an edit on purpose has a way on."""

import json
import logging
import shutil

import pytest
from runs import facts, rows, small_run

from toolkit import run
from toolkit.compose import open_run
from toolkit.store import disk, journal, seal
from toolkit.store.checkpoint import read_manifest

OWN = '''"""A norm of one's own."""
from torch import nn
from toolkit.registry import register

@register("norm")
class SealedNorm(nn.LayerNorm):
    """LayerNorm by another name."""

    def __init__(self, dim: int):
        super().__init__(dim)
'''


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with a part and a tokenizer of its own that stopped at step 8; read, never written to."""
    runs = tmp_path_factory.mktemp("stopped")
    (runs / "sealed_norm.py").write_text(OWN)
    bindings = ("GPT.norm = @SealedNorm", "Experiment.tokenizer = @BPE", "BPE.vocab_size = 300")
    flags = ("--import", str(runs / "sealed_norm.py"), "--stop-at", "8")
    assert small_run(runs, "a", *flags, bindings=bindings) == 0
    return runs / "a"


@pytest.fixture
def damaged(stopped, tmp_path):
    """A copy of it that may be harmed."""
    return shutil.copytree(stopped, tmp_path / "a")


def flip(path, place=None):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


def test_a_json_file_proves_itself(tmp_path):
    disk.write_json(tmp_path / "x.json", {"a": 1.5, "b": [None, float("nan")]})
    assert disk.read_json(tmp_path / "x.json")["a"] == 1.5
    text = (tmp_path / "x.json").read_text()
    (tmp_path / "x.json").write_text(text.replace("1.5", "1.25"))
    with pytest.raises(ValueError, match=r"x.json is damaged: its content does not fit its seal; .* delete its entry"):
        disk.read_json(tmp_path / "x.json")
    unsealed = {key: value for key, value in json.loads(text).items() if key != seal.KEY}
    (tmp_path / "x.json").write_text(json.dumps(unsealed))
    assert disk.read_json(tmp_path / "x.json")["a"] == 1.5
    assert disk.read_json(tmp_path / "absent.json") == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_json_file_that_is_none_is_named(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.json is damaged"):
        disk.read_json(tmp_path / "x.json")


def test_a_gin_text_proves_itself_and_its_neighbours():
    text = "GPT.dim = 8\n"
    sealed = seal.seal_text(text, {"bindings.gin": "0" * 64})
    found = seal.unseal_text(sealed)
    assert (found.text, found.problem, found.files) == (text, None, {"bindings.gin": "0" * 64})
    for place in range(len(sealed)):
        other = sealed[:place] + chr(ord(sealed[place]) ^ 1) + sealed[place + 1 :]
        found = seal.unseal_text(other)
        assert found.problem or not found.is_sealed or found.files != {"bindings.gin": "0" * 64}, place
    assert seal.unseal_text(text) == seal.SealedText(text)


@pytest.mark.parametrize("name", ["config.gin", "tokenizer/tokenizer.json", "code/sealed_norm.py"])
def test_a_flipped_bit_in_what_a_model_is_made_of_is_named(name, damaged):
    flip(damaged / name)
    with pytest.raises(ValueError, match=name):
        open_run(damaged)


def test_a_cut_tokenizer_of_a_run_without_seals_is_named(damaged):
    known = json.loads((damaged / "facts.json").read_text())
    (damaged / "facts.json").write_text(
        json.dumps({k: v for k, v in known.items() if k not in ("tokenizer_files", "seal")})
    )
    file = damaged / "tokenizer" / "tokenizer.json"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"tokenizer can't be loaded .* copy it from a backup"):
        open_run(damaged)


def test_code_that_was_edited_on_purpose_runs_once_the_seal_is_deleted(damaged, caplog):
    code, config = damaged / "code" / "sealed_norm.py", damaged / "config.gin"
    code.write_text(code.read_text().replace("by another name", "edited on purpose"))
    with pytest.raises(ValueError, match=r"code/sealed_norm.py is not what was written; .* delete the lines"):
        open_run(damaged)
    config.write_text("".join(x for x in config.read_text().splitlines(True) if not x.startswith("# sealed")))
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="another 'sealed_norm' is already loaded"):
        open_run(damaged)  # in a process of its own it would run
    assert "has no checksum" in caplog.text


def test_a_run_without_seals_opens_with_one_line(tmp_path, caplog):
    assert small_run(tmp_path, "a", "--stop-at", "4") == 0
    config = tmp_path / "a" / "config.gin"
    config.write_text(seal.unseal_text(config.read_text()).text)
    caplog.clear()
    open_run(tmp_path / "a")
    assert caplog.text.count("has no checksum") == 1


def test_damaged_facts_and_status_are_named_and_the_run_goes_on(tmp_path, caplog):
    assert small_run(tmp_path, "a", "--stop-at", "4") == 0
    for name in ("facts.json", "status.json"):
        flip(tmp_path / "a" / name)
    assert small_run(tmp_path, "a", "--resume") == 0
    assert "facts.json is damaged" in caplog.text and "status.json is damaged" in caplog.text
    assert facts(tmp_path / "a")["final"]["step"] == 12


# --- rows


def test_a_checkpoint_vouches_for_the_rows_before_it(stopped):
    covered = read_manifest(stopped / "checkpoints" / "step-00000008")["journal"]
    lines = (stopped / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    before = b"".join(line for line in lines if json.loads(line)["step"] < 8)
    assert covered["metrics.jsonl"]["size"] == len(before) < (stopped / "metrics.jsonl").stat().st_size + 1
    assert journal.damage(stopped, covered) is None
    assert journal.damage(stopped, disk.read_json(stopped / "status.json")["journal"], whole=True) is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.md"])
@pytest.mark.parametrize("harm", ["cut", "emptied", "flipped"])
def test_damaged_rows_are_named_and_recorded_by_a_resume(name, harm, tmp_path, caplog):
    assert small_run(tmp_path, "a", "--stop-at", "8") == 0
    path = tmp_path / "a" / name
    content = path.read_bytes()
    if harm == "flipped":
        flip(path, 4)
    else:
        path.write_bytes(content[:20] if harm == "cut" else b"")
    assert small_run(tmp_path, "a", "--resume") == 0
    assert f"{name} " in caplog.text and "is incomplete" in caplog.text
    assert name in facts(tmp_path / "a")["resumed"][-1]["damaged"][0]


def test_a_corrupt_line_costs_itself_and_no_other_row(tmp_path):
    assert small_run(tmp_path, "a", "--stop-at", "8") == 0
    path = tmp_path / "a" / "metrics.jsonl"
    before = rows(tmp_path / "a")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\xff{\n", *lines[3:], b'{"step": 8, "half']))
    assert rows(tmp_path / "a") == before[:2] + before[3:]
    assert journal.corrupt(path) == [3]


def test_a_carriage_return_in_a_sample_survives_a_resume(tmp_path):
    """Text was read with its line ends translated, so that a resumed run's samples.md was another file."""
    written = journal.Journal(tmp_path, [], 0)
    written.sample(3, "one\r\ntwo\rthree")
    written.close()
    content = (tmp_path / "samples.md").read_bytes()
    assert b"\r\ntwo\rthree" in content
    journal.Journal(tmp_path, [], 5).close()
    assert (tmp_path / "samples.md").read_bytes() == content


def test_a_checkpoint_puts_samples_and_events_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(journal.os, "fsync", lambda handle: synced.append(handle))
    monkeypatch.setattr(journal, "fsync", lambda path: synced.append(path.name))

    class Shows:
        def __init__(self, run_dir, start):
            self.flushed = 0

        def log(self, step, metrics):
            pass

        def text(self, step, name, text):
            pass

        def flush(self):
            (tmp_path / "events").write_text("flushed")

        def close(self, summary):
            pass

    written = journal.Journal(tmp_path, [Shows], 0)
    written.row(0, {"x": 1.0})
    written.sample(0, "text")
    written.sync()
    written.close()
    assert {"events", "metrics.jsonl", "samples.md"} <= set(synced)


def test_the_commands_of_the_run_accept_a_sealed_config_as_base(stopped, tmp_path):
    assert run.main(["--base", str(stopped / "config.gin"), "--dry-run", "--runs", str(tmp_path)]) == 0
