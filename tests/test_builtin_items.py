"""The built-in items of evaluators: the files are those that their function makes, no model is trained on them, and
they are balanced. Every overlay runs with them."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

import harness_peer
import pytest
from runs import small_run

from components.evaluator import MinimalPairs, MultipleChoice, TextLoss
from components.stories import GIRLS, NODES, story
from experiments.story_items import make
from toolkit.compose import compose
from toolkit.conformance import bench_of, run_checks
from toolkit.evaluation import builtin, evaluators

ROOT = Path(__file__).parent.parent
HELPERS = set(NODES["helpword"])
OVERLAYS = sorted(path.stem for path in (ROOT / "gin" / "evaluator").glob("*.gin"))


def rows(name):
    return [json.loads(line) for line in (builtin.FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def texts(name):
    """The right texts of a set, as a model reads them."""
    fields = ("sentence_good", "text", "prompt")
    return [next(row[field] for field in fields if field in row) for row in rows(name)]


@pytest.mark.parametrize("name", make.SETS)
def test_the_files_are_those_that_the_function_makes(name):
    assert (builtin.FOLDER / f"{name}.jsonl").read_bytes() == make.content(name)


def test_there_are_no_other_files_and_they_are_small():
    files = list(builtin.FOLDER.iterdir())
    assert {path.name for path in files} == {f"{name}.jsonl" for name in make.SETS}
    assert sum(path.stat().st_size for path in files) < 450_000
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    pattern = config["options.package_data"]["toolkit.evaluation"]
    assert set((ROOT / "toolkit" / "evaluation").glob(pattern)) == set(files)


def test_no_item_is_in_the_stories_of_a_small_config():
    stories = compose(["gin/model/tiny.gin"])[0].flat["SyntheticStories.stories"]
    trained_on = "\n".join(" ".join(story(0, index).split()) for index in range(stories + 50))
    assert stories == 1000
    for name in set(make.SETS) - {"openings"}:  # many stories begin alike
        assert [text for text in texts(name) if " ".join(text.split()) in trained_on] == [], name


def test_no_run_can_train_on_the_stories_of_the_items(tmp_path):
    with pytest.raises(ValueError, match=r"SyntheticStories.corpus_seed = -1"):
        small_run(tmp_path, "a", bindings=(f"SyntheticStories.corpus_seed = {make.SEED}",))


def changed(row):
    """The words in which the sentences of a pair differ."""
    good, bad = (re.findall(r"\w+", row[field]) for field in ("sentence_good", "sentence_bad"))
    return [(one, other) for one, other in zip(good, bad, strict=True) if one != other]


@pytest.mark.parametrize("name", ["agreement", "attractors"])
def test_agreement_is_right_as_often_for_was_as_for_were(name):
    assert Counter(word for row in rows(name) for word in changed(row)) == {("was", "were"): 150, ("were", "was"): 150}


def test_the_noun_before_the_verb_tells_nothing_of_its_number():
    counts = Counter()
    for row in rows("attractors"):
        before, verb, _ = re.split(r" (was|were) ", row["sentence_good"])
        subject, nearest = before.split()[2], before.split()[-1]
        assert (subject in HELPERS) == (verb == "was"), row
        counts[verb, nearest in ("trees", "rows")] += 1
    assert counts == dict.fromkeys([(verb, plural) for verb in ("was", "were") for plural in (True, False)], 75)


def test_pronouns_are_right_as_often_for_girls_as_for_boys():
    counts = Counter()
    for row in rows("pronouns"):
        (name,) = {word for word in re.findall(r"\w+", row["sentence_good"]) if word in make.PEOPLE}
        good = {one.lower() for one, _ in changed(row)}
        assert good <= ({"she", "her"} if name in GIRLS else {"he", "his", "him"}), row
        counts[name in GIRLS] += 1
    assert counts == {True: 130, False: 130}


def test_passages_say_the_right_answer_and_no_other():
    counts, answers = Counter(), Counter()
    for row in rows("coherence"):
        words, right = re.findall(r"\w+", row["context"]), row["choices"][row["answer"]]
        said = [choice for choice in row["choices"] if choice in words]
        assert right in said and len(said) == (2 if row["fact"] == "who" else 1), row
        assert row["text"] == f"{row['context']} {right}" and len(set(row["choices"])) == 4
        counts[row["fact"]] += 1
        answers[row["answer"]] += 1
    assert set(counts.values()) == {50} and len(counts) == 5 and max(answers.values()) - min(answers.values()) == 1
    assert {row["choices"][row["answer"]] for row in rows("coherence") if row["fact"] == "colour"} <= {
        hue for hue in NODES["hue"] if isinstance(hue, str)
    }


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "lm_eval"])
def test_an_overlay_needs_no_file_of_the_user(overlay, tmp_path, monkeypatch):
    config, _ = compose(["gin/model/tiny.gin", f"gin/evaluator/{overlay}.gin"])
    monkeypatch.chdir(tmp_path)
    experiment = config.build()
    (evaluator,) = evaluators.of(config, experiment).values()
    evaluator.prepare()
    assert evaluator.fingerprint()


def test_metrics_are_named_after_the_sets():
    pairs = MinimalPairs(["builtin:agreement", "builtin:pronouns"])
    pairs.prepare()
    assert {item.id.partition("/")[0] for item in pairs.items} == {"agreement", "pronouns"}


@pytest.mark.parametrize("part", [MinimalPairs, TextLoss, MultipleChoice])
def test_a_set_that_does_not_exist_is_refused_with_the_names(part):
    told = (
        f"{part.__name__}.paths: no built-in set is called 'corehence'; did you mean 'coherence'?; the sets are "
        "agreement, attractors, coherence, openings, pronouns, stories"
    )
    with pytest.raises(ValueError, match=re.escape(told)):
        part(["builtin:corehence"]).prepare()


def test_components_check_reads_the_sets():
    bench = bench_of("MinimalPairs", ["MinimalPairs.paths = ['builtin:agreement']"])
    (line,) = run_checks(bench, only="a broken item is refused by file:line")
    assert line.verdict == "pass"


LOCAL = {
    "task": "own",
    "dataset_path": "json",
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.mark.slow
def test_an_installed_toolkit_has_the_items_and_the_extra_eval(tmp_path):
    """In an environment of its own: the package, built and installed without its dependencies, and lm-eval with its
    class for transformers. What the toolkit needs besides comes from this environment."""
    source, env, work = tmp_path / "source", tmp_path / "env", tmp_path / "work"
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ignored = shutil.ignore_patterns(".git", "runs", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    python = str(env / "bin" / "python")
    (site,) = (env / "lib").glob("*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "ours.pth").write_text("\n".join(ours) + "\n")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--prefix", str(env)]
    built = subprocess.run([sys.executable, "-m", "pip", "install", "-q", *offline, str(source)], capture_output=True)
    assert built.returncode == 0, built.stderr.decode()
    extra = [python, "-m", "pip", "install", "-q", "--retries", "1", "--timeout", "20", "lm-eval[hf]>=0.4.13"]
    extra = subprocess.run(extra, env=alone, capture_output=True, text=True)
    if extra.returncode:
        pytest.skip(f"no package index is reachable: {extra.stderr.strip().splitlines()[-1][:200]}")
    (work / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("coherence")))
    task = LOCAL | {"dataset_kwargs": {"data_files": {"validation": str(work / "own.jsonl")}}}
    (work / "own.yaml").write_text(json.dumps(task))
    assert small_run(tmp_path, "run") == 0
    code = "import toolkit; print(toolkit.__file__)"
    used = subprocess.run([python, "-c", code], cwd=work, env=alone, check=True, capture_output=True, text=True)
    assert str(site) in used.stdout
    flags = ["-p", "Experiment.final_evaluators = [@LMEval, @MultipleChoice]", "-p", "LMEval.tasks = ['own']"]
    flags += ["-p", f"LMEval.include_path = '{work}'", "-p", "MultipleChoice.paths = ['builtin:coherence']"]
    evaluate = [python, "-m", "toolkit.evaluate", str(tmp_path / "run"), *flags, "--json"]
    done = subprocess.run(evaluate, cwd=work, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["eval/LMEval/own/acc"] == measured["eval/MultipleChoice/accuracy"]
    trained = harness_peer.train(tmp_path / "trained", "bytes")
    harness_peer.check(harness_peer.compare(python, trained, tmp_path / "peer", **alone))
