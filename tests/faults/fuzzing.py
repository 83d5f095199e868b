"""Commands that are fed damaged or random files, many of them: each in a process forked from one that has everything
imported, with its exit code and its output as a person would get them."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from plans import write_plan
from runs import small_run

from faults.world import ROOT, _forkserver
from toolkit import ablate
from toolkit.command import run_command
from toolkit.store import seal

LATER = (  # what commands import on their way, imported once instead
    *(f"toolkit.{name}" for name in ("generate", "evaluate", "run", "compare", "ablate", "components", "prepare")),
    *(f"toolkit.comparison.{name}" for name in ("assemble", "board", "figures", "markdown", "page", "record", "runs")),
    *(
        "toolkit.comparison.screen",
        "toolkit.loop.sampling",
        "toolkit.objective",
        "toolkit.ablation.jobs",
        "torch.utils.tensorboard",
    ),
    *("matplotlib.backends.backend_agg", "scipy.stats", "tokenizers", "datasets", "torch._dynamo"),
)
CODES = (0, 1, 2, 3, 4, 75)  # of the contract; 1 is compare --strict's, ablate's and components check's alone
SECONDS = 120  # a command that takes longer hangs
PART = '''"""A norm of one's own."""

from torch import nn

from toolkit.registry import register


@register("norm")
class FuzzedNorm(nn.LayerNorm):
    """LayerNorm by another name."""

    def __init__(self, dim: int):
        super().__init__(dim)
