"""``python -m toolkit.evaluate RUN --lm-eval TASKS``: the flag beside all others, and the results against those of
lm-eval itself on the model that ``convert`` writes."""

import re
import sys

import harness_peer
import pytest
from runs import small_run

from components.stories import SyntheticStories
from toolkit import evaluate
from toolkit.compose import compose
from toolkit.config.additions import Addition
from toolkit.config.layers import ConfigError
from toolkit.evaluation import evaluators

TASKS = Addition("LMEval", {"tasks": ["a", "b"]}, "--lm-eval a,b")
FOLDER = Addition("LMEval", {"tasks": ["a"], "include_path": "own"}, "--lm-eval a --lm-eval-path own")
OVERLAY = "gin/evaluator/lm_eval.gin"
MACRO = ["KINDS = [@Induction]", "Experiment.final_evaluators = %KINDS"]


def composed(*bindings, overlays=(), addition=TASKS):
    """({name: evaluator}, flat config) of a config with the flag and these bindings."""
    config, _ = compose(["gin/model/tiny.gin", *overlays], bindings, evaluators=[addition])
    return evaluators.of(config, config.build()), config.flat


@pytest.mark.parametrize(
    ("bindings", "overlays", "names"),
    [
        ([], [], ["LMEval"]),
        (["LMEval.limit = 3"], [], ["LMEval"]),
        (["Experiment.evaluators = [@Induction]"], [], ["Induction", "LMEval"]),
        (
            ["Experiment.final_evaluators = [@Induction, @long/Induction]"],
            [],
            ["Induction", "long-Induction", "LMEval"],
        ),
        (["Experiment.final_evaluators = (@Induction,)"], ["gin/evaluator/minimal_pairs.gin"], ["Induction", "LMEval"]),
        (["Experiment.final_evaluators = [@components.harness.LMEval]"], [], ["LMEval"]),
        ([], [OVERLAY], ["LMEval"]),
        ([], ["gin/evaluator/minimal_pairs.gin"], ["MinimalPairs", "LMEval"]),
        (["Experiment.final_evaluators = [@more/LMEval]", "more/LMEval.tasks = ['c']"], [], ["more-LMEval", "LMEval"]),
    ],
)
def test_the_flag_adds_one_evaluator_to_those_of_the_config(bindings, overlays, names):
    chosen, flat = composed(*bindings, overlays=overlays)
    assert list(chosen) == names and chosen["LMEval"].tasks == ["a", "b"]
    assert chosen["LMEval"].limit == (3 if bindings == ["LMEval.limit = 3"] else 500 if OVERLAY in overlays else None)
    assert flat["LMEval.include_path"] is None
    assert composed(addition=FOLDER)[0]["LMEval"].include_path == "own"


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["LMEval.tasks = ['c']"], '--lm-eval a,b: LMEval.tasks is bound twice in -p; the first is at -p "LMEval.'),
        (
            ["Experiment.final_evaluators = 3"],
            "-p 'Experiment.final_evaluators = 3': Experiment.final_evaluators takes a",
        ),
        (["Experiment.final_evaluators = [@Inductoin]"], "-p 'Experiment.final_evaluators = [@Inductoin]': part not"),
        (MACRO, "--lm-eval a,b needs the list itself in Experiment.final_evaluators, not the macro %KINDS"),
        (["LMEval.limit = 0"], "-p 'LMEval.limit = 0': LMEval.limit = 0: it should"),
    ],
)
def test_what_the_flag_does_not_go_with_is_refused(bindings, message):
    with pytest.raises(ConfigError) as caught:
        composed(*bindings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lm-eval", "a,,b"], "'a,,b': write names of tasks with a comma between them"),
        (["--lm-eval", ""], "write names of tasks"),
        (["--lm-eval-path", "own"], "--lm-eval-path needs --lm-eval TASK,TASK"),
    ],
)
def test_a_wrong_flag_is_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["runs/none", *flags])
    assert message in capsys.readouterr().err


def test_without_the_package_the_command_names_the_extra_before_it_reads_text(tmp_path, monkeypatch):
    small_run(tmp_path, "a", "--stop-at", "4")
    for module in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(SyntheticStories, "prepare", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=re.escape('install the extra eval with python -m pip install -e ".[eval]"')):
        evaluate.main([str(tmp_path / "a"), "--lm-eval", "hellaswag"])


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", list(harness_peer.TOKENIZERS))
def test_results_equal_those_of_lm_eval_on_the_exported_model(tokenizer, tmp_path):
    """Here, if lm-eval is installed here. ``test_builtin_items.py`` makes the same comparison in an environment that it
    makes itself."""
    pytest.importorskip("lm_eval", reason="the extra eval")
    pytest.importorskip("accelerate", reason="lm-eval's class for transformers needs lm-eval[hf]")
    folder = harness_peer.train(tmp_path / "runs", tokenizer)
    harness_peer.check(harness_peer.compare(sys.executable, folder, tmp_path / "work"))
