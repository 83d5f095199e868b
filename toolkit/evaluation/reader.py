"""A trained model as evaluators see it: it gives the nats of texts and of continuations, and it continues prompts.

Shapes: B windows of a batch, T tokens, V vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.context import Context
from toolkit.evaluation import windows
from toolkit.evaluation.windows import Window
from toolkit.experiment import Experiment, micro_batch_size
from toolkit.loop import sampling
from toolkit.measures import Continuation, TokenNats
from toolkit.objective import documents
from toolkit.parallel import distributed
from toolkit.protocols import Head, Tokenizer
from toolkit.seeding import named_seed

LOGITS = 2**26  # bytes of logits that are in memory at a time
CACHE = 2**28  # bytes of the caches of all contexts of a batch


class Reader:
    """Reads texts with a model, which must be in evaluation mode; the caller also chooses the precision (autocast).

    Results do not depend on the order of the arguments: windows are sorted by length before they are batched. They
    depend on ``batch_tokens``, the tokens of a batch, only by rounding. No random number generator of torch is used.
    If ``keep_documents_apart``, the model was trained with ``Experiment.mask_documents``, and a text is read as it was
    then: without attention to the token that ends the document before."""

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
        self._init_cache: Callable[[int], list | None] | None = getattr(model, "init_cache", None)
        self._byte_lengths = np.asarray(tokenizer.byte_lengths, dtype=np.int64)

    def nats(self, texts: Sequence[str]) -> list[TokenNats]:
        """The nats of each token of each text. A text is read as a document: after the token ``eot``, and in windows of
        at most ``max_len`` tokens (``windows.rolling``)."""
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
        """The nats of the second text of each pair, after the first (``windows.continuation``). Pairs with the same
        context are computed together: the model reads the context once."""
        scored = self._score([windows.continuation(self.tokenizer, *pair, self.max_len) for pair in pairs])
        return [Continuation(float(nats.sum()), len(nats), bool(greedy.all())) for nats, greedy in scored]

    def generate(
        self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = (), temperature: float = 0.0
    ) -> list[str]:
        """Continue each prompt by up to ``max_tokens`` tokens, up to the end of the document, or up to the first of the
        texts ``stop``, which is left out. The prompt is not part of the result. ``temperature`` 0 takes the likeliest
        token; otherwise tokens are drawn with a seed that depends on the prompt and on the run's seed."""
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
    def _score(self, requests: Sequence[Window]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each window: the nats of its targets (float64), and whether each of them is the likeliest token."""
        results: dict[Window, tuple[np.ndarray, np.ndarray]] = {}
        shared, alone = self._by_context(set(requests))
        for batch in self._batches(sorted(alone, key=lambda w: (-len(w.context) - len(w.targets), w))):
            results |= zip(batch, self._read(batch), strict=True)
        for contexts in self._context_batches(shared):
            results |= self._read_shared(contexts, shared)
        return [results[window] for window in requests]

    def _by_context(self, requests: set[Window]) -> tuple[dict[tuple[int, ...], list[Window]], list[Window]]:
        """Windows that share a context, by context, and all other windows. Without a cache nothing can be shared."""
        by_context: dict[tuple[int, ...], list[Window]] = {}
        for window in sorted(requests):
            by_context.setdefault(window.context, []).append(window)
        if self.keep_documents_apart or self._new_caches(1) is None:
            by_context = {}
        shared = {context: group for context, group in by_context.items() if len(group) > 1 and len(context) > 1}
        return shared, [window for window in requests if window.context not in shared]

    def _batches(self, requests: Sequence[Window]) -> Iterator[list[Window]]:
        """Consecutive windows, the longest first, in batches of at most ``batch_tokens`` tokens with the padding."""
        start = 0
        while start < len(requests):
            longest = len(requests[start].context) + len(requests[start].targets) - 1
            size = max(1, self.batch_tokens // longest)
            yield list(requests[start : start + size])
            start += size

    def _read(self, batch: Sequence[Window]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Read windows side by side. Shorter ones are padded at the end, which no earlier token sees."""
        ids = self._padded([(*context, *targets[:-1]) for context, targets in batch])
        context = Context(*documents(ids, self.tokenizer.eot)) if self.keep_documents_apart else None
        hidden, head = self.model(ids, context)
        rows = [torch.arange(len(c) - 1, len(c) - 1 + len(t)) for c, t in batch]
        target_hidden = torch.cat([hidden[row, places.to(hidden.device)] for row, places in enumerate(rows)])
        return self._split(target_hidden, head, [targets for _, targets in batch])

    def _split(
        self, hidden: Tensor, head: Head, targets: Sequence[tuple[int, ...]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """hidden (N,C) of the positions before all targets, one window after the other -> nats and greedy by window."""
        flat = torch.tensor(list(itertools.chain.from_iterable(targets)), device=hidden.device)
        nats, greedy = np.empty(len(flat)), np.empty(len(flat), dtype=bool)
        rows = max(1, LOGITS // (4 * head.vocab_size))
        for start in range(0, len(flat), rows):
            logits, chosen = head.logits(hidden[start : start + rows]).float(), flat[start : start + rows, None]
            of_chosen = logits.logsumexp(-1) - logits.gather(-1, chosen)[:, 0]
            nats[start : start + rows] = of_chosen.double().cpu().numpy()
            greedy[start : start + rows] = (logits.argmax(-1) == chosen[:, 0]).cpu().numpy()
        ends = np.cumsum([len(each) for each in targets])[:-1]
        return list(zip(np.split(nats, ends), np.split(greedy, ends), strict=True))

    # ---- windows that share a context -------------------------------------------------------------------------------

    def _context_batches(self, shared: dict[tuple[int, ...], list[Window]]) -> Iterator[list[tuple[int, ...]]]:
        """Contexts of equal length, as a cache has one length for all its rows."""
        one = (self._new_caches(1) if shared else None) or []
        row_bytes = max(1, sum(tensor.numel() * tensor.element_size() for layer in one for tensor in layer))
        ordered = sorted(shared, key=lambda context: (-len(context), context))
        for length, group in itertools.groupby(ordered, key=len):
            contexts, size = list(group), max(1, min(self.batch_tokens // length, CACHE // row_bytes))
            yield from (contexts[start : start + size] for start in range(0, len(contexts), size))

    def _read_shared(
        self, contexts: list[tuple[int, ...]], shared: dict[tuple[int, ...], list[Window]]
    ) -> dict[Window, tuple[np.ndarray, np.ndarray]]:
        """Read the contexts once into a cache, and then the first continuation of each, the second of each, and so on.
        Before each round, the cache is put back to what it was after the contexts."""
        length, caches = len(contexts[0]), self._new_caches(len(contexts))
        assert caches is not None, "only windows of models with a cache are read in this way"
        last, head = self._read_cached(contexts, caches, 0)
        after_context = [[tensor.clone() for tensor in layer] for layer in caches]
        results: dict[Window, tuple[np.ndarray, np.ndarray]] = {}
        for number in range(max(len(shared[context]) for context in contexts)):
            rows = [row for row, context in enumerate(contexts) if number < len(shared[context])]
            group = [shared[contexts[row]][number] for row in rows]
            for layer, values in zip(caches, after_context, strict=True) if number else ():
                for tensor, value in zip(layer, values, strict=True):
                    tensor.copy_(value)
            texts: list[tuple[int, ...]] = [()] * len(contexts)
            for row, window in zip(rows, group, strict=True):
                texts[row] = window.targets[:-1]
            hidden = last[:, -1:]
            if any(texts):
                hidden = torch.cat((hidden, self._read_cached(texts, caches, length)[0]), dim=1)
            target_hidden = torch.cat(
                [hidden[row, : len(window.targets)] for row, window in zip(rows, group, strict=True)]
            )
            results |= zip(group, self._split(target_hidden, head, [window.targets for window in group]), strict=True)
        return results

    def _new_caches(self, rows: int) -> list | None:
        return self._init_cache(rows) if self._init_cache else None

    def _read_cached(self, texts: Sequence[tuple[int, ...]], caches: list, start: int) -> tuple[Tensor, Head]:
        ids = self._padded(texts)
        at = torch.tensor(start, device=self._device)
        return self.model(ids, Context(cache=caches, start=at, end=start + ids.shape[1]))

    def _padded(self, texts: Sequence[tuple[int, ...]]) -> Tensor:
        """(B,T) ids, padded at the end."""
        ids = torch.full((len(texts), max(map(len, texts))), self.tokenizer.eot, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
        return ids.to(self._device)


def reader_of(experiment: Experiment, model: nn.Module, tokenizer: Tokenizer) -> Reader:
    """The reader of an experiment's model: its batches have as many tokens as those of training."""
    max_len, batch = experiment.seq_len, micro_batch_size(experiment, distributed.world_size())
    return Reader(model, tokenizer, max_len, batch * max_len, experiment.seed, experiment.mask_documents)