'''


@dataclass
class Case:
    """One trial: commands over files in ``folder``. ``changed`` is the file that was harmed, and ``how``."""

    seed: int
    folder: Path
    changed: Path
    how: str
    commands: list[list[str]]
    codes: list[int] = field(default_factory=list)
    said: str = ""

    def __str__(self):
        lines = "\n".join(" ".join(map(repr, words)) for words in self.commands)
        return f"seed {self.seed}: {self.changed}: {self.how}\n{lines}\nexit codes {self.codes}\n{self.said[-3000:]}"


def prepare(folder: Path) -> Path:
    """What is harmed: a finished run "a" and a stopped run "b" with a part and a tokenizer of their own, a plan's
    folder whose two jobs are done, and a corpus. Made once; read, never written to. In a process of its own, which
    the part of the two runs is left in."""
    making = _forkserver().Process(target=_prepare, args=(folder,))
    making.start()
    making.join()
    assert making.exitcode == 0
    return folder


def _prepare(folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(ROOT)
    part = folder / "fuzzed_norm.py"
    part.write_text(PART)
    own = ("GPT.norm = @FuzzedNorm", "Experiment.tokenizer = @BPE", "BPE.vocab_size = 300")
    for name, more in (("a", ()), ("b", ("--stop-at", "8"))):
        assert small_run(folder / "runs", name, "--import", str(part), *more, bindings=own) == 0
    plan = write_plan(folder)
    assert ablate.main([str(plan), "--runs", str(folder / "plans")]) == 0
    (folder / "text").mkdir()
    stories = [f"Story {i}: once there was a cat that had {i} hats and a long way to go." for i in range(80)]
    (folder / "text" / "a.txt").write_text("<|endoftext|>".join(stories))
    (folder / "text" / "b.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))


def harm(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A bit flipped, an end cut off, or a block of zeros."""
    if not content:
        return b"\x00", "a byte appended"
    place = draw.randrange(len(content))
    kind = draw.choice(("flip", "cut", "zeros"))
    if kind == "flip":
        bit = 1 << draw.randrange(8)
        return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :], f"bit {bit} of byte {place}"
    if kind == "cut":
        return content[:place], f"cut to {place} bytes"
    length = min(draw.choice((1, 16, 512, 4096)), len(content) - place)
    return content[:place] + bytes(length) + content[place + length :], f"{length} zeros at {place}"


def distort(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Anything that a text editor, a script, a disk or a joker could make of a file."""
    lines = content.splitlines(keepends=True) or [b""]
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    odd = draw.choice(ODD)
    place = draw.randrange(len(content) + 1)
    deeds: dict[str, Callable[[], bytes]] = {
        "random bytes": lambda: draw.randbytes(draw.choice((0, 1, 10, 1000))),
        "a line twice": lambda: b"".join([*lines[:at], lines[at], *lines[at:]]),
        "a line gone": lambda: b"".join(lines[:at] + lines[at + 1 :]),
        "lines swapped": lambda: b"".join(
            lines[other] if i == at else lines[at] if i == other else line for i, line in enumerate(lines)
        ),
        f"{odd[:20]!r} inserted": lambda: content[:place] + odd + content[place:],
        f"{odd[:20]!r} for a line": lambda: b"".join([*lines[:at], odd + b"\n", *lines[at + 1 :]]),
        "a byte order mark": lambda: b"\xef\xbb\xbf" + content,
        "CRLF": lambda: content.replace(b"\n", b"\r\n"),
        "UTF-16": lambda: content.decode("utf-8", "replace").encode("utf-16"),
    }
    how = draw.choice(list(deeds))
    return harm(content, draw) if draw.random() < 0.3 else (deeds[how](), how)


ODD = (
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"9" * 5000, b"1e999", b"-1", b"NaN", b"[" * 3000, b"{" * 3000,
    b"'",
    b'"', b"(", b"=", b"@", b"%", b"@X/Y()", b"%x", b"include 'x.gin'", b"import os.path", b"import no_such_module",
    b"GPT.dim = 10 ** 9", b"GPT.n_layer = 0", b"GPT.dim = 99999999999999999999999", b"Experiment.seed = -1",
    b"Experiment.steps = 1e9", b"x = %x", b"a/b/GPT.dim = 8", b"GPT.norm = [@RMSNorm, @GPT]", b"GPT.norm = []",
    b"GPT.attention = None", b"Experiment.loggers = []", b"Experiment.seq_len = 999999", b"GPT.dim = True",
    b"Experiment.sample_prompt = '\\ud800'", b"AdamW.betas = (0.9,)", b"AdamW.lr = float('nan')", b"\x1b[31m",
    b"<b>", b"\r",
)  # fmt: skip


def distort_json(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A value of a JSON file, or a key of it, in another type or gone, and sealed again as a forger would."""
    try:
        value = json.loads(content)
    except ValueError:
        return distort(content, draw)
    places: list[tuple[dict | list, object]] = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(value if isinstance(value, dict | list) else [value])
    if not places:
        return b"[]", "an empty list"
    node, key = draw.choice(places)
    odd = draw.choice(
        [None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "../x", "<b>", "\ud800", [], {}, [[]]]
    )
    how = f"{key!r} is {odd!r}"
    if draw.random() < 0.25 and isinstance(node, dict):
        del node[key]
        how = f"{key!r} is gone"
    else:
        node[key] = odd
    if isinstance(value, dict) and seal.KEY in value:
        value = seal.seal(value)
    return json.dumps(value).encode(), how


def run_all(cases: list[Case], root: Path) -> None:
    """Run the commands of each case in its turn, two cases at once, and fill in codes and output."""
    logs = [root / f"case-{case.seed}" for case in cases]
    context, waiting = _forkserver(), list(zip(cases, logs, strict=True))
    halves = [context.Process(target=_batch, args=([(c.commands, log) for c, log in waiting[i::2]],)) for i in (0, 1)]
    for half in halves:
        half.start()
    for half in halves:
        half.join()
        assert half.exitcode == 0
    for case, log in waiting:
        case.codes = json.loads(log.with_suffix(".codes").read_text())
        case.said = log.read_text(errors="replace")


def _batch(work: list[tuple[list[list[str]], Path]]) -> None:
    torch.set_num_threads(1)
    os.chdir(ROOT)
    for module in LATER:
        importlib.import_module(module)
    for commands, log in work:
        codes = [_forked(words, log) for words in commands]
        log.with_suffix(".codes").write_text(json.dumps(codes))


def _forked(words: list[str], log: Path) -> int:
    """A command in a fork of this process. Its exit code, minus the signal that ended it; -14 for one that hangs."""
    pid = os.fork()
    if pid == 0:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 70
        try:
            resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
            signal.alarm(SECONDS)
            module = importlib.import_module(words[0])
            try:
                run_command(partial(module.main, words[1:]))
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def copied(root: Path, seed: int, *parts: str) -> Path:
    """A copy of parts of what ``prepare`` made, for one case."""
    folder = root.parent / f"case-{seed}"
    for part in parts:
        shutil.copytree(root / part, folder / part, symlinks=True)
    return folder


def files(folder: Path) -> list[Path]:
    """Every file below a folder, but for locks, which hold nothing."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files(folder)}
