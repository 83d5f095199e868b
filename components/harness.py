"""LMEval: tasks of lm-evaluation-harness as an evaluator (toolkit/evaluation/harness.py)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from annotated_types import Ge, MinLen

from toolkit.evaluation import harness
from toolkit.measures import Score
from toolkit.protocols import Reader
from toolkit.registry import register


@register("evaluator")
class LMEval:
    """Tasks of lm-evaluation-harness (Gao et al. 2024, https://github.com/EleutherAI/lm-evaluation-harness), by name,
    with its own prompts, documents and scores. It needs the extra ``eval``.

    Metrics are TASK/METRIC, as in ``hellaswag/acc_norm``, and TASK/METRIC/FILTER for answers that a filter changed.
    Items are the documents. lm-eval says of each metric which direction is better: ``lower_is_better`` has those for
    which lower is better, such as perplexities and bits per byte.

    tasks         names of tasks, tags or groups. Most tasks fetch their documents from the Hugging Face Hub
    num_fewshot   the examples in each prompt; None: as many as the task says. A task that says 0 keeps 0
    limit         only the first documents of each task
    include_path  a folder with YAML files of your own tasks. They can run code: name only folders that you trust
    """

    higher_is_better = True

    def __init__(
        self,
        tasks: Annotated[list[Annotated[str, MinLen(1)]], MinLen(1)],
        num_fewshot: Annotated[int, Ge(0)] | None = None,
        limit: Annotated[int, Ge(1)] | None = None,
        include_path: str | None = None,
    ):
        self.tasks, self.num_fewshot, self.limit, self.include_path = tasks, num_fewshot, limit, include_path
        self.loaded: dict[str, Any] = {}
        self.lower_is_better: Collection[str] = ()

    def prepare(self) -> None:
        self.loaded = harness.load(self.tasks, self.num_fewshot, self.include_path)
        self.lower_is_better = harness.lower_is_better(self.loaded)

    def fingerprint(self) -> str:
        return harness.fingerprint(self.loaded, self.limit)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        return harness.measure(self.loaded, self.limit, reader)
