"""Generated items for evaluators, and lm-evaluation-harness's own loop over a model of transformers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from components.evaluator import (
    Completion,
    Induction,
    LastWord,
    MinimalPairs,
    MultipleChoice,
    PositionLoss,
    TextLoss,
)
from components.tokenizer import BPE
from toolkit.protocols import Evaluator

Row = dict[str, object]
CHOICES = 4
ENDS = re.compile(r"(?<=[.!?]) ")


def sentences(texts: Sequence[str], fewest: int, most: int) -> list[str]:
    """The sentences of the texts that have ``fewest`` to ``most`` words."""
    every = (sentence for text in texts for sentence in ENDS.split(text.replace("\n\n", " ")))
    return [sentence for sentence in every if fewest <= len(sentence.split()) <= most]


def minimal_pairs(texts: Sequence[str], count: int) -> list[Row]:
    """Sentences of 5 to 12 words, as in BLiMP; the bad one has two neighbouring words exchanged."""
    draw, rows = random.Random(0), []
    for good in draw.sample(sentences(texts, 5, 12), count):
        words = good.split()
        place = draw.randrange(len(words) - 1)
        words[place], words[place + 1] = words[place + 1], words[place]
        rows.append({"sentence_good": good, "sentence_bad": " ".join(words)})
    return rows


def multiple_choice(texts: Sequence[str], count: int) -> list[Row]:
    """Questions in the format of HellaSwag: the beginning of a story, 50 to 80 words, and four endings of 8 to 20 words
    from any story."""
    draw, endings, rows = random.Random(0), sentences(texts, 8, 20), []
    for number in range(count):
        words = texts[number % len(texts)].split()
        start = draw.randrange(max(1, len(words) - 80))
        context = " ".join(words[start : start + draw.randint(50, 80)])
        row = {"activity_label": "A story", "ctx_a": context, "ctx_b": "", "endings": draw.sample(endings, CHOICES)}
        rows.append(row | {"label": str(draw.randrange(CHOICES))})
    return rows


def evaluators(rows: dict[str, list[Row]]) -> dict[str, MinimalPairs | MultipleChoice]:
    """Our evaluators MinimalPairs and MultipleChoice, prepared, with the items in ``rows``."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: [_write(folder, name, items)] for name, items in rows.items()}
        found = {
            "MinimalPairs": MinimalPairs(paths["MinimalPairs"], prefix=" "),
            "MultipleChoice": MultipleChoice(paths["MultipleChoice"]),
        }
        for evaluator in found.values():
            evaluator.prepare()
    return found


def every_evaluator(rows: dict[str, list[Row]], texts: Sequence[str]) -> dict[str, tuple[Evaluator, int]]:
    """The evaluators of the shelf, prepared, each with its number of items; the knobs are those of gin/evaluator/."""
    with tempfile.TemporaryDirectory() as folder:
        stories = Path(folder, "stories.txt")
        stories.write_text("<|endoftext|>".join(texts))
        words = _write(folder, "words", [{"text": " ".join(text.split()[:60])} for text in texts])
        prompts = ["Once upon a time", "One day", "The little"]
        others = {
            "TextLoss": (TextLoss([str(stories)]), len(texts)),
            "PositionLoss": (PositionLoss([str(stories)]), len(texts)),
            "LastWord": (LastWord([words]), len(texts)),
            "Induction": (Induction(), Induction().sequences),
            "Completion": (Completion(prompts, pattern="[.!?]"), len(prompts)),
        }
        for evaluator, _ in others.values():
            evaluator.prepare()
    return {name: (evaluator, len(rows[name])) for name, evaluator in evaluators(rows).items()} | others


def pairs(evaluator: MinimalPairs | MultipleChoice) -> list[tuple[str, str]]:
    """All (context, continuation) that an evaluator scores, in the order of its items."""
    if isinstance(evaluator, MultipleChoice):
        return [(question.context, f" {choice}") for question in evaluator.questions for choice in question.choices]
    fields = ("sentence_good", "sentence_bad")
    return [("", evaluator.prefix + str(item.row[field])) for item in evaluator.items for field in fields]


def _write(folder: str, name: str, rows: list[Row]) -> str:
    path = Path(folder, f"{name}.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Harness:
    """lm-eval's HFLM over a model of transformers, and its BLiMP and HellaSwag on other items: ``tasks`` maps a name to
    rows, which are those of HellaSwag if they have endings."""

    def __init__(self, model: torch.nn.Module, tokenizer: BPE, tasks: dict[str, list[Row]]):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from its dependencies, at import
            from lm_eval.api.task import ConfigurableTask
            from lm_eval.models.huggingface import HFLM
            from transformers import PreTrainedTokenizerFast
        self.model, self.HFLM, self.eot = model, HFLM, tokenizer.eot
        with quiet():
            self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer._learnt, eos_token="<|end|>")
            self.tasks = {name: ConfigurableTask(config=_config(name, rows)) for name, rows in tasks.items()}

    def evaluate(self, task: str, batch_size: int | str) -> list[list[float]]:
        """Evaluate a task. Returns the nats of each choice of each item."""
        from lm_eval import evaluator

        with quiet():
            lm = self.HFLM(self.model, tokenizer=self.tokenizer, batch_size=batch_size, prefix_token_id=self.eot)
            results = evaluator.evaluate(lm, {task: self.tasks[task]}, bootstrap_iters=0)
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        return [[-nats for nats, _ in sample["filtered_resps"]] for sample in samples]


def _config(name: str, rows: list[Row]) -> dict[str, object]:
    """The configuration of a task of lm-eval, as in its files for BLiMP and HellaSwag."""
    import datasets

    config = {"task": name, "custom_dataset": lambda **_: {"validation": datasets.Dataset.from_list(rows)}}
    config |= {"validation_split": "validation", "output_type": "multiple_choice", "num_fewshot": 0}
    if "endings" in rows[0]:
        from lm_eval.tasks.hellaswag.utils import process_docs

        config |= {"process_docs": process_docs, "doc_to_text": "{{query}}", "doc_to_target": "{{label}}"}
        return config | {"doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    config |= {"doc_to_text": "", "doc_to_target": 0, "doc_to_choice": "{{[sentence_good, sentence_bad]}}"}
    return config | {"metric_list": [{"metric": "acc"}]}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings, log lines and progress bars of other packages."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            try:
                yield
            finally:
                logging.disable(logging.NOTSET)
