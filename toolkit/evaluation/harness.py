"""Tasks of lm-evaluation-harness (Gao et al. 2024, https://github.com/EleutherAI/lm-evaluation-harness), measured with
its own code through a Reader. The package is imported when it is used."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from toolkit.config.spelling import suggest
from toolkit.measures import Score
from toolkit.protocols import Reader

PART = "LMEval"  # the evaluator that --lm-eval adds
SEED = 1234  # lm-eval's default for the draw of few-shot examples
MAX_TOKENS = 256  # lm-eval's default for generated texts
UNITS = {
    "bits_per_byte": "bits/byte",
    "byte_perplexity": "perplexity per byte",
    "word_perplexity": "perplexity per word",
    "perplexity": "perplexity",
    "brier_score": "Brier score",
    "bleu": "BLEU points",
    "chrf": "chrF points",
    "ter": "TER points",
}


def load(names: Sequence[str], num_fewshot: int | None, include_path: str | None) -> dict[str, Any]:
    """The tasks and groups of these names, as lm-eval's TaskManager.load gives them, with the number of examples in
    each prompt set as lm-eval's command sets it. Raises ValueError if the package is missing, for names that no task
    has, and for a task that can't be loaded, for example because its documents can't be fetched."""
    with _apart():
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ValueError(
                "LMEval and --lm-eval need the package lm-eval: install the extra eval with python -m pip install -e "
                '".[eval]", or remove LMEval from Experiment.evaluators and final_evaluators'
            ) from error
        manager = TaskManager(include_path=_folder(include_path), include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = _with_defaults(include_path)
        known = set(manager.all_tasks)
        for name in names:
            if name not in known:
                raise ValueError(f"LMEval.tasks: lm-eval has no task {name!r}{suggest(name, sorted(known))}")
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
        for name in names:
            try:
                one = manager.load([name])
            except Exception as error:  # whatever a task's code, its data set or the network raise
                raise ValueError(
                    f"LMEval.tasks: the task {name!r} can't be loaded: {type(error).__name__}: {error}"
                ) from error
            loaded["tasks"] |= one["tasks"]
            loaded["groups"] |= one.get("groups", {})
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise ValueError(f"LMEval.tasks: {name!r} runs code of the model or needs images; leave it out")
            if (own := task.get_config("num_fewshot")) is None or (num_fewshot is not None and own != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
        return loaded


def fingerprint(loaded: dict[str, Any], limit: int | None) -> str:
    """SHA-256, hex, of the tasks' names and versions, of their documents and of what the model is asked."""
    digest = hashlib.sha256()
    with _apart():
        for name, task in sorted(loaded["tasks"].items()):
            task.set_fewshot_seed(seed=SEED)
            task.build_all_requests(limit=limit)
            requests = [[request.request_type, request.doc, request.arguments] for request in task.instances]
            content = [name, str(task.VERSION), requests, sorted(map(str, task.aggregation()))]
            digest.update(json.dumps(content, sort_keys=True, default=str).encode(errors="replace"))
    return digest.hexdigest()


def lower_is_better(loaded: dict[str, Any]) -> set[str]:
    """The names of the metrics for which lower is better: TASK/METRIC, without the name of a filter."""
    owners = {name: [task] for name, task in loaded["tasks"].items()}
    owners |= {name: group.get_all_tasks() for name, group in loaded["groups"].items()}
    return {
        f"{_name(owner)}/{_name(metric)}"
        for owner, tasks in owners.items()
        for task in tasks
        for metric, higher in task.higher_is_better().items()
        if higher is False
    }


