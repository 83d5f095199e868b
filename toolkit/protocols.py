"""The kinds of part and what each has to offer: all that the author of a part needs to read.

Shapes: B batch, T queries, S keys, H heads, G key/value heads, D head dim, C model dim, V vocabulary, N = B * T.
The arguments of ``__init__`` come from the toolkit, positionally, and can't be bound in gin. Whatever a constructor
takes beyond them is a knob: gin binds it, its annotation is checked (``Annotated[int, Gt(0)]``), and its default is
what one gets without a binding. A knob that is named after a kind is a slot for a part and has no default; one whose
name ends in a kind (``qk_norm: type | None = None``) is a slot that may stay empty. A class qualifies by its shape;
there is nothing to inherit from. What a part can't honour, it refuses when it is built, with a ValueError that names
the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from toolkit.context import Context, Mask


class Attention(Protocol):
    """Mixes values over positions: q (B,T,H,D), k (B,S,G,D), v (B,S,G,Dv) -> (B,T,H,Dv), dtype kept.

    ``mask=None`` is plain causal with S = T. Otherwise the mask says what else holds, and ``supports`` (a class
    attribute, a set of "offset", "bias", "documents", "gqa") names what the part honours; absent means none:
    "offset" queries that start at ``mask.start`` (decoding with a cache), "bias" a score bias ``mask.bias``,
    "documents" no attention across ``mask.documents``, "gqa" fewer key/value heads than query heads (G < H).
    """

    def __init__(self, n_head: int, head_dim: int): ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor: ...


class Position(Protocol):
    """Tells the model where a token stands, by any of three methods (none at all is allowed too):

    ``embed(x (B,T,C), positions (B|1,T)) -> (B,T,C)`` is called once, on the embedded tokens;
    ``rotate(q (B,T,H,D), k (B,T,G,D), positions (B|1,T)) -> q, k`` in every mixer, D taken from q;
    ``score_bias(q_positions (T,), k_positions (S,)) -> (H,T,S)`` once a forward, added to the attention scores.
    """

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int): ...


class Mixer(Protocol):
    """Mixes over positions and owns the projections: x (B,T,C) -> (B,T,C).

    ``position`` is the index of this layer's own in ``context.position`` and ``context.bias``; ``attention`` a class
    to build with (n_head, head_dim); ``depth`` is (index, n_layer). ``init_cache(batch, max_len)`` returns what
    ``context.cache[index]`` will hold while decoding, tensors of a fixed size on the model's device;
    ``cache = False`` instead: generation then recomputes. ``supports`` is as for Attention, and most often the
    kernel's. A class attribute ``ignores`` names the sibling slots and knobs of GPT that the part does
    not use, such as ("attention", "position", "n_kv_head"). A cache may be used again from start 0, for another text.
    """

    def __init__(self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: tuple): ...

    def forward(self, x: Tensor, context: Context) -> Tensor: ...


class Norm(Protocol):
    """(..., C) -> (..., C). ``torch.nn.LayerNorm`` qualifies as it is."""

    def __init__(self, dim: int): ...

    def forward(self, x: Tensor) -> Tensor: ...


class Ffn(Protocol):
    """x (B,T,C) -> (B,T,C), each position on its own. The width knob is called ``hidden``; None means the width
    with as many parameters as the plain 4C network. Auxiliary terms go into ``context.losses``."""

    def __init__(self, dim: int): ...

    def forward(self, x: Tensor, context: Context) -> Tensor: ...


class Block(Protocol):
    """Residual wiring alone. ``mixer`` and ``ffn`` are built, ``norm`` is a class, ``depth`` is (index, n_layer).
    x may have any shape between blocks: the first block opens extra streams, the last closes them."""

    def __init__(self, dim: int, mixer: Any, ffn: Any, norm: type, depth: tuple): ...

    def forward(self, x: Tensor, context: Context) -> Tensor: ...


class Init(Protocol):
    """Fills ``parameter`` in place from ``generator``: weights and biases of every Linear and Embedding; all others
    keep what their constructor gave them. A part says of its layers, and the init reads off the parameter:
    ``residual`` True for a projection back into the residual stream (``linear.residual = True``); ``merged`` the rows
    of the matrices that a layer merges (toolkit.linear.Merged, or ``linear.merged = {"q": 64, "k": 32}``), else None;
    ``tied`` True for an embedding that is the output matrix as well. The init may set ``parameter.lr_scale``, which
    multiplies the parameter's learning rate. A module with a method ``draw(name, parameter, generator)`` fills its own
    parameters instead. On the meta device nothing is drawn, but the init is called all the same."""

    def __init__(self, n_layer: int): ...

    def __call__(self, name: str, parameter: Tensor, generator: torch.Generator) -> None: ...


class Model(Protocol):
    """ids (B,T) -> hidden (B,T,C) and the head (weight, vocab_size, ``logits(hidden)``). Refuses to go past
    ``max_len``. ``init_cache(batch)`` returns the caches for decoding, or None where a mixer has none."""

    def __init__(self, vocab_size: int, max_len: int): ...

    def forward(self, ids: Tensor, context: Context | None = None) -> tuple: ...


class Loss(Protocol):
    """hidden (N,C), head, targets (N,) with -100 ignored -> (objective, nats, count): the objective to differentiate
    and the plain cross-entropy, both summed over the targets that count, and how many those are. The loop divides
    by the count of the whole step, so accumulated micro-batches equal one large batch."""

    def __init__(self): ...

    def forward(self, hidden: Tensor, head: Any, targets: Tensor) -> tuple: ...


class Optimizer(Protocol):
    """A ``torch.optim.Optimizer`` over ``toolkit.groups.parameter_groups(model, ...)``. If it has ``train()`` and
    ``eval()``, the loop calls them around evaluation and saving."""

    def __init__(self, model: torch.nn.Module): ...

    def step(self): ...


class Schedule(Protocol):
    """step -> the multiple of the peak learning rate: pure, stateless, defined for 0 <= step < steps."""

    def __init__(self, steps: int): ...

    def __call__(self, step: int) -> float: ...


class Tokenizer(Protocol):
    """Text to ids and back. Attributes: ``vocab_size`` (known without I/O), ``eot`` (the id that ends a document),
    ``byte_lengths`` ((V,) int array, the UTF-8 bytes each id stands for; 0 for specials). ``save`` writes all that
    ``load`` needs to encode alike elsewhere, with the same ``fingerprint``, which covers knobs and what was learnt. A
    tokenizer that learns from text has ``train(texts)`` as well, which the data layer calls; it leaves one alone that
    has learnt or loaded already. ``lossy = True`` where decode(encode(text)) may differ from the text; ``pieces``, the
    bytes of each id, where a vocabulary may be cut down to fewer ids.

    ``encode_batch(texts) -> (ids (N,), counts (len(texts),))``, two integer arrays, is a quicker way to the same ids:
    those of all texts in a row, and how many each has. Threads call it at once. The data layer compares a sample with
    ``encode``, does all over with ``encode`` where the two differ, and passes encode_batch over in a class that
    overrides ``encode`` alone. ``implementation``, a str, names what encodes there, for the manifest."""

    vocab_size: int
    eot: int

    def __init__(self): ...

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def fingerprint(self) -> str: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Data(Protocol):
    """Samples of seq_len + 1 tokens. The constructor does no I/O; ``prepare()`` does all of it, once, and can be
    called again at no cost. Sample j of a split is a pure function of (seed, split, j): ``batch`` returns samples
    index * size ... index * size + size - 1 as (size, seq_len + 1) int64. ``windows(split)`` is how many distinct
    samples there are; each epoch visits every one once. Splits are "train" and "val"."""

    def __init__(self, tokenizer: Any, seq_len: int, seed: int): ...

    def prepare(self) -> None: ...

    def windows(self, split: str) -> int: ...

    def batch(self, split: str, index: int, size: int) -> np.ndarray: ...

    def fingerprint(self) -> str: ...


class Logger(Protocol):
    """Shows what the loop reports. ``metrics`` has units in its names: val/loss_nats, time/step_ms. ``start_step``
    is 0, or where a resumed run goes on: later steps logged before are void. ``close(summary)`` ends it; the run's
    facts and config lie in ``run_dir`` before a logger is built. It lives in a thread of its own, behind a queue, and
    draws no random numbers from torch."""

    def __init__(self, run_dir: Path, start_step: int): ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self, summary: dict[str, float]) -> None: ...


class Experiment(Protocol):
    """The root: its fields are the whole config. There is one, in ``toolkit/train.py``."""

    def __init__(self): ...


KINDS: dict[str, type] = {
    "attention": Attention,
    "position": Position,
    "mixer": Mixer,
    "norm": Norm,
    "ffn": Ffn,
    "block": Block,
    "init": Init,
    "model": Model,
    "loss": Loss,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "tokenizer": Tokenizer,
    "data": Data,
    "logger": Logger,
    "experiment": Experiment,
}
