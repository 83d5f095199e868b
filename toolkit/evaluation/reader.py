"""A trained model as evaluators see it: it gives the nats of texts and of continuations, and it continues prompts.

Shapes: B windows of a batch, T tokens, V vocabulary."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.context import Caches, Context
from toolkit.evaluation import batches, prefixes, windows
from toolkit.evaluation.prefixes import Group, Ids
from toolkit.evaluation.windows import Window
from toolkit.experiment import Experiment, micro_batch_size
from toolkit.loop import sampling
from toolkit.measures import Continuation, TokenNats
from toolkit.objective import documents
from toolkit.parallel import distributed
from toolkit.protocols import Head, Tokenizer
from toolkit.seeding import named_seed

LOGITS = 2**26  # bytes of logits that are in memory at a time
CACHE = 2**28  # bytes of the caches of a batch
Scored = tuple[np.ndarray, np.ndarray]  # nats (N,) float64, and whether each token is the likeliest, (N,) bool


class Span(NamedTuple):
    """Successive ``targets`` in one row of a batch. The first one is predicted from position ``start``."""

    row: int
    start: int
    targets: tuple[int, ...]


class Reader:
    """Reads texts with a model, which must be in evaluation mode; the caller also chooses the precision (autocast).

    Results do not depend on the order of the arguments: sequences are sorted before they are batched. They depend on
    ``batch_tokens``, the tokens of a batch, only by rounding. No random number generator of torch is used. If the model
    has a cache, it reads only once what several sequences begin with (``prefixes``), such as the context of several
    choices. If ``keep_documents_apart``, the model was trained with ``Experiment.mask_documents``, and a text is read
    as it was then: without attention to the token that ends the document before."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        max_len: int,
        batch_tokens: int,
        seed: int = 0,
        keep_documents_apart: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.max_len = model, tokenizer, max_len
        self.batch_tokens, self.seed, self.keep_documents_apart = batch_tokens, seed, keep_documents_apart
        self._device = next(model.parameters()).device
        self._init_cache: Callable[..., Caches | None] | None = getattr(model, "init_cache", None)
        self._chooses_length = "length" in inspect.signature(self._init_cache or (lambda: None)).parameters
        self._byte_lengths = np.asarray(tokenizer.byte_lengths, dtype=np.int64)

    def nats(self, texts: Sequence[str]) -> list[TokenNats]:
        """The nats of each token of each text. A text is read as a document: after the token ``eot``, and in windows of
        at most ``max_len`` tokens (``windows.rolling``)."""
        _check_several("nats", texts)
        token_lists = [list(self.tokenizer.encode(text)) for text in texts]
        return [
            TokenNats(nats, self._byte_lengths[np.array(tokens, dtype=np.int64)])
            for tokens, nats in zip(token_lists, self.token_nats(token_lists), strict=True)
        ]

    def token_nats(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The nats of each token of each sequence of ids, (T,) float64, read in the same way as a text."""
        return [nats for nats, _ in self._read_sequences(sequences)]

    def token_greedy(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Whether each token of each sequence of ids is the likeliest one, (T,) bool, read in the same way."""
        return [greedy for _, greedy in self._read_sequences(sequences)]

    def _read_sequences(self, sequences: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each sequence: the nats of its tokens, and whether each of them is the likeliest one."""
        windows_of = [list(windows.rolling(ids, self.tokenizer.eot, self.max_len)) for ids in sequences]
        scored = iter(self._score([window for each in windows_of for window in each]))
        results = []
        for own in windows_of:
            parts = list(itertools.islice(scored, len(own)))
            nats, greedy = zip(*parts, strict=True) if parts else ((np.empty(0),), (np.empty(0, dtype=bool),))
            results.append((np.concatenate(nats), np.concatenate(greedy)))
        return results

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        """The nats of the second text of each pair, after the first (``windows.continuation``)."""
        scored = self._score([windows.continuation(self.tokenizer, *pair, self.max_len) for pair in pairs])
        return [Continuation(float(nats.sum()), len(nats), bool(greedy.all())) for nats, greedy in scored]

    def generate(
        self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = (), temperature: float = 0.0
    ) -> list[str]:
        """Continue each prompt by up to ``max_tokens`` tokens, up to the end of the document, or up to the first of the
        texts ``stop``, which is left out. The prompt is not part of the result. ``temperature`` 0 takes the likeliest
        token; otherwise tokens are drawn with a seed that depends on the prompt and on the run's seed."""
        _check_several("generate", prompts)
        return [self._continue(prompt, max_tokens, stop, temperature) for prompt in prompts]

    def _continue(self, prompt: str, max_tokens: int, stop: Sequence[str], temperature: float) -> str:
        ids = list(self.tokenizer.encode(prompt)) or [self.tokenizer.eot]
        seed, new_ids, text = named_seed(self.seed, f"evaluator {prompt}", 0), [], ""
        for chosen in sampling.stream(self.model, ids, max_tokens, temperature=temperature, seed=seed):
            token = int(chosen.item())
            if token == self.tokenizer.eot:
                break
            new_ids.append(token)
            text = self.tokenizer.decode(new_ids)
            ends = [place for mark in stop if (place := text.find(mark)) >= 0]
            if ends:
                return text[: min(ends)]
        return text

    # ---- windows ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _score(self, requests: Sequence[Window]) -> list[Scored]:
        """For each window: the nats of its targets, and whether each of them is the likeliest token."""
        windows_of: dict[Ids, list[Window]] = {}  # by what the model reads
        for window in sorted(set(requests)):
            windows_of.setdefault((*window.context, *window.targets[:-1]), []).append(window)
        groups, alone = prefixes.groups(windows_of) if self._can_share else ([], list(windows_of))
        results: dict[Window, Scored] = {}
        alone.sort(key=lambda ids: (-len(ids), ids))
        for batch in batches.padded([len(ids) for ids in alone], self.batch_tokens):
            results |= self._read(alone[batch], windows_of)
        groups.sort(key=lambda group: (-group.shared, group.sequences))
        repeats = [len(group.sequences) - 1 for group in groups]
        largest = self._most_rows(max((len(ids) for group in groups for ids in group.sequences), default=1))
        for batch in batches.trimmed([group.shared for group in groups], repeats, self.batch_tokens, largest):
            results |= self._read_groups(groups[batch], windows_of)
        return [results[window] for window in requests]

    def _read(self, batch: Sequence[Ids], windows_of: Mapping[Ids, Sequence[Window]]) -> dict[Window, Scored]:
        """Read sequences side by side. Shorter ones are padded at the end, which no earlier token sees."""
        ids = self._padded(batch)
        context = Context(*documents(ids, self.tokenizer.eot)) if self.keep_documents_apart else None
        hidden, head = self.model(ids, context)
        requests = [(row, window) for row, each in enumerate(batch) for window in windows_of[each]]
        spans = [Span(row, len(window.context) - 1, window.targets) for row, window in requests]
        return dict(zip((window for _, window in requests), self._nats(hidden, head, spans), strict=True))

    def _read_groups(self, groups: Sequence[Group], windows_of: Mapping[Ids, Sequence[Window]]) -> dict[Window, Scored]:
        """Read what the sequences of each group share into a cache. Then read the rest of each sequence, with a copy of
        its group's row of the cache."""
        shared = groups[-1].shared  # the least of all groups, as a cache has one length for all its rows
        length = max(len(ids) for group in groups for ids in group.sequences)
        caches = self._new_caches(len(groups), length)
        assert caches is not None, "groups are formed only for models with a cache"
        heads = [group.sequences[0][: shared + 1] for group in groups]
        hidden, head = self._read_cached([ids[:-1] for ids in heads], caches, 0)
        firsts = [min(len(w.context) - 1 for ids in group.sequences for w in windows_of[ids]) for group in groups]
        spans = [Span(row, first, heads[row][first + 1 :]) for row, first in enumerate(firsts)]
        beginnings = self._nats(hidden, head, spans)

        results: dict[Window, Scored] = {}
        tails = [(ids, row) for row, group in enumerate(groups) for ids in group.sequences]
        tails.sort(key=lambda tail: (-len(tail[0]), tail))
        lengths = [len(ids) - shared for ids, _ in tails]
        for part in batches.padded(lengths, self.batch_tokens, self._most_rows(length)):
            batch = tails[part]
            rows = torch.tensor([row for _, row in batch], device=self._device)
            copies = [tuple(tensor.index_select(0, rows) for tensor in layer) for layer in caches]
            hidden, head = self._read_cached([ids[shared:] for ids, _ in batch], copies, shared)
            requests = [(place, row, w) for place, (ids, row) in enumerate(batch) for w in windows_of[ids]]
            spans = []
            for place, _, window in requests:
                before = len(window.context) - 1 - shared  # if negative, that many targets are predicted from the head
                spans.append(Span(place, max(0, before), window.targets[max(0, -before) :]))
            for (_, row, window), ending in zip(requests, self._nats(hidden, head, spans), strict=True):
                skipped = len(window.context) - 1 - firsts[row]
                beginning = (values[skipped:] for values in beginnings[row])
                nats, greedy = (np.concatenate(both) for both in zip(beginning, ending, strict=True))
                results[window] = nats, greedy
        return results

    def _nats(self, hidden: Tensor, head: Head, spans: Sequence[Span]) -> list[Scored]:
        """hidden (B,T,C) -> for each span, the nats of its targets, and whether each of them is the likeliest token."""
        lengths, width = [len(span.targets) for span in spans], hidden.shape[1]
        flat = [np.arange(span.start, span.start + len(span.targets)) + span.row * width for span in spans]
        places = torch.from_numpy(np.concatenate(flat)).to(hidden.device)
        targets = torch.tensor([token for span in spans for token in span.targets], dtype=torch.int64)
        hidden, targets = hidden.flatten(0, 1)[places], targets.to(hidden.device)[:, None]
        nats, greedy = np.empty(len(places)), np.empty(len(places), dtype=bool)
        rows = max(1, LOGITS // (4 * head.vocab_size))
        for start in range(0, len(places), rows):
            values = _nats_and_greedy(head.logits(hidden[start : start + rows]).float(), targets[start : start + rows])
            nats[start : start + rows], greedy[start : start + rows] = (value.cpu().numpy() for value in values)
        ends = np.cumsum(lengths)[:-1]
        return list(zip(np.split(nats, ends), np.split(greedy, ends), strict=True))

    # ---- caches -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _can_share(self) -> bool:
        """Whether the model can read the beginning of several sequences once: it has a cache, whose tensors have a row
        for each sequence."""
        caches = None if self.keep_documents_apart else self._new_caches(3, 1)
        return caches is not None and all(tensor.shape[:1] == (3,) for layer in caches for tensor in layer)

    def _new_caches(self, rows: int, length: int) -> Caches | None:
        """Caches for ``length`` positions, or for more if the model has no choice."""
        if self._init_cache is None:
            return None
        return self._init_cache(rows, length) if self._chooses_length else self._init_cache(rows)

    def _most_rows(self, length: int) -> int:
        """How many rows of caches for ``length`` positions may be in memory."""
        one = self._new_caches(1, length) or []
        return max(1, CACHE // max(1, sum(tensor.numel() * tensor.element_size() for layer in one for tensor in layer)))

    def _read_cached(self, texts: Sequence[Ids], caches: Caches, start: int) -> tuple[Tensor, Head]:
        ids = self._padded(texts)
        at = torch.tensor(start, device=self._device)
        return self.model(ids, Context(cache=caches, start=at, end=start + ids.shape[1]))

    def _padded(self, texts: Sequence[Ids]) -> Tensor:
        """(B,T) ids, padded at the end."""
        ids = np.full((len(texts), max(map(len, texts))), self.tokenizer.eot, dtype=np.int64)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        return torch.from_numpy(ids).to(self._device)


def _nats_and_greedy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (N,V) float32, which are overwritten, and targets (N,1) -> the nats of the targets, (N,) float64, and
    whether each is the likeliest token, of equal ones the first."""
    largest, of_target = logits.amax(-1, keepdim=True), logits.gather(-1, targets)
    greedy = (of_target == largest)[:, 0]
    rows = greedy.nonzero()[:, 0]  # argmax alone would take longer than all of this
    greedy[rows] = logits[rows].argmax(-1) == targets[rows, 0]
    log_z = logits.sub_(largest).exp_().sum(-1).log_() + largest[:, 0]
    return (log_z - of_target[:, 0]).double(), greedy


def reader_of(experiment: Experiment, model: nn.Module, tokenizer: Tokenizer) -> Reader:
    """The reader of an experiment's model: its batches have as many tokens as those of training."""
    max_len, batch = experiment.seq_len, micro_batch_size(experiment, distributed.world_size())
    return Reader(model, tokenizer, max_len, batch * max_len, experiment.seed, experiment.mask_documents)


def _check_several(method: str, texts: Sequence[str]) -> None:
    """Raise ValueError for one text in place of several, each of whose characters would count as a text."""
    if isinstance(texts, str):
        raise ValueError(f"reader.{method} takes a list of texts, and got one text: write [text]")
