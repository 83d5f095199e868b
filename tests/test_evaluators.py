"""Evaluators: what a reader reads, what a run records of them, and that they change nothing in training."""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_gpt
from runs import SMALL, assert_exact, command, facts, rows, small_run, weights

from components.attention import SDPA
from components.evaluator import TextLoss
from components.mixer import GatedLinearRecurrence, SelfAttention
from components.position import T5Bias
from components.tokenizer import Bytes, Symbols
from toolkit import compare, register, run
from toolkit.ablation.plan import read
from toolkit.compose import compose
from toolkit.config.keys import independent_differences
from toolkit.config.layers import ConfigError
from toolkit.context import Context
from toolkit.evaluation import evaluators, itemfile, windows
from toolkit.evaluation.items import read_items, text_of
from toolkit.evaluation.reader import Reader
from toolkit.measures import Score
from toolkit.objective import documents
from toolkit.registry import CATALOG

ROOT = Path(__file__).parent.parent
LONG = 40  # the context of the models here
MODELS = {
    "attention": {},
    "recurrence": {"mixer": GatedLinearRecurrence},
    "hybrid": {"mixer": [SelfAttention, GatedLinearRecurrence]},
    "bias": {"attention": SDPA, "position": T5Bias},
}
TEXTS = ["Once upon a time a hen ran home, and then it ran back again, and slept.", "Hi", "", "The old fox sat down."]
PAIRS = [
    *[("The hen", " ran home"), ("The hen", " slept"), ("The hen ", "z"), ("A fox", " sat"), ("A fox", " sat down")],
    *[("", "Hello"), ("   ", "x"), ("The very old hen of the old mill by the river", " slept"), ("A hen", "")],
]

