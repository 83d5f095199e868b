"""Token windows: which tokens a model reads, and which of them it predicts.

The rules are those of lm-evaluation-harness (Gao et al. 2024, https://github.com/EleutherAI/lm-evaluation-harness), so
that scores can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from toolkit.protocols import Tokenizer


class Window(NamedTuple):
    """The model reads ``context`` and then ``targets``; each target is predicted from all tokens before it. The context
    has at least one token."""

    context: tuple[int, ...]
    targets: tuple[int, ...]


def rolling(tokens: Sequence[int], first: int, max_len: int) -> Iterator[Window]:
    """Divide a text into windows that predict each token once. ``first`` is the token before the text.

    The model reads at most ``max_len`` tokens at a time. The first window begins with ``first``. Each further window
    begins where the one before ended; the last window is extended to the left, so that its tokens have as much context
    as fits."""
    if tokens:
        yield Window((first,), tuple(tokens[:max_len]))
    for start in range(max_len, len(tokens), max_len):
        end = min(start + max_len, len(tokens))
        yield Window(tuple(tokens[end - max_len - 1 : start]), tuple(tokens[start:end]))


def continuation(tokenizer: Tokenizer, context: str, text: str, max_len: int) -> Window:
    """The window that predicts ``text`` after ``context``. Without a context it begins with the token ``eot``.

    White space at the end of the context is moved to the text, since most tokenizers join it to the next word. Both are
    encoded together, and the context on its own: the targets are the tokens that follow those of the context. If all of
    it does not fit into ``max_len`` tokens, the oldest tokens are left out. There are no targets if the text is empty,
    or if the tokenizer joins it to the context. Raises ValueError if the targets do not fit."""
    stripped = context.rstrip()
    if stripped:
        text = context[len(stripped) :] + text
        before = tuple(tokenizer.encode(stripped))
        targets = tuple(tokenizer.encode(stripped + text))[len(before) :]
    else:
        before, targets = (tokenizer.eot,), tuple(tokenizer.encode(context + text))
    if len(targets) > max_len:
        raise ValueError(
            f"the continuation {text[:40]!r} has {len(targets)} tokens, and the model's context (Experiment.seq_len) "
            f"has {max_len}; use shorter continuations, or a model with a longer context"
        )
    read = len(before) + max(0, len(targets) - 1)  # the last target is predicted, but not read
    surplus = max(0, read - max_len)
    return Window(before[surplus:], targets)
