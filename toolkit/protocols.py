"""The kinds of part, and what a part of each kind must provide. The author of a part needs to read only this file.

Shapes: B batch, T queries, S keys, H heads, G key/value heads, D head dim, C model dim, V vocabulary, N = B * T.
The toolkit passes the arguments of ``__init__`` that are listed here, by position; gin can't bind them. Every further
argument of a constructor is a knob: gin may bind it, its value is checked against its annotation (for example
``Annotated[int, Gt(0)]``), and its default is used if nothing binds it. A knob named after a kind is a slot for a part
and has no default. A knob whose name ends in a kind (``qk_norm: type | None = None``) is a slot that may stay empty.
A class is a part if it has the methods of its kind; it inherits from nothing. If a part can't do what it is asked for,
its constructor raises a ValueError that says what to change.
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
    """Mixes values over positions: q (B,T,H,D), k (B,S,G,D), v (B,S,G,Dv) -> (B,T,H,Dv), in the same dtype.

    ``mask=None`` means plain causal attention with S = T. Otherwise the mask says what to apply in addition. The class
    attribute ``supports`` is the set of features that the part implements; without it, the part implements none:
    "offset" queries that start at ``mask.start`` (decoding with a cache), "bias" a score bias ``mask.bias``,
    "documents" no attention across ``mask.documents``, "gqa" fewer key/value heads than query heads (G < H).
    """

    def __init__(self, n_head: int, head_dim: int): ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor: ...


class Position(Protocol):
    """Gives the model the positions of tokens by any of three methods, all of them optional:

    ``embed(x (B,T,C), positions (B|1,T)) -> (B,T,C)`` is called once per forward pass, on the embedded tokens;
    ``rotate(q (B,T,H,D), k (B,T,G,D), positions (B|1,T)) -> q, k`` is called in every mixer; it reads D from q;
    ``score_bias(q_positions (T,), k_positions (S,)) -> (H,T,S)`` is called once per forward pass; the result is added
    to the attention scores.
    """

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int): ...


class Mixer(Protocol):
    """Mixes over positions and owns the projections: x (B,T,C) -> (B,T,C).

    ``position`` is the index of this layer's position part in ``context.position`` and ``context.bias``. ``attention``
    is a class to build with (n_head, head_dim), and ``depth`` is (index, n_layer). ``init_cache(batch, max_len)``
    returns the initial ``context.cache[index]`` for decoding: tensors of a fixed size on the model's device. The cache
    may be used again from start 0 for another text. A mixer without a cache sets ``cache = False`` instead; generation
    then recomputes all tokens. ``supports`` is as for Attention, and mostly that of the attention part. The class
    attribute ``ignores`` names the slots and knobs of GPT that the mixer does not use, such as ("attention",
    "position", "n_kv_head").
    """

    def __init__(self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: tuple): ...

    def forward(self, x: Tensor, context: Context) -> Tensor: ...


class Norm(Protocol):
    """(..., C) -> (..., C). ``torch.nn.LayerNorm`` can be used unchanged."""

    def __init__(self, dim: int): ...

    def forward(self, x: Tensor) -> Tensor: ...


class Ffn(Protocol):
    """x (B,T,C) -> (B,T,C), each position independently of the others. The knob for the width is called ``hidden``;
    None means the width that gives as many parameters as the plain 4C network. Auxiliary losses go into
    ``context.losses``."""

    def __init__(self, dim: int): ...

    def forward(self, x: Tensor, context: Context) -> Tensor: ...


class Block(Protocol):
    """The residual connections around a mixer and an ffn: (B,T,C) into the first block, (B,T,C) out of the last.

    ``mixer`` and ``ffn`` are built modules, ``norm`` is a class, ``depth`` is (index, n_layer). Between blocks x may
    have any shape: the first block may add residual streams, and the last block must merge them."""

    def __init__(self, dim: int, mixer: Any, ffn: Any, norm: type, depth: tuple): ...

    def forward(self, x: Tensor, context: Context) -> Tensor: ...


class Init(Protocol):
    """Fills ``parameter`` in place from ``generator``. It is called for the weights and biases of every Linear and
    Embedding; all other parameters keep the values from their constructor.

    A part may set three attributes on its layers; the init reads them from the parameter. ``residual`` is True for a
    projection back into the residual stream (``linear.residual = True``). ``merged`` gives the rows of the matrices
    that a layer merges (toolkit.linear.Merged, or ``linear.merged = {"q": 64, "k": 32}``), else None. ``tied`` is True
    for an embedding that is also the output matrix. The init may set ``parameter.lr_scale``, which multiplies the
    parameter's learning rate. A module with a method ``draw(name, parameter, generator)`` fills its own parameters
    instead. On the meta device the init is called too, although nothing is drawn."""

    def __init__(self, n_layer: int): ...

    def __call__(self, name: str, parameter: Tensor, generator: torch.Generator) -> None: ...


class Model(Protocol):
    """ids (B,T) -> hidden (B,T,C) and the head (weight, vocab_size, ``logits(hidden)``). Raises ValueError for tokens
    past ``max_len``. ``init_cache(batch)`` returns the caches for decoding, or None if a mixer has none."""

    def __init__(self, vocab_size: int, max_len: int): ...

    def forward(self, ids: Tensor, context: Context | None = None) -> tuple: ...


class Loss(Protocol):
    """hidden (N,C), head, targets (N,) -> (objective, nats, count), three scalars. Targets of -100 are ignored.

    ``objective`` is differentiated and ``nats`` is the plain cross-entropy, both summed over the targets that are not
    ignored; ``count`` is the number of these targets. The loop divides by the count of the whole step, so that
    accumulated micro-batches equal one large batch."""

    def __init__(self): ...

    def forward(self, hidden: Tensor, head: Any, targets: Tensor) -> tuple: ...


class Optimizer(Protocol):
    """A ``torch.optim.Optimizer`` over ``toolkit.groups.parameter_groups(model, ...)``. If it has ``train()`` and
    ``eval()``, the loop calls ``eval()`` before evaluation and saving, and ``train()`` after them."""

    def __init__(self, model: torch.nn.Module): ...

    def step(self): ...


class Schedule(Protocol):
    """step -> a factor for the peak learning rate, a function of the step alone, defined for 0 <= step < steps."""

    def __init__(self, steps: int): ...

    def __call__(self, step: int) -> float: ...


class Tokenizer(Protocol):
    """Converts text to ids and back.

    Attributes: ``vocab_size`` (known without I/O), ``eot`` (the id that ends a document), and ``byte_lengths`` ((V,)
    int array: how many UTF-8 bytes each id stands for, 0 for special tokens). ``save`` writes all that ``load`` needs,
    on another machine too, to encode in the same way and with the same ``fingerprint``. The fingerprint covers the
    knobs and what was learnt. A tokenizer that learns from text also has ``train(texts)``; the data part calls it,
    unless the tokenizer has been trained or loaded already. ``lossy = True`` means that decode(encode(text)) may differ
    from the text. ``pieces``, the bytes of each id, is optional: with it a vocabulary can be reduced to fewer ids.

    ``encode_batch(texts) -> (ids (N,), counts (len(texts),))``, two integer arrays, is an optional faster way to the
    same ids: the ids of all texts one after the other, and the number of ids of each text. Several threads call it at
    the same time. The data part compares a sample with ``encode``; if they differ, it encodes everything again with
    ``encode``. It ignores an inherited ``encode_batch`` in a class that overrides only ``encode``. ``implementation``,
    a str, names the library that ``encode_batch`` uses; the manifest records it."""

    vocab_size: int
    eot: int

    def __init__(self): ...

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def fingerprint(self) -> str: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Data(Protocol):
    """Samples of seq_len + 1 tokens, in the splits "train" and "val".

    The constructor does no I/O; ``prepare()`` does all of it, and further calls cost nothing. Sample j of a split
    depends only on (seed, split, j). ``batch`` returns the samples from index * size to index * size + size - 1 as
    (size, seq_len + 1) int64. ``windows(split)`` is the number of distinct samples; each epoch has every sample
    once."""

    def __init__(self, tokenizer: Any, seq_len: int, seed: int): ...

    def prepare(self) -> None: ...

    def windows(self, split: str) -> int: ...

    def batch(self, split: str, index: int, size: int) -> np.ndarray: ...

    def fingerprint(self) -> str: ...


class Logger(Protocol):
    """Shows what the loop reports. Metrics have their unit in their name: val/loss_nats, time/step_ms.

    ``start_step`` is 0, or the step at which a resumed run continues: entries of later steps that were logged before
    the resumption are invalid. ``run_dir`` contains the run's facts and config before a logger is built.
    ``close(summary)`` is the last call. A logger runs in its own thread, behind a queue, and must draw no random
    numbers from torch."""

    def __init__(self, run_dir: Path, start_step: int): ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self, summary: dict[str, float]) -> None: ...


class Experiment(Protocol):
    """The root of the config: its fields are the whole config. The toolkit has one, in ``toolkit/experiment.py``."""

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
