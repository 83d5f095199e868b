"""The README's first command, as it stands there, and what it promises."""

import json
import re
from pathlib import Path

import pytest
from runs import command, facts, rows

from components.stories import story

ROOT = Path(__file__).parent.parent
WORD = re.compile(r"[a-z']+")


@pytest.mark.slow
def test_the_quick_start_learns_to_tell_stories(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    line = re.search(r"^python -m (toolkit\.run) (gin/quickstart\.gin)$", readme, re.MULTILINE)
    done = command(*line.groups(), "--runs", str(tmp_path), TOOLKIT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "quickstart"
    losses = [row["val/loss_nats"] for row in rows(run) if "val/loss_nats" in row]
    assert losses[-1] < losses[0] / 2
    assert (run / "checkpoints" / "best" / "model.safetensors").is_file()
    assert (run / "curve.png").stat().st_size > 10_000
    assert list(run.glob("events.out.tfevents.*"))
    sample = (run / "samples.md").read_text().rpartition("## step ")[2].partition("\n")[2]
    assert sample.split() and sample.split()[-5:] == done.stdout.partition("curve: ")[0].split()[-5:]
    # one sample ends where the model ends its story, after 40 words or 150: three more leave enough to judge by
    more = command("toolkit.generate", str(run), "--prompt", "Once upon a time", "--num", "3")
    sample += re.sub(r"^--- \d of 3 ---$", "", more.stdout, flags=re.MULTILINE)
    count = facts(run)["config"]["SyntheticStories.stories"]
    told = [WORD.findall(story(0, index).lower()) for index in range(count)]
    words, runs = WORD.findall(sample.lower()), set()
    for text in told:
        runs.update(tuple(text[i : i + 12]) for i in range(len(text) - 11))
    known = set().union(*told)
    assert len(words) >= 80
    assert sum(word in known for word in words) / len(words) >= 0.95
    copied = [" ".join(words[i : i + 12]) for i in range(len(words) - 11) if tuple(words[i : i + 12]) in runs]
    assert not copied
    pairs = ["-p", "MinimalPairs.paths = ['builtin:agreement']"]
    measured = command("toolkit.evaluate", str(run), "gin/evaluator/minimal_pairs.gin", *pairs, "--json")
    assert json.loads(measured.stdout)["eval/MinimalPairs/accuracy"] > 0.85  # 0.977 was measured, chance is 0.5
