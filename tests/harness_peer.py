"""The results of ``toolkit.evaluate RUN --lm-eval``, and those of lm-eval's own class for transformers (``--model hf``)
on the exported model, item by item. As a script, ``harness_peer.py RUN WORK`` writes both to WORK/result.json. It needs
the extras eval and hf, lm-eval[hf], and no other file of the tests."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

CONTEXT = 48  # tokens
TOLERANCE = 1e-4  # nats
TOKENIZERS = {
    "bytes": ("Experiment.tokenizer = @Bytes",),
    "bpe": ("Experiment.tokenizer = @BPE", "BPE.vocab_size = 400"),
}
ROWS = 40
LIKELIHOODS = {  # task: its part of a task file
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "fewshot_split": "validation",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{before}}",
        "doc_to_target": "{{after}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "page": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
}
TASKS = LIKELIHOODS | {
    "ending": {
        "output_type": "generate_until",
        "doc_to_text": "{{start}}",
        "doc_to_target": "{{end}}",
        "generation_kwargs": {"until": [" to", "."], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
PASSES = {  # name: (tasks, bindings of LMEval, lm-eval's settings, tokens of our batch, sequences of theirs)
    "one": (list(TASKS), {}, {}, 4 * CONTEXT, 1),
    "many": (list(LIKELIHOODS), {}, {}, CONTEXT, 7),
    "examples": (["choice"], {"num_fewshot": 2, "limit": 25}, {"num_fewshot": 2, "limit": 25}, 2 * CONTEXT, 1),
}


def train(runs: Path, tokenizer: str) -> Path:
    """A run that has learnt enough for some of its likeliest tokens to be right."""
    from runs import small_run

    more = ("GPT.dim = 64", "Experiment.steps = 200", f"Experiment.seq_len = {CONTEXT}", "Experiment.eval_every = 100")
    more += ("Experiment.checkpoint_every = 100", "Experiment.batch_size = 8", *TOKENIZERS[tokenizer])
    assert small_run(runs, tokenizer, bindings=more) == 0
    return runs / tokenizer


def compare(python: str, run: Path, work: Path, **environment: str) -> dict:
    """What the script writes, run by this interpreter in the folder ``work``."""
    work.mkdir(exist_ok=True)
    words = [python, str(Path(__file__)), str(run), str(work)]
    done = subprocess.run(words, cwd=work, env=environment or os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((work / "result.json").read_text())


def check(result: dict) -> None:
    """Assert that both agree on each item, and that the items tell right from wrong results. Several checkpoints are
    measured as each of them alone."""
    for name, (tasks, *_) in PASSES.items():
        ours, theirs = result[name]["ours"], result[name]["theirs"]
        assert list(ours["samples"]) == list(theirs["samples"]) == tasks
        for task in tasks:
            _check_task(task, ours["samples"][task], theirs["samples"][task])
            _check_figures(task, result[name]["command"], ours, theirs)
            _check_items(task, result[name]["items"], theirs["samples"][task])
    choice, examples = (result[name]["theirs"]["samples"]["choice"] for name in ("one", "examples"))
    assert len(choice) == ROWS and len(examples) == 25 and choice[0]["resps"] != examples[0]["resps"]
    alone, (curve, items) = result["examples"]["command"], result["curve"]
    assert [row["step"] for row in curve["checkpoints"]] == [100, 200] and alone["step"] == 200
    assert {"split": "val", "windows": alone["windows"]} | curve["checkpoints"][-1] == alone | {
        "checkpoint": curve["checkpoints"][-1]["checkpoint"]
    }
    assert items == result["examples"]["items"]


def _check_task(task: str, ours: list[dict], theirs: list[dict]) -> None:
    assert [row["doc_hash"] for row in ours] == [row["doc_hash"] for row in theirs]
    assert [row["arguments"] for row in ours] == [row["arguments"] for row in theirs]
    mine, others = ([_flat(row["resps"]) for row in rows] for rows in (ours, theirs))
    if task == "ending":
        assert mine == others and len({tuple(each) for each in others}) > 8
        return
    greedy = [value for each in others for value in each if isinstance(value, bool)]
    assert task != "word" or 0 < sum(greedy) < len(greedy)
    for one, other in zip(mine, others, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a is b if isinstance(b, bool) else abs(a - b) < TOLERANCE, (task, a, b)


def _check_figures(task: str, command: dict, ours: dict, theirs: dict) -> None:
    """What the command prints, against what lm-eval gives."""
    assert ours["results"][task].keys() == theirs["results"][task].keys()
    figures = {
        key.partition(",")[0]: value
        for key, value in theirs["results"][task].items()
        if "," in key and "stderr" not in key
    }
    assert len(figures) == len(TASKS[task]["metric_list"])
    for metric, value in figures.items():
        assert math.isclose(command[f"eval/LMEval/{task}/{metric}"], value, rel_tol=TOLERANCE, abs_tol=1e-12), metric
        assert 0 < value < 1 or metric not in ("acc", "acc_norm")


def _check_items(task: str, items: dict, theirs: list[dict]) -> None:
    """The file of --items, against lm-eval's samples."""
    assert sum(item.startswith(f"{task}/") for item in items) == len(theirs)
    for row in theirs:
        item = items[f"{task}/{row['doc_hash'][:12]}"]
        for metric in ("acc", "acc_norm", "exact_match"):
            if metric in row:
                assert item[f"{task}/{metric}"] == row[metric]


