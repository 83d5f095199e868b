"""Generated items for evaluators, and lm-evaluation-harness's own loop over a model of transformers."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import warnings
from collections.abc import Sequence

import torch

from components.evaluator import Question
from components.tokenizer import BPE

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


def question_texts(question: Question) -> list[tuple[str, str]]:
    """The (context, continuation) of each choice of a question."""
    return [(question.context, f" {choice}") for choice in question.choices]


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
def quiet():
    """Hide warnings, log lines and progress bars of other packages."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            try:
                yield
            finally:
                logging.disable(logging.NOTSET)