def measure(loaded: dict[str, Any], limit: int | None, reader: Reader) -> dict[str, Score]:
    """The scores TASK/METRIC of a model, and TASK/METRIC/FILTER for other filters than "none". The items are the
    documents. Groups have scores without items."""
    with _apart():
        from lm_eval.evaluator import evaluate

        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=SEED)  # otherwise a second call would draw other examples
        results: Any = evaluate(_language_model(reader), loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    scores = {}
    for owner, figures in results["results"].items():
        task, samples = loaded["tasks"].get(owner), results["samples"].get(owner, [])
        for key, value in figures.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            name = f"{_name(owner)}/{_name(metric)}" + ("" if chosen == "none" else f"/{_name(chosen)}")
            items = _items(owner, task, metric, [each for each in samples if each["filter"] == chosen]) if task else {}
            scores[name] = Score(float(value), UNITS.get(metric, metric), items)
    return scores


def _items(owner: str, task: Any, metric: str, samples: list[dict[str, Any]]) -> dict[str, float]:
    """{id of a document: its value}: what the metric's aggregation makes of the document alone. Documents for which it
    makes no finite number are left out."""
    aggregate, items, counts = task.aggregation().get(metric, _only), {}, defaultdict[str, int](int)
    for sample in samples:
        value = sample.get(metric)
        if not _is_number(value):
            with contextlib.suppress(Exception):  # some aggregations need many documents
                value = aggregate([value])
        key = f"{_name(owner)}/{sample['doc_hash'][:12]}"
        counts[key] += 1
        if _is_number(value) and np.isfinite(value):
            items[key if counts[key] == 1 else f"{key}#{counts[key]}"] = float(value)
    return items


def _only(values: list[object]) -> object:
    return values[0]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, bool | int | float | np.number)


def _name(text: str) -> str:
    """A part of a metric's name, which has no white space and no slash."""
    return re.sub(r"[\s/]+", "_", text)


def _folder(include_path: str | None) -> str | None:
    """A folder of task files. Raises ValueError if it is none, or is in a run's folder: task files can run code, and
    run folders are passed on."""
    if include_path is None:
        return None
    folder = Path(include_path).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"LMEval.include_path: no folder {include_path!r} (looked from {Path.cwd()})")
    for parent in (folder, *folder.parents):
        if (parent / "facts.json").exists() and (parent / "config.gin").exists():
            raise ValueError(
                f"LMEval.include_path = {include_path!r} is in the run's folder {parent}; task files can run code, so "
                "copy those that you trust to another folder"
            )
    return str(folder)


@functools.lru_cache(maxsize=1)
def _with_defaults(include_path: str | None) -> Any:
    """lm-eval's own tasks, and those of a folder. Reading all their files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=_folder(include_path))


def _language_model(reader: Reader) -> Any:
    """A reader as a model of lm-eval."""
    from lm_eval.api.model import LM

    class ReaderLM(LM):
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            replies = reader.continuations([request.args for request in requests])
            for request, reply in zip(requests, replies, strict=True):
                if reply.tokens == 0:
                    raise ValueError(_no_tokens(*request.args))
            return [(-reply.nats, reply.is_greedy) for reply in replies]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return [-float(text.nats.sum()) for text in reader.nats([request.args[0] for request in requests])]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """``until``, ``max_gen_toks`` and, if ``do_sample``, ``temperature`` are used; other settings are not. If
            a prompt does not fit, the reader lets its window slide, where lm-eval's class for transformers cuts it."""
            texts: dict[int, str] = {}
            by_settings = defaultdict[tuple[Any, ...], list[int]](list)
            for place, request in enumerate(requests):
                wanted = request.args[1]
                until = wanted.get("until") or []
                until = (until,) if isinstance(until, str) else tuple(until)
                temperature = float(wanted.get("temperature", 1.0)) if wanted.get("do_sample") else 0.0
                by_settings[until, int(wanted.get("max_gen_toks", MAX_TOKENS)), temperature].append(place)
            for (until, max_tokens, temperature), places in by_settings.items():
                prompts = [requests[place].args[0] for place in places]
                stop = [mark for mark in until if mark]
                texts |= zip(places, reader.generate(prompts, max_tokens, stop, temperature), strict=True)
            return [texts[place] for place in range(len(requests))]

    return ReaderLM()


def _no_tokens(context: str, text: str) -> str:
    """The message for a continuation without tokens. Its nats would be 0, less than those of all others."""
    return (
        f"LMEval: the continuation {text[:40]!r} has no tokens of its own after {context[-40:]!r}: it is empty, or the "
        "tokenizer joins it to the text before; change the task so that it begins with a new word"
    )


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Run code of lm-eval without its progress bars and notes. Restores the global random generators on exit, which
    tasks may use."""
    logger = logging.getLogger("lm_eval")
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        logger.setLevel(states[3])