def _flat(value: object) -> list:
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list | tuple) else [value]


# ---- the script


def _rows(stories: list[str]) -> dict[str, list[dict]]:
    """{task: its documents}: contexts shorter and longer than the model's, empty, and with white space at the end."""
    rows: dict[str, list[dict]] = {task: [] for task in TASKS}
    for number in range(ROWS):
        text = " ".join(stories[number].split())
        words = text.split(" ")
        length = 0 if number % 10 == 0 else 1 + number % 30
        context = " ".join(words[:length]) + ("  " if number % 3 == 1 and length else "")
        others = [" ".join(stories[number + each].split()[each : each + 1 + each % 3]) for each in (3, 5, 8)]
        choices = [*others[: number % 4], " ".join(words[length : length + 2]), *others[number % 4 :]]
        rows["choice"].append({"context": context, "choices": choices, "answer": number % 4, "id": number})
        cut = 1 + number % 25
        before, after = " ".join(words[:cut]), " " + words[cut][: [1, 99][number % 2]]
        if number % 5 == 2:  # the space belongs to the context
            before, after = before + " ", after[1:]
        rows["word"].append({"before": before, "after": after, "id": number})
        rows["page"].append({"text": ["é", "Once", text][min(number, 2)][: 5 * number + 1], "id": number})
        start = " ".join(words[number % 5 :])[: 3 + number % 20]
        rows["ending"].append({"start": start.rstrip(), "end": words[cut], "id": number})
    return rows


def _write_tasks(work: Path) -> None:
    from toolkit.evaluation import builtin

    stories = (builtin.FOLDER / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    for task, rows in _rows([json.loads(line)["text"] for line in stories]).items():
        path = work / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(path)}}}
        (work / f"{task}.yaml").write_text(
            json.dumps({"task": task, "validation_split": "validation", **local, **TASKS[task]})
        )


class _Recorder:
    """Keeps what lm-eval's ``evaluate`` returns: the samples and the results of a call."""

    def __init__(self) -> None:
        from lm_eval import evaluator

        self.last: dict = {}
        self._evaluate = evaluator.evaluate
        evaluator.evaluate = self

    def __call__(self, *arguments, **settings):
        results = self._evaluate(*arguments, **settings)
        samples = {task: sorted(rows, key=lambda row: row["doc_id"]) for task, rows in results["samples"].items()}
        self.last = {"samples": samples, "results": results["results"]}
        return results


def _command(
    run: Path, work: Path, name: str, tasks: list[str], knobs: dict, tokens: int, *more: str
) -> tuple[dict, dict]:
    """(the JSON that ``toolkit.evaluate`` prints, {item: its metrics} of the last file that it writes)."""
    from toolkit import evaluate

    flags = [f"LMEval.{knob} = {value}" for knob, value in knobs.items()]
    flags.append(f"Experiment.batch_size = {tokens // CONTEXT}")
    words = [str(run), "--lm-eval", ",".join(tasks), "--lm-eval-path", str(work), "--items", str(work / name), *more]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert evaluate.main([*words, "--json"] + [word for flag in flags for word in ("-p", flag)]) == 0
    *_, file = sorted((work / name / "LMEval").glob("step-*.jsonl"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return json.loads(printed.getvalue()), {row["item"]: row for row in rows}


def main(run: Path, work: Path) -> None:
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from toolkit import convert

    _write_tasks(work)
    assert convert.main([str(run), "--to", "hf", "--out", str(work / "hf")]) == 0
    recorder, result = _Recorder(), {}
    manager = TaskManager(include_path=str(work), include_defaults=False)
    for name, (tasks, knobs, settings, tokens, batch) in PASSES.items():
        command, items = _command(run, work, name, tasks, knobs, tokens)
        ours = recorder.last
        evaluator.simple_evaluate(
            model="hf",
            model_args=f"pretrained={work / 'hf'},dtype=float32,logits_cache=False",
            tasks=tasks,
            task_manager=manager,
            batch_size=batch,
            device="cpu",
            bootstrap_iters=0,
            **settings,
        )
        result[name] = {"command": command, "items": items, "ours": ours, "theirs": recorder.last}
    tasks, knobs, _, tokens, _ = PASSES["examples"]
    result["curve"] = _command(run, work, "curve", tasks, knobs, tokens, "--checkpoints", "all")
    (work / "result.json").write_text(json.dumps(result, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