OWN = '''"""Nats of a greeting."""

from toolkit import register
from toolkit.measures import Score


@register("evaluator")
class Greeting:
    """Nats of a greeting."""

    higher_is_better = False

    def __init__(self, text: str = "Hello there"):
        self.text = text

    def prepare(self):
        if not self.text:
            raise ValueError("Greeting.text is empty; write a greeting")

    def fingerprint(self):
        return self.text

    def evaluate(self, reader):
        nats = reader.nats([self.text])[0].nats
        told = reader.generate([self.text], 4, temperature=1.0)[0]
        items = {f"token {place}": value for place, value in enumerate(nats)}
        return {"nats": Score(nats.sum(), "nats", items), "characters": Score(len(told), "characters")}
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A stranger's evaluator in a file of its own; other tests don't see it."""
    path = tmp_path_factory.mktemp("own") / "greeting.py"
    path.write_text(OWN)
    yield str(path)
    CATALOG.pop("Greeting", None)
    sys.modules.pop("greeting", None)


def reader(batch_tokens: int = 512, apart: bool = False, **slots: object) -> Reader:
    model = tiny_gpt(257, LONG, **slots).eval()
    return Reader(model, Bytes(), LONG, batch_tokens, keep_documents_apart=apart)


def naive(reader: Reader, window: windows.Window) -> list[float]:
    """The nats of a window's targets, each from a pass of its own."""
    nats = []
    for count, target in enumerate(window.targets):
        ids = torch.tensor([[*window.context, *window.targets[:count]]])
        context = Context(*documents(ids, reader.tokenizer.eot)) if reader.keep_documents_apart else None
        with torch.no_grad():
            hidden, head = reader.model(ids, context)
            nats.append(-head.logits(hidden[0, -1]).log_softmax(-1)[target].item())
    return nats


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("slots", MODELS.values(), ids=MODELS)
def test_a_reader_gives_the_nats_of_each_token(slots, apart, parity):
    if apart and "mixer" in slots:
        pytest.skip("these mixers do not keep documents apart")
    read = reader(apart=apart, **slots)
    for text, found in zip(TEXTS, read.nats(TEXTS), strict=True):
        ids = read.tokenizer.encode(text)
        expected = [nats for window in windows.rolling(ids, read.tokenizer.eot, LONG) for nats in naive(read, window)]
        assert found.byte_lengths.sum() == len(text.encode()) and len(found.nats) == len(expected) == len(ids)
        if text:
            parity("Reader.nats", "a pass for each token", torch.tensor(found.nats), torch.tensor(expected).double())


@pytest.mark.parametrize("slots", MODELS.values(), ids=MODELS)
def test_a_reader_gives_the_nats_of_continuations_that_share_a_context(slots, parity):
    read = reader(**slots)
    found = read.continuations(PAIRS)
    expected = [naive(read, windows.continuation(read.tokenizer, *pair, LONG)) for pair in PAIRS]
    assert [each.tokens for each in found] == [len(nats) for nats in expected]
    sums = torch.tensor([sum(nats) for nats in expected]).double()
    parity("Reader.continuations", "a pass for each token", torch.tensor([each.nats for each in found]).double(), sums)
    assert read.continuations(PAIRS[::-1]) == found[::-1]  # to the last bit
    small = reader(batch_tokens=1, **slots).continuations(PAIRS)
    assert np.allclose([each.nats for each in small], [each.nats for each in found], rtol=1e-5)
    assert [each.is_greedy for each in small] == [each.is_greedy for each in found]


def test_text_without_bytes_has_no_bits_per_byte(tmp_path):
    """Words are unknown to Symbols, and the unknown id stands for 0 bytes; numbers have bytes."""
    tokenizer = Symbols(10)
    reader = Reader(tiny_gpt(vocab_size=tokenizer.vocab_size, max_len=16).eval(), tokenizer, 16, 64)
    (tmp_path / "words.txt").write_text("once upon a time")
    (tmp_path / "numbers.txt").write_text("3 4 5")
    names = {}
    for file in ("words.txt", "numbers.txt"):
        evaluator = TextLoss([str(tmp_path / file)])
        evaluator.prepare()
        scores = evaluator.evaluate(reader)
        names[file] = sorted(scores)
        assert all(math.isfinite(score.value) for score in scores.values())
    assert names == {"words.txt": ["loss_nats"], "numbers.txt": ["bits_per_byte", "loss_nats"]}


def test_a_likeliest_continuation_is_known_as_such():
    read = reader()
    for length in (1, 5):
        likeliest = read.generate(["The hen"], length)[0]
        other = likeliest[:-1] + chr(ord("a") + (likeliest[-1:] == "a"))
        if likeliest.isascii():
            found = read.continuations([("The hen", likeliest), ("The hen", other)])
            assert [each.is_greedy for each in found] == [True, False]


def test_a_continuation_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"has 41 tokens.*Experiment.seq_len.*40"):
        windows.continuation(Bytes(), "The hen", "x" * 41, LONG)
    assert windows.continuation(Bytes(), "y" * 99, "x" * 40, LONG) == ((ord("y"),), (ord("x"),) * 40)
    assert windows.continuation(Bytes(), "y" * 99, "", LONG) == ((ord("y"),) * 40, ())


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17, 30])
def test_rolling_windows_predict_each_token_once_with_as_much_context_as_fits(count):
    found = list(windows.rolling(list(range(count)), 99, 8))
    assert [token for window in found for token in window.targets] == list(range(count))
    for place, (context, targets) in enumerate(found):
        assert len(context) + len(targets) - 1 <= 8
        assert [*context, *targets][1:] == list(range(targets[-1] + 1))[-(len(context) + len(targets) - 1) :]
        assert len(targets) == 8 or place == len(found) - 1
    if count > 8:
        assert len(found[-1].context) + len(found[-1].targets) == 9


def test_generation_stops_and_depends_on_the_prompt_alone():
    read = reader()
    texts = read.generate(["a", "b", "a"], 12, temperature=1.0)
    assert texts[0] == texts[2] != texts[1] and read.generate(["b"], 12, temperature=1.0) == [texts[1]]
    mark = texts[0][3]
    assert read.generate(["a"], 12, stop=[mark], temperature=1.0) == [texts[0][: texts[0].index(mark)]]


# --- items


def test_items_are_named_by_content_and_wrong_ones_by_file_and_line(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.json"
    first.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "one"}\n')
    second.write_text('[\n{"text": "three"},\n{"text": 4}\n]')
    items = read_items("Own.paths", [str(first)], ["text"])
    assert [item.row["text"] for item in items] == ["one", "two", "one"] and items[2].id == items[0].id + "#2"
    first.write_text('{"text": "two"}\n{"text": "one"}\n{"text": "one"}\n')
    assert {item.id for item in read_items("Own.paths", [str(first)], ["text"])} == {item.id for item in items}
    *_, wrong = read_items("Own.paths", [str(tmp_path / "*.json")], ["text"])
    with pytest.raises(ValueError, match=r"b.json:3: 'text' must be text, not 4"):
        text_of(wrong, "text")
    for content, told in {
        '{"text": "one"}\n{"test": "two"}\n': r"a.jsonl:2: the item lacks 'text'; it has 'test'",
        '{"text": "one"}\n["two"]\n': r"a.jsonl:2: an item must be a JSON object with 'text'",
        '{"text": "one"}\n{"text": "two"\n': r"a.jsonl:[23]: not valid JSON",
        "": "the files have no items",
    }.items():
        first.write_text(content)
        with pytest.raises(ValueError, match=told):
            read_items("Own.paths", [str(first)], ["text"])
    with pytest.raises(ValueError, match="Own.paths: no file matches 'nowhere.jsonl'"):
        read_items("Own.paths", ["nowhere.jsonl"], ["text"])


# --- runs


def with_own(own: str, *bindings: str) -> dict:
    return {"bindings": ("Experiment.evaluators = [@Greeting, @near/Greeting]", "near/Greeting.text = 'Hi'", *bindings)}


def test_evaluators_change_nothing_in_training(own, tmp_path):
    assert small_run(tmp_path, "without") == 0
    assert small_run(tmp_path, "with", "--import", own, **with_own(own)) == 0
    plain = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows(tmp_path / "with")]
    assert plain == rows(tmp_path / "without")
    ours, theirs = weights(tmp_path / "with", 12), weights(tmp_path / "without", 12)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    measured = [row for row in rows(tmp_path / "with") if "eval/Greeting/nats" in row]
    assert [row["step"] for row in measured] == [0, 6, 12] and measured[0] != measured[1]
    assert {name for name in measured[0] if "near" in name} == {
        "eval/near-Greeting/nats",
        "eval/near-Greeting/characters",
    }
    items = itemfile.read(tmp_path / "with" / "evaluations" / "near-Greeting" / "step-00000012.jsonl")
    assert sum(item["nats"] for item in items.values()) == pytest.approx(measured[-1]["eval/near-Greeting/nats"])
    assert len(items) == 2 and facts(tmp_path / "with")["evaluators"] == {
        "Greeting": "Hello there",
        "near-Greeting": "Hi",
    }


@pytest.mark.parametrize("way", ["an import in the overlay", "--import", "an installed package"])
def test_a_stranger_brings_an_evaluator_in_each_way(way, tmp_path):
    (tmp_path / "greeting.py").write_text(OWN)
    flags = [flag for binding in SMALL for flag in ("-p", binding)]
    overlay, more = "Experiment.evaluators = [@Greeting]\n", []
    if way == "an import in the overlay":
        overlay = "import greeting\n" + overlay
    elif way == "--import":
        more = ["--import", "greeting.py"]
    else:  # what pip leaves of an installed package
        site = tmp_path / "greeting-1.0.dist-info"
        site.mkdir()
        (site / "METADATA").write_text("Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
        (site / "entry_points.txt").write_text("[toolkit.components]\ngreeting = greeting\n")
    (tmp_path / "overlay.gin").write_text(overlay)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    train = [sys.executable, "-m", "toolkit.run", "gin/model/tiny.gin", "overlay.gin", *more, *flags, "--name", "a"]
    subprocess.run(train, cwd=tmp_path, env=env, check=True, capture_output=True)
    assert [row["step"] for row in rows(tmp_path / "runs" / "a") if "eval/Greeting/nats" in row] == [0, 6, 12]
    evaluate = [sys.executable, "-m", "toolkit.evaluate", "runs/a", "--json"]
    told = subprocess.run(evaluate, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout
    assert "eval/Greeting/nats" in json.loads(told)


def test_no_evaluator_of_the_shelf_changes_training(tmp_path):
    """With dropout, so that a random draw or a wrong mode would show."""
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "The hen runs.", "sentence_bad": "The hen run."}\n')
    (tmp_path / "choices.jsonl").write_text('{"context": "The hen", "choices": ["runs.", "run."], "answer": 0}\n')
    (tmp_path / "words.jsonl").write_text('{"text": "The old hen ran home."}\n')
    (tmp_path / "text.txt").write_text("The old hen ran home, and slept.\n")
    shelf = ("components.evaluator", "components.sequences")
    names = [entry.name for entry in CATALOG.values() if entry.kind == "evaluator" and entry.module in shelf]
    files = {"MinimalPairs": "pairs", "MultipleChoice": "choices", "LastWord": "words"}
    bindings = [f"{name}.paths = ['{tmp_path / file}.jsonl']" for name, file in files.items()]
    bindings += [f"{name}.paths = ['{tmp_path}/text.txt']" for name in ("TextLoss", "PositionLoss")]
    bindings += ["Induction.length = 8", "Completion.prompts = ['The']", "Completion.pattern = 'hen'"]
    bindings += ["RecallAccuracy.length = 32", "CopyAccuracy.length = 32", "InductionAccuracy.length = 32"]
    bindings += ["Completion.temperature = 1.0", "Completion.max_tokens = 6"]
    bindings += [f"Experiment.evaluators = [{', '.join(f'@{name}' for name in names)}]"]
    assert small_run(tmp_path, "without", bindings=("GPT.dropout = 0.1",)) == 0
    assert small_run(tmp_path, "with", bindings=("GPT.dropout = 0.1", *bindings)) == 0
    plain = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows(tmp_path / "with")]
    assert plain == rows(tmp_path / "without")
    ours, theirs = weights(tmp_path / "with", 12), weights(tmp_path / "without", 12)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    measured = {name.split("/")[1] for row in rows(tmp_path / "with") for name in row if name.startswith("eval/")}
    assert measured == set(names) and len(names) >= 7


def test_final_evaluators_measure_once(own, tmp_path):
    bindings = ("Experiment.final_evaluators = [@Greeting]",)
    assert small_run(tmp_path, "a", "--import", own, bindings=bindings) == 0
    assert [row["step"] for row in rows(tmp_path / "a") if "eval/Greeting/nats" in row] == [12]


def test_a_disk_that_refuses_items_does_not_end_a_run(own, tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(itemfile, "write_bytes", refuse)
    assert small_run(tmp_path, "a", "--import", own, bindings=("Experiment.evaluators = [@Greeting]",)) == 0
    assert [row["step"] for row in rows(tmp_path / "a") if "eval/Greeting/nats" in row] == [0, 6, 12]
    assert sum("items measured at step" in message for message in caplog.messages) == 3


def test_items_are_not_written_through_a_link(own, tmp_path):
    assert small_run(tmp_path, "a", "--import", own, bindings=("Experiment.evaluators = [@Greeting]",)) == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "Greeting").symlink_to(tmp_path / "elsewhere")
    done = command("toolkit.evaluate", str(tmp_path / "a"), "--items", str(tmp_path / "items"))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "link" in done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_resumed_run_measures_alike(own, tmp_path):
    given = with_own(own)
    assert small_run(tmp_path, "straight", "--import", own, **given) == 0
    assert small_run(tmp_path, "broken", "--import", own, "--stop-at", "8", **given) == 0
    stale = itemfile.path(tmp_path / "broken" / "evaluations", "Greeting", 11)
    stale.write_text("an earlier attempt")
    assert run.main(["--runs", str(tmp_path), "--name", "broken", "--resume"]) == 0
    assert_exact(tmp_path / "straight", tmp_path / "broken", 12)
    folders = [tmp_path / name / "evaluations" for name in ("straight", "broken")]
    ours, theirs = ({str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*.jsonl")} for f in folders)
    assert ours == theirs and len(ours) == 6


def test_a_run_without_the_slots_goes_on(own, tmp_path):
    """Its config is of a version without evaluators."""
    assert small_run(tmp_path, "old", "--stop-at", "8") == 0
    config = tmp_path / "old" / "config.gin"
    lines = config.read_text().splitlines(keepends=True)
    old = "".join(line for line in lines if "evaluators" not in line and not line.startswith("# seal"))
    old = "".join(line for line in old.splitlines(keepends=True) if "sha256" not in line.lower())
    (tmp_path / "old.gin").write_text(old)
    base = ["--base", str(tmp_path / "old.gin"), "--runs", str(tmp_path), "--name", "old", "--resume"]
    assert run.main(base) == 0
    bindings = ["-p", "Experiment.evaluators = [@Greeting]", "--import", own]
    assert run.main([*base[:-1], "--from", str(tmp_path / "old"), *bindings, "--name", "new", "--weights-only"]) == 0
    assert "eval/Greeting/nats" in rows(tmp_path / "new")[0]


def test_the_command_measures_a_run_that_exists(own, tmp_path, capsys):
    assert small_run(tmp_path, "a", "--import", own, bindings=("Experiment.evaluators = [@Greeting]",)) == 0
    last = [row for row in rows(tmp_path / "a") if "eval/Greeting/nats" in row][-1]
    told = command("toolkit.evaluate", str(tmp_path / "a" / "checkpoints" / "step-00000012"), "--json")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["eval/Greeting/nats"] == pytest.approx(last["eval/Greeting/nats"], rel=1e-6)
    more = ["-p", "Experiment.final_evaluators = [@near/Greeting]", "-p", "near/Greeting.text = 'Hi'"]
    told = command("toolkit.evaluate", str(tmp_path / "a"), *more, "--items", str(tmp_path / "items"))
    assert "eval/near-Greeting/nats" in told.stdout and "nats over 2 items" in told.stdout
    assert len(list((tmp_path / "items").rglob("*.jsonl"))) == 2


WRONG = {
    "Experiment.evaluators = [@Greeting, @Greeting]": "has Greeting twice.*@second/Greeting",
    "Experiment.evaluators = [@CSV]": "@CSV is of kind logger; parts of kind evaluator are",
    "Experiment.final_evaluators = @Greeting": r"it takes a list: write \[@Greeting\]",
    "Experiment.final_evaluators = [@Induction]|Induction.length = 500": "Induction reads 1000 tokens at a time, but",
    "Experiment.evaluators = [@CopyAccuracy]|CopyAccuracy.length = 500": "CopyAccuracy reads 500 tokens at a time, but",
    "Experiment.evaluators = [@Greeting]|Greeting.text = ''": "Greeting.text is empty; write a greeting",
}


@pytest.mark.parametrize("bindings", WRONG)
def test_wrong_evaluators_are_refused_before_anything_is_encoded(bindings, own, tmp_path):
    with pytest.raises(ValueError, match=WRONG[bindings]):
        small_run(tmp_path, "a", "--import", own, bindings=tuple(bindings.split("|")))
    assert not (tmp_path / "a" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "scores, told",
    [
        (0.5, r"must return \{metric: Score\}"),
        ({"a": 0.5}, r"must return \{metric: Score\}"),
        ({"a b": Score(1.0, "nats")}, "'a b' is not the name of a metric"),
        ({"a": Score("1", "nats")}, "the value of a must be a number, not '1'"),
        ({"a": Score(1.0, "nats", {"x": float("inf")})}, "an item of a is infinite"),
    ],
)
def test_scores_of_another_form_are_refused(scores, told):
    class Wrong:
        def evaluate(self, reader):
            return scores

    with pytest.raises(ValueError, match=told):
        evaluators.measure({"Wrong": Wrong()}, reader())


def test_a_run_of_a_version_without_evaluators_can_be_compared():
    old = {"Experiment.steps": 9}
    assert independent_differences(old, old | {"Experiment.evaluators": []}) == {}
    assert independent_differences(old, old | {"Experiment.evaluators": ["@Greeting"]}) != {}


def test_a_comparison_reports_other_items(own, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed, text in (("a", 0, "Hi"), ("b", 1, "Hi"), ("c", 2, "Ho")):
        bindings = (f"Experiment.seed = {seed}", "Experiment.evaluators = [@Greeting]", f"Greeting.text = '{text}'")
        assert small_run(tmp_path, name, "--import", own, bindings=bindings) == 0
    capsys.readouterr()
    compare.main([f"one={tmp_path}/a", f"two={tmp_path}/b", "--baseline", "one"])
    assert "evaluator Greeting" not in capsys.readouterr().out
    compare.main([f"one={tmp_path}/a", f"two={tmp_path}/c", "--baseline", "one"])
    assert "evaluator Greeting" in capsys.readouterr().out


PLAN = """Ablation.question = 'Which norm?'
Ablation.effect = 0.1
Ablation.steps = 5
Ablation.metric = {metric!r}
Ablation.higher_is_better = False
Ablation.common = ['gin/model/tiny.gin', 'Experiment.final_evaluators = [@Induction]', 'Induction.length = {length}']
Ablation.arms = {{'layernorm': [], 'rmsnorm': ['gin/norm/rmsnorm.gin']}}
"""


@pytest.mark.parametrize(
    "metric, length, told",
    [
        ("eval/Inductoin/nats", 8, r"plan.gin:4: .*no evaluator is called 'Inductoin'; did you mean 'Induction'\?"),
        ("val_full/los_nats", 8, r"plan.gin:4: .*is not measured; did you mean 'val_full/loss_nats'\?"),
        ("eval/Induction/nats", 0, "Induction.length = 0"),
        ("eval/Induction/nats", 8, None),
    ],
)
def test_a_plan_is_refused_for_a_metric_that_nothing_measures(metric, length, told, tmp_path):
    text = PLAN.format(metric=metric, length=length).replace("Ablation.higher_is_better = False\n", "")
    (tmp_path / "plan.gin").write_text(text)
    with contextlib.nullcontext() if told is None else pytest.raises(ConfigError, match=told):
        assert read(tmp_path / "plan.gin").ablation.metric == metric


@pytest.mark.parametrize(
    "metric, told",
    [
        ("probe/LogitScal/rms", r"plan.gin:4: .*no probe is called 'LogitScal'; did you mean 'LogitScale'\?; add it"),
        ("probe/LogitScale", "plan.gin:4: .*'probe/LogitScale' names no statistic; write probe/NAME/STATISTIC"),
        ("probe/LogitScale/rms", None),
        ("probe/LogitScale/rsm", r"plan.gin:4: .*LogitScale has no number 'rsm'; did you mean 'rms'\?"),
        ("probe/LogitScale/rms/blocks.0", "plan.gin:4: .*for no module; write probe/LogitScale/rms"),
        ("probe/Activations/rms", r"plan.gin:4: .*name one, as in probe/Activations/rms/blocks\.0"),
        ("probe/Activations/rms/blocks.0.fnn", r"no module or parameter 'blocks.0.fnn'; did you mean 'blocks.0.ffn'\?"),
        ("probe/Activations/rms/blocks.0.ffn", None),
        ("probe/Updates/update_ratio/blocks.0.ffn.out.weight", "no module or parameter 'blocks.0.ffn.out.weight'"),
        ("probe/Updates/update_ratio/embed.weight", None),
        ("probe/AttentionEntropy/head_entropy_nats/blocks.0", "has no number 'head_entropy_nats'"),  # an array
    ],
)
def test_a_plan_is_refused_for_a_metric_of_a_probe_that_no_arm_has(metric, told, tmp_path):
    text = PLAN.format(metric=metric, length=8).replace("tiny.gin'", "tiny.gin', 'gin/probe/all.gin'")
    (tmp_path / "plan.gin").write_text(text)
    with contextlib.nullcontext() if told is None else pytest.raises(ConfigError, match=told):
        assert read(tmp_path / "plan.gin").ablation.metric == metric


def test_a_plan_takes_the_direction_of_its_evaluator(tmp_path):
    plan = tmp_path / "plan.gin"
    text = PLAN.format(metric="eval/Completion/match", length=8).replace("[@Induction]", "[@Completion]")
    text = text.replace("'Induction.length = 8'", "'Completion.prompts = [\\'The\\']', 'Completion.pattern = \\'a\\''")
    plan.write_text(text.replace("Ablation.higher_is_better = False\n", ""))
    assert read(plan).ablation.higher_is_better is True
    plan.write_text(text)
    with pytest.raises(ConfigError, match="plan.gin:5: .*Completion says higher_is_better = True; leave it out"):
        read(plan)


TURNED = """Ablation.question = 'Which way?'
Ablation.effect = 0.1
Ablation.steps = 5
Ablation.metric = 'eval/Turned/points'
Ablation.common = ['gin/model/tiny.gin', 'Experiment.final_evaluators = [@Turned]']
Ablation.arms = {'a': [], 'b': ['GPT.position = @NoPE', 'Turned.up = %s']}
"""


def test_arms_whose_evaluator_turns_its_direction_are_refused(tmp_path):
    @register("evaluator")
    class Turned:
        """Points, of which more are better, or fewer."""

        def __init__(self, up: bool = True):
            self.higher_is_better = up

        def prepare(self):
            pass

        def fingerprint(self):
            return "turned"

        def evaluate(self, reader):
            return {"points": Score(1.0, "points")}

    plan = tmp_path / "plan.gin"
    try:
        plan.write_text(TURNED % "False")
        with pytest.raises(
            ConfigError, match="plan.gin:4: .*higher is better in a, and that lower is better in b; use"
        ):
            read(plan)
        plan.write_text(TURNED.replace(", 'Turned.up = %s'", ""))
        assert read(plan).ablation.higher_is_better is True
    finally:
        CATALOG.pop("Turned")


def test_a_metric_can_have_another_direction_than_its_evaluator():
    class Two:
        higher_is_better = True
        lower_is_better = ("task/perplexity",)

    assert evaluators.is_higher_better(Two(), "task/acc") and not evaluators.is_higher_better(Two(), "task/perplexity")
    Two.higher_is_better = False
    assert not evaluators.is_higher_better(Two(), "task/acc")


def test_the_config_of_a_run_names_its_evaluators(own):
    config, _ = compose(["gin/model/tiny.gin"], with_own(own)["bindings"], imports=[own])
    assert config.names("evaluators") == ["Greeting", "near-Greeting"] and config.names("final_evaluators") == []
    assert config.flat["Experiment.evaluators"] == ["@Greeting", "@near/Greeting"]
