"""What the command that generates takes from its user, and what it refuses in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import small_run

from toolkit import evaluate, generate

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    assert small_run(runs, "a", "--stop-at", "4") == 0
    return runs / "a"


def generated(run, *words, stdin=b""):
    """The command in a process of its own; words may be bytes, as a shell passes them."""
    command = [os.fsencode(sys.executable), b"-m", b"toolkit.generate", os.fsencode(run), b"--max-tokens", b"2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    return subprocess.run([*command, *words], cwd=ROOT, env=environment, input=stdin, capture_output=True)


@pytest.mark.parametrize("words, stdin, told", [
    ((b"--prompt", b"caf\xe9"), b"", b"--prompt is not UTF-8: byte 0xe9 at offset 3"),
    ((b"--prompt", b"-"), b"caf\xe9", b"standard input is not UTF-8: byte 0xe9 at offset 3"),
    ((b"--prompt", b"\xed\xa0\x80"), b"", b"--prompt is not UTF-8: byte 0xed at offset 0"),
])  # fmt: skip
def test_a_prompt_that_is_not_utf_8_is_refused_in_one_line(words, stdin, told, trained):
    done = generated(trained, *words, stdin=stdin)
    assert done.returncode == 2 and told in done.stderr and b"Traceback" not in done.stderr


def test_a_prompt_may_be_any_text(trained):
    for words, stdin in (((b"--prompt", "é\U0001f408".encode()), b""), ((b"--prompt", b"-"), "é\r\n".encode())):
        done = generated(trained, *words, stdin=stdin)
        assert done.returncode == 0 and "é".encode() in done.stdout


def test_line_ends_and_a_byte_order_mark_of_standard_input_are_no_part_of_the_prompt(trained):
    plain = generated(trained, b"--prompt", b"Once\nupon")
    piped = generated(trained, b"--prompt", b"-", stdin=b"\xef\xbb\xbfOnce\r\nupon\r\n")
    assert piped.returncode == 0 and piped.stdout == plain.stdout


def test_a_lone_surrogate_in_a_prompt_is_refused():
    with pytest.raises(ValueError, match=r"--prompt is not text: '\\ud800' at character 2 is half of a character"):
        generate.main(["runs/a", "--prompt", "ab\ud800"])


def test_a_run_is_sampled_on_its_own_number_of_threads(trained, tmp_path):
    before = torch.get_num_threads()
    try:
        assert small_run(tmp_path, "a", "--stop-at", "4", bindings=("Experiment.threads = 2",)) == 0
        for command in (["--max-tokens", "1"], None):
            torch.set_num_threads(1)
            assert (
                generate.main([str(tmp_path / "a"), *command]) if command else evaluate.main([str(tmp_path / "a")])
            ) == 0
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("flag", ["--seed", "--num", "--max-tokens", "--top-k"])
@pytest.mark.parametrize("value", ["99999999999999999999", "-1", "x", "1.5", "9" * 5000, ""])
def test_a_number_out_of_range_is_refused_with_the_range(flag, value, capsys):
    with pytest.raises(SystemExit) as ended:
        generate.main(["runs/a", f"{flag}={value}"])
    assert ended.value.code == 2
    assert f"argument {flag}: " in (told := capsys.readouterr().err) and "is not an integer from" in told


@pytest.mark.parametrize("more", [(), ("--top-p", "0.9"), ("--top-k", "5", "--top-p", "0.5")])
def test_a_tiny_temperature_generates(more, trained, capsys):
    texts = []
    for temperature in ("0", "1e-40"):
        assert generate.main([str(trained), "--max-tokens", "4", "--temperature", temperature, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("num", ["1", "2"])
@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_of_a_model_do_not_reach_the_terminal(num, terminal, trained, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert generate.main([str(trained), "--prompt", "a\x1b[31m\tb\nc", "--max-tokens", "1", "--num", num]) == 0
    out = capsys.readouterr().out
    assert ("\\x1b[31m\tb\nc" if terminal else "\x1b[31m\tb\nc") in out and ("\x1b" in out) is not terminal
