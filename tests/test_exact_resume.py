"""A run that was interrupted is the run that never was: for every optimizer, schedule and data source of the shelf.

Interrupted three times and more, always within the process (tests/faults kills it instead): at a step like any other,
at one that evaluates and samples, at the end of an epoch, and before the last step."""

import json
import shutil
from pathlib import Path

import pytest
from runs import arguments, assert_exact, facts, rows

from toolkit import run
from toolkit.registry import CATALOG

ROOT = Path(__file__).parent.parent
TINY = ("GPT.dim = 16", "GPT.n_layer = 1", "GPT.n_head = 2", "Experiment.batch_size = 8", "Experiment.eval_windows = 4")
EPOCHS = ("SyntheticStories.stories = 2",)  # one ends within the 12 steps
DEFAULT_DATA = "Experiment.data = @TinyStories"
STORIES = [f"Story {i}.\nThe ship went out to sea, and {i} sailors sang of the {i % 7} winds." for i in range(40)]


def overlays(kind, but=()):
    """The overlays of a kind, as parameters; all are slow but those named."""
    found = {path.stem: str(path.relative_to(ROOT)) for path in sorted((ROOT / "gin" / kind).glob("*.gin"))}
    return [pytest.param(f, id=name, marks=[pytest.mark.slow][name in but :]) for name, f in found.items()]


def assert_resumes_exactly(tmp_path, **options):
    """One run straight; one in pieces that end at 5, 6, 9, 11 and where the first epoch does. What was saved at 9 is
    then lost, as if the run had been killed since 8. A resume of the finished run does nothing."""
    straight, broken, resume = tmp_path / "straight", tmp_path / "broken", ()
    assert begin(tmp_path, "straight", **options) == 0
    epoch = -(-facts(straight)["windows"]["train"] // 8)
    assert 0 < epoch < 12
    stops = sorted({5, 6, 9, 11, epoch})
    for stop in stops:
        assert begin(tmp_path, "broken", *resume, "--stop-at", str(stop), **options) == 0
        resume = ("--resume",)
        if stop == 9:
            shutil.rmtree(broken / "checkpoints" / "step-00000009")
    assert begin(tmp_path, "broken", *resume, **options) == 0
    assert [resumed["step"] for resumed in facts(broken)["resumed"]] == [8 if stop == 9 else stop for stop in stops]
    assert_exact(straight, broken, 12)
    best = Path("checkpoints", "best", "model.safetensors")
    assert (straight / best).read_bytes() == (broken / best).read_bytes()
    before = content(broken)
    assert begin(tmp_path, "broken", *resume, **options) == 0
    assert content(broken) == before
    judged = [row["val/loss_nats"] for row in rows(straight) if "val/loss_nats" in row]
    assert len(judged) == 3 and len(set(judged)) == 3  # it does train


def begin(runs, name, *more, **options):
    """A small run, in this process."""
    return run.main(arguments(runs, name, *more, **options))


def content(folder):
    """Every file of a run but its lock."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# --- optimizers and schedules


@pytest.mark.parametrize("overlay", overlays("optimizer", but=["muon", "schedule_free"]))
def test_with_every_optimizer(overlay, tmp_path):
    assert_resumes_exactly(tmp_path, overlays=(overlay,), bindings=(*TINY, *EPOCHS))


@pytest.mark.parametrize("overlay", overlays("schedule"))
def test_with_every_schedule(overlay, tmp_path):
    scheduled = "one_cycle" not in overlay
    assert_resumes_exactly(tmp_path, overlays=(overlay,), bindings=(*TINY, *EPOCHS), warmup=scheduled)


def test_with_what_draws_random_numbers_and_takes_micro_batches(tmp_path):
    """The default optimizer and schedule, dropout, and two micro-batches a step."""
    dropout = ("GPT.dropout = 0.2", "Experiment.accumulate = 2")
    assert_resumes_exactly(tmp_path, bindings=(*TINY, *EPOCHS, *dropout))


# --- data


def sources(tmp_path):
    """What each overlay of gin/data, and the default's TinyStories, need here: small texts, on this disk."""
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(STORIES[:34]))
    hub = tmp_path / "roneneldan" / "TinyStories"  # the datasets library prefers a folder of that name to the Hub
    hub.mkdir(parents=True)
    for split, texts in {"train": STORIES[:30], "validation": STORIES[30:]}.items():
        (hub / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = f"TextFiles.paths = ['{tmp_path}/text.txt']"
    return {
        "synthetic_stories": EPOCHS,
        "shakespeare": (path, "Experiment.steps = 12"),
        "text_files": (path,),
        "hub_dataset": (),
        "associative_recall": (
            *("AssociativeRecall.sequences = 30", "AssociativeRecall.pairs = 4"),
            *("RecallAccuracy.length = 32", "RecallAccuracy.pairs = 4"),
        ),
        "copy": ("Copy.sequences = 30", "CopyAccuracy.length = 32"),
        "induction_sequences": ("InductionSequences.sequences = 30", "InductionAccuracy.length = 32"),
        "default": (DEFAULT_DATA,),
    }


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The datasets library without a network, with a cache of its own, in a folder that has both its data and gin/."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    (tmp_path / "gin").symlink_to(ROOT / "gin")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", *(path.stem for path in sorted((ROOT / "gin" / "data").glob("*.gin")))])
def test_with_every_data_source(name, tmp_path, offline):
    used = () if name == "default" else (f"gin/data/{name}.gin",)
    stories = name == "synthetic_stories"
    assert_resumes_exactly(tmp_path, overlays=used, bindings=(*TINY, *sources(tmp_path)[name]), stories=stories)


@pytest.mark.parametrize("kind", ["optimizer", "schedule", "data"])
def test_no_part_of_the_shelf_is_left_out(kind):
    """Each is named by an overlay above, or is what gin/default.gin and gin/model/tiny.gin name."""
    files = [*(ROOT / "gin" / kind).glob("*.gin"), ROOT / "gin" / "default.gin", ROOT / "gin" / "model" / "tiny.gin"]
    text = "".join(path.read_text() for path in files)
    shelf = {e.name for e in CATALOG.values() if e.kind == kind and e.module.startswith("components.")}
    assert shelf and not [name for name in shelf if f"@{name}\n" not in text]
